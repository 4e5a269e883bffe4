"""nano: the tiny Kontext that ships with the repository: its scenes, tokenizers, pretraining and evaluation."""
