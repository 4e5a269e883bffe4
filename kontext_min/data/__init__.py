"""Pairs on disk: finding them, one geometry for target and references, and the cache of latents and text."""
