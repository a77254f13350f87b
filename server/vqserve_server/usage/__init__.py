"""How live traffic uses the codes of each codebook, from a sample of the encoded rows (docs/codebook-health.md)."""
