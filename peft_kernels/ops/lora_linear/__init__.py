"""LoRA linear layer over a dense or a 4-bit weight."""
