"""The digest of a codebook: equal if and only if encode and decode use the same data (docs/codebooks.md, "Digest")."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve_server.codebooks.safetensors_file import dtype_name

_TAG = b"vqserve codebook digest 1"


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys, no spaces and ASCII only: one text for one value.

    Raises:
        ValueError: the value contains NaN or infinity.
        TypeError: the value contains an object that JSON cannot represent.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(kind: str, arguments: Mapping[str, object], tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return the lower-case hexadecimal SHA-256 of a codebook's canonical form.

    Every field carries its length, so that two different codebooks cannot have one form.

    Args:
        kind: "vq", "ema" and so on.
        arguments: arguments that affect encode and decode, and no others.
        tensors: tensors that encode and decode read, and no others, by canonical name.
    """
    sha = hashlib.sha256()

    def feed(field: bytes | memoryview) -> None:
        sha.update(len(field).to_bytes(8, "little"))
        sha.update(field)

    feed(_TAG)
    feed(kind.encode())
    feed(canonical_json(dict(arguments)).encode())
    for name in sorted(tensors):
        array = tensors[name]
        little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        feed(name.encode())
        feed(dtype_name(array.dtype).encode())
        feed(canonical_json(list(array.shape)).encode())
        feed(little_endian.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()
