"""DeepSpeed configurations as package data, so that `--deepspeed zero1` works from a wheel too."""
