"""Kernels compiled ahead of time, without a GPU, and the limits that their machine code keeps."""
