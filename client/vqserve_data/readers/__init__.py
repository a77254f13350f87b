"""Readers: one module a format, and what finds the reader of a file."""

from __future__ import annotations

from collections.abc import KeysView

from vqserve_data.readers.arrow import ArrowReader
from vqserve_data.readers.hdf5 import Hdf5Reader
from vqserve_data.readers.npy import NpyReader
from vqserve_data.readers.npz import NpzReader
from vqserve_data.readers.parquet import ParquetReader
from vqserve_data.readers.protocol import Reader, Selection, SourceFile
from vqserve_data.readers.raw import RawReader
from vqserve_data.readers.safetensors import SafetensorsReader
from vqserve_data.readers.tar import TarReader
from vqserve_data.readers.torch import TorchReader
from vqserve_data.readers.zarr import ZarrReader
from vqserve_data.remote import path_of

__all__ = ["SUFFIXES", "Reader", "Selection", "SourceFile", "add_reader", "reader_of", "suffix_of"]

_RAW = RawReader()
_BY_SUFFIX: dict[str, Reader] = {}
# Suffixes of the formats that are read, with those that `add_reader` added.
SUFFIXES: KeysView[str] = _BY_SUFFIX.keys()


def add_reader(reader: Reader) -> None:
    """Add a reader; it replaces those that have read its suffixes so far."""
    for suffix in reader.suffixes:
        _BY_SUFFIX[suffix] = reader


def suffix_of(name: str) -> str | None:
    """Return the longest known suffix of a path or URL, in lower case; None: it has none."""
    base = path_of(name).rstrip("/").rpartition("/")[2].lower()
    start = base.find(".")
    while start >= 0:
        # A name that is nothing but a suffix has none.
        if start > 0 and base[start:] in _BY_SUFFIX:
            return base[start:]
        start = base.find(".", start + 1)
    return None


def reader_of(file: SourceFile) -> Reader:
    """Return the reader of a file; of a file of unknown suffix the one that gives its bytes (`Selection.raw`)."""
    suffix = suffix_of(file.name)
    return _RAW if suffix is None else _BY_SUFFIX[suffix]


for _reader in (
    NpyReader(),
    NpzReader(),
    SafetensorsReader(),
    TarReader(),
    ParquetReader(),
    ArrowReader(),
    Hdf5Reader(),
    ZarrReader(),
    TorchReader(),
):
    add_reader(_reader)
