"""The networks, as in the papers: torch and einops only, and none of them imports another."""
