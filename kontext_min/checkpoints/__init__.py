"""Standard weight files <-> our modules: the name tables, strict streamed loading, and writing a model folder."""
