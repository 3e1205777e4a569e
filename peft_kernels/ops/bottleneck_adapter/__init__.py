"""Bottleneck adapter: down-projection, activation, up-projection, residual."""
