"""FLUX.1 Kontext in pure PyTorch: the model, its LoRA training on image pairs, and editing pictures with it."""
