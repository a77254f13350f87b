"""One codebook, loaded and frozen: latents to indices and back, in process."""

from vqserve_server.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
