"""Fewer bits than the compute dtypes have, on the kernels of bitsandbytes and torchao."""
