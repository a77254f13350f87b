"""Training a codebook on latents (docs/training.md). Nothing here imports torch until a training begins."""
