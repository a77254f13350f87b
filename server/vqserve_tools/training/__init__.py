"""Training a codebook on latents (docs/training.md). Importing `commands` does not import torch."""
