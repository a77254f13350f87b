"""What makes and examines codebooks and serves none: import, inspection, training."""
