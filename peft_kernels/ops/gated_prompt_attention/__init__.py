"""Attention plus a gated attention over a learned prompt."""
