"""One folder per operation: op.py, reference.py, triton_kernels.py, native_calls.py, module.py."""
