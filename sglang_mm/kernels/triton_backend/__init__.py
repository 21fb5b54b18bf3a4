"""Our own kernels, in Triton: attention over tile programs, the probe's masses, and the merge of partial results."""
