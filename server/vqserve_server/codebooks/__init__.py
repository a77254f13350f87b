"""Codebook files and the quantizers in them (docs/codebooks.md)."""

from vqserve_server.codebooks.file import (
    Codebook,
    codebook_digest,
    load_codebook,
    save_codebook,
)

__all__ = ["Codebook", "codebook_digest", "load_codebook", "save_codebook"]
