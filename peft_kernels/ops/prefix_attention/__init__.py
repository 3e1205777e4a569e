"""Attention over a learned prefix and the keys."""
