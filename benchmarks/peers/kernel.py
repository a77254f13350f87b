"""What the peers compute: the straightforward translation, or our search and tables, in the same few lines.

The environment says what a server is to do, since servers read the command line themselves: PEER_KERNEL (plain or
ours), PEER_CODES (a .npy file), PEER_SHAPE (of one request's latents, b,C,h,w), PEER_OPERATION (encode or decode),
PEER_PORT.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

CODES = np.load(Path(os.environ["PEER_CODES"]))
SHAPE = tuple(int(n) for n in os.environ["PEER_SHAPE"].split(","))
OPERATION = os.environ["PEER_OPERATION"]
PORT = int(os.environ["PEER_PORT"])
INDEX_DTYPE = np.uint8 if len(CODES) <= 256 else np.uint16


def kernel() -> Callable[[np.ndarray], np.ndarray]:
    """Latents (b, C, h, w) to indices (b, h, w), or back."""
    make = {"plain": plain, "ours": ours}[os.environ["PEER_KERNEL"]]
    return make(torch.from_numpy(CODES), OPERATION)


def plain(codes: torch.Tensor, operation: str) -> Callable[[np.ndarray], np.ndarray]:
    """As the quantizers write it: the whole distance matrix, then argmin; a gather."""

    def encode(latents: np.ndarray) -> np.ndarray:
        b, c, h, w = latents.shape
        rows = torch.from_numpy(latents).permute(0, 2, 3, 1).reshape(-1, c)
        d = (rows**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * rows @ codes.T
        return d.argmin(1).reshape(b, h, w).numpy().astype(INDEX_DTYPE)

    def decode(indices: np.ndarray) -> np.ndarray:
        rows = codes[torch.from_numpy(indices.astype(np.int64))]
        return rows.permute(0, 3, 1, 2).contiguous().numpy()

    return encode if operation == "encode" else decode


def ours(codes: torch.Tensor, operation: str) -> Callable[[np.ndarray], np.ndarray]:
    """Our tokenizer in the peer's process."""
    from vqserve_server import Tokenizer
    from vqserve_server.quantizers import VectorQuantizer

    quantizer = VectorQuantizer(*codes.shape)
    quantizer.load_state_dict({"embedding.weight": codes})
    tokenizer = Tokenizer(quantizer, device="cpu")
    return tokenizer.encode if operation == "encode" else tokenizer.decode
