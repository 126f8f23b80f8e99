"""What row-wise kernels share: tile shapes, LayerNorm arithmetic, launching, registration."""
