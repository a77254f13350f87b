"""The measured cases: codebooks of well-known shapes, and a number of images in each request, encoded and decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vqserve import payload
from vqserve.dtypes import BY_NAME, LatentDTypeName
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_client import Client
from vqserve_server import Tokenizer
from vqserve_server.codebooks import save_codebook
from vqserve_server.quantizers import VectorQuantizer

# K, D and the grid of an image's tokens.
BOOKS = {"tiny": (16, 4, 32, 32), "ldm-f8": (16384, 4, 32, 32), "vqgan-f16": (1024, 256, 16, 16)}
DTYPES = {"fp32": pb.DTYPE_FLOAT32, "bf16": pb.DTYPE_BFLOAT16}


@dataclass(frozen=True)
class Cell:
    """One kind of request."""

    book: str
    images: int
    operation: str  # encode or decode
    dtype: str  # of the latents

    @property
    def name(self) -> str:
        return f"{self.book} {self.images} x {self.operation} {self.dtype}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the latents."""
        _, channels, height, width = BOOKS[self.book]
        return self.images, channels, height, width

    @property
    def tokens(self) -> int:
        return self.images * BOOKS[self.book][2] * BOOKS[self.book][3]

    @property
    def method(self) -> str:
        return f"/vqserve.v1.TokenizerService/{self.operation.capitalize()}"

    @cached_property
    def latents(self) -> NDArray[np.float32]:
        latents = np.random.default_rng(1).standard_normal(self.shape, dtype=np.float32)
        return BY_NAME["bfloat16"].widen(BY_NAME["bfloat16"].narrow(latents)) if self.dtype == "bf16" else latents

    @cached_property
    def array(self) -> Any:
        """The array that a user of the SDK passes: numpy, or torch if numpy does not have the type."""
        if self.operation == "decode":
            return self.indices
        return torch.from_numpy(self.latents).bfloat16() if self.dtype == "bf16" else self.latents

    @property
    def reply_dtype(self) -> LatentDTypeName:
        """The type of the latents, as `Client.decode` takes it."""
        return "float32" if self.dtype == "fp32" else "bfloat16"

    def call(self, client: Client) -> Callable[[], object]:
        """The call of the SDK that a user makes for this request."""
        if self.operation == "encode":
            return lambda: client.encode(self.array)
        return lambda: client.decode(self.array, dtype=self.reply_dtype)

    @cached_property
    def indices(self) -> NDArray[np.unsignedinteger]:
        codes = BOOKS[self.book][0]
        dtype = np.uint8 if codes <= 256 else np.uint16
        return np.random.default_rng(2).integers(0, codes, (self.images, *self.shape[2:])).astype(dtype)

    @cached_property
    def given(self) -> memoryview:
        """The payload of a request."""
        if self.operation == "encode":
            return payload.view(self.latents, DTYPES[self.dtype])
        return payload.view(self.indices, payload.dtype_of(self.indices))

    @property
    def reply_bytes(self) -> int:
        """The payload of a reply."""
        if self.operation == "decode":
            return payload.nbytes(DTYPES[self.dtype], self.shape)
        return self.indices.nbytes

    @cached_property
    def request(self) -> bytes:
        """The message to vqserve."""
        if self.operation == "encode":
            message = pb.EncodeRequest(dtype=DTYPES[self.dtype], shape=self.shape, latents=bytes(self.given))
        else:
            message = pb.DecodeRequest(
                dtype=payload.dtype_of(self.indices),
                shape=self.indices.shape,
                latent_dtype=DTYPES[self.dtype],
                indices=bytes(self.given),
            )
        message.codebook = self.book
        return message.SerializeToString()


def make_books(folder: Path) -> dict[str, Tokenizer]:
    """Write the codebooks, as files to serve and as bare arrays, and return their tokenizers."""
    tokenizers = {}
    for name, (codes, dim, *_) in BOOKS.items():
        quantizer = VectorQuantizer(codes, dim)
        generator = torch.Generator().manual_seed(codes)
        quantizer.load_state_dict({"embedding.weight": torch.randn(codes, dim, generator=generator)})
        np.save(folder / f"{name}.npy", quantizer.embedding.weight.detach().numpy())
        save_codebook(quantizer, folder / f"{name}.safetensors")
        tokenizers[name] = Tokenizer.load(folder / f"{name}.safetensors", device="cpu")
    return tokenizers
