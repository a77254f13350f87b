"""Codebooks that other projects trained: read from their checkpoints, converted and compared."""
