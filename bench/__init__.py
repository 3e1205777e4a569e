"""Benchmarks of peft_kernels against its peers and its floors: `python -m bench`."""
