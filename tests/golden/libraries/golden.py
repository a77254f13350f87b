"""A small foreign checkpoint, with what its own library made of some latents: one .npz of tests/golden/foreign."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file


@dataclass(frozen=True, kw_only=True, eq=False)
class Golden:
    """What the tests compare with; made where the library is, read where it is not.

    Attributes:
        library: the package that computed indices and decoded, and its version.
        suffix: of the file that the family's checkpoints are published in.
        state: the checkpoint, as the family has it: names with prefixes, and some layers that are not the quantizer's.
        latents: float32, in the library's own layout, which is our default or what `flags` says.
        indices: integers, the library's, in our arrangement (a token's stages in the place of the channels).
        decoded: float32, what the library makes of its indices.
        flags: for `vqserved import`.
        wrapper: the key under which the file holds the state dict; None: it is the file's top.
        beside: what the file holds next to the wrapper.
    """

    library: str
    suffix: str
    state: Mapping[str, np.ndarray]
    latents: np.ndarray
    indices: np.ndarray
    decoded: np.ndarray
    flags: tuple[str, ...] = ()
    wrapper: str | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path, *, compressed: bool = True) -> None:
        """Write the .npz."""
        described = {name: getattr(self, name) for name in ("library", "suffix", "flags", "wrapper", "beside")}
        meta = np.frombuffer(json.dumps(described).encode(), np.uint8)
        state = {f"state.{name}": array for name, array in self.state.items()}
        arrays = {"latents": self.latents, "indices": self.indices, "decoded": self.decoded}
        (np.savez_compressed if compressed else np.savez)(path, meta=meta, **arrays, **state)

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read one."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(bytes(arrays.pop("meta")))
        meta["flags"] = tuple(meta["flags"])
        state = {name.removeprefix("state."): arrays.pop(name) for name in list(arrays) if name.startswith("state.")}
        return cls(state=state, **meta, **arrays)

    def write_checkpoint(self, folder: Path) -> Path:
        """Write the checkpoint into a file of the family's own type, and return its path."""
        path = folder / f"checkpoint{self.suffix}"
        # A copy: torch wants memory that it may write.
        state = {name: torch.from_numpy(np.array(array)) for name, array in self.state.items()}
        if self.suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save({**self.beside, self.wrapper: state} if self.wrapper else state, path)
        return path
