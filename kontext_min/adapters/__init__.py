"""Low-rank updates of the frozen transformer: the layers, where they are put, and their files."""
