"""The Triton kernels of fastdeeplab."""
