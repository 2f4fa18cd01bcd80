"""The public functions: argument checks, autograd, and the choice of kernels."""
