"""What the kernels share: tiles, LayerNorm's arithmetic, launching and registration with torch."""
