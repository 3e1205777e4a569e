"""The 4-bit codec (NF4 and FP4 in bitsandbytes' layout), on raw tensors."""
