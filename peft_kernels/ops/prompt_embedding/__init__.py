"""Prompt embedding: learned tokens before the embedded ones, and the encoders that make them."""
