"""Stores of Zarr, of both formats: each array in any group is an item."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vqserve_data.errors import FileError, MissingLibrary
from vqserve_data.items import Array, Cut, SourceArray
from vqserve_data.keys import one_line
from vqserve_data.readers.handle import MAX_CHUNK_BYTES, MOST_OF_A_BYTE, WHOLE_BYTES, check_numbers
from vqserve_data.readers.members import Member, MembersReader
from vqserve_data.readers.protocol import SourceFile
from vqserve_data.remote import RemoteFile

# A chunk that was never written is no file and reads as the fill value.
_HARMLESS_BYTES = 1 << 20
# Codecs that only compute, and whose results are bounded. numcodecs has one for pickles, too, which run what they say.
_CODECS = frozenset({
    "adler32", "astype", "bitround", "blosc", "bytes", "crc32", "crc32c", "delta", "fixedscaleoffset", "fletcher32",
    "gzip", "jenkins_lookup3", "lz4", "packbits", "quantize", "sharding_indexed", "shuffle", "transpose", "zlib",
    "zstd",
})  # fmt: skip


class ZarrReader(MembersReader):
    """Reads folders `NAME.zarr`; large arrays are read part by part."""

    suffixes = (".zarr",)

    def members(self, file: SourceFile) -> Sequence[Member]:
        """Return the array of a store, or those of all its groups by name."""
        try:
            import zarr  # noqa: PLC0415
            import zarr.storage  # noqa: PLC0415

            from vqserve_data.readers.zarr_store import CheckedStore  # noqa: PLC0415
        except ImportError as error:
            raise MissingLibrary("reading Zarr", extra="zarr") from error
        store: Any
        if isinstance(file, RemoteFile):
            store = zarr.storage.FsspecStore(_asynchronous(file.fs), read_only=True, path=file.location)
        elif file.path is not None:
            _check_links(file.path)
            store = zarr.storage.LocalStore(file.path, read_only=True)
        else:
            raise FileError(f"{file.name}: a Zarr store is a folder or a URL")
        checked = CheckedStore(store)
        root = zarr.open(checked, mode="r")
        nodes: list[tuple[str, Any]]
        if isinstance(root, zarr.Array):
            nodes = [("", root)]
        else:
            nodes = [node for node in root.members(max_depth=None) if isinstance(node[1], zarr.Array)]
        for _, node in nodes:
            if _is_blosc(node.metadata.to_dict()):
                nbytes = math.prod(node.chunks) * np.dtype(node.dtype).itemsize
                checked.chunk_bytes[node.path] = 0 if node.filters else nbytes
        return [
            Member(name, partial(_look, node), partial(_array, file, node)) for name, node in sorted(nodes, key=_name)
        ]


def _check_links(store: Path) -> None:
    """Check that no folder in a store is a link, which may lead back to one above it.

    Raises:
        ValueError: one is.
    """
    for folder, names, _ in os.walk(store):
        for name in names:
            if Path(folder, name).is_symlink():
                raise ValueError("a folder in it is a link, which is not followed")


def _asynchronous(fs: Any) -> Any:
    if fs.async_impl and fs.asynchronous:
        return fs
    if fs.async_impl:
        # A new instance, of zarr's own event loop.
        return type(fs)(*fs.storage_args, **{**fs.storage_options, "asynchronous": True})
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper  # noqa: PLC0415

    return AsyncFileSystemWrapper(fs, asynchronous=True)


def _name(node: tuple[str, Any]) -> str:
    return node[0]


def _is_blosc(metadata: Mapping[str, Any]) -> bool:
    """Return whether the bytes of a chunk are those of blosc, in either format."""
    last = metadata.get("compressor") or [None, *(metadata.get("codecs") or ())][-1]
    return next(_codecs({"compressor": last}), None) == "blosc"


def _look(node: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    dtype = np.dtype(node.dtype)
    check_numbers(dtype)
    return node.shape, dtype


def _array(file: SourceFile, node: Any) -> SourceArray:
    shape, dtype = _look(node)
    for codec in _codecs(node.metadata.to_dict()):
        if codec.removeprefix("numcodecs.") not in _CODECS:
            raise ValueError(f"its codec {codec!r} is not read")
    nbytes = math.prod(shape) * dtype.itemsize
    if file.size and nbytes > max(file.size * MOST_OF_A_BYTE, _HARMLESS_BYTES):
        raise ValueError(f"an array of shape {shape} needs {nbytes} bytes and the store has {file.size}")
    if math.prod(node.shards or node.chunks) * dtype.itemsize > MAX_CHUNK_BYTES:
        raise ValueError(f"its chunks of shape {node.shards or node.chunks} have more than {MAX_CHUNK_BYTES} bytes")
    array = _LargeArray(file.name, node, dtype)
    return array[()] if nbytes <= WHOLE_BYTES else array


def _codecs(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of all codecs that the metadata of an array name, also those of shards."""
    found: Iterable[Any] = [
        *(metadata.get("codecs") or ()),
        *(metadata.get("filters") or ()),
        metadata.get("compressor"),
    ]
    for codec in found:
        if codec is None:
            continue
        config = (
            codec
            if isinstance(codec, Mapping)
            else codec.get_config()
            if hasattr(codec, "get_config")
            else codec.to_dict()
        )
        yield str(config.get("name", config.get("id")))
        inner = config.get("configuration", {})
        for name in ("codecs", "index_codecs"):
            yield from _codecs({"codecs": inner.get(name)})


class _LargeArray:
    """An array that is read when it is indexed."""

    def __init__(self, name: str, node: Any, dtype: np.dtype[Any]) -> None:
        self._name = name
        self._node = node
        self.shape: tuple[int, ...] = node.shape
        self.dtype = dtype

    def __getitem__(self, cut: Cut) -> Array:
        try:
            return np.asarray(self._node[cut])
        except Exception as error:
            raise FileError(f"cannot read {self._name}: {one_line(error)}") from error
