"""Reads streams of tokens, as `vqserve encode --format stream` writes them. It needs numpy only."""

from vqserve_data.stream.tokens import TokenStream

__all__ = ["TokenStream"]
