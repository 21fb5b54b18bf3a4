"""Context parallelism: who computes which row, and how tensors travel. Knows kernels and types, no models."""
