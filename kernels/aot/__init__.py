"""Kernels compiled ahead of time, without a GPU: which ones, and what their machine code says."""
