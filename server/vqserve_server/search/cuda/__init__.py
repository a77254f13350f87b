"""Search on CUDA by kernels that were compiled before, or that Triton compiles."""
