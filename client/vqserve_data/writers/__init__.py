"""Writers: one module a format, and what finds the writer of a name."""

from __future__ import annotations

from vqserve_data.errors import FileError
from vqserve_data.writers.npy import NpyWriter
from vqserve_data.writers.npz import NpzWriter
from vqserve_data.writers.parquet import ParquetWriter
from vqserve_data.writers.protocol import Shard, Writer, Written
from vqserve_data.writers.safetensors import SafetensorsWriter
from vqserve_data.writers.stream import StreamWriter
from vqserve_data.writers.tar import TarWriter

__all__ = ["FORMATS", "Shard", "Writer", "Written", "add_writer", "writer_of"]

_BUILT_IN: tuple[Writer, ...] = (
    NpyWriter(),
    NpzWriter(),
    SafetensorsWriter(),
    TarWriter(),
    ParquetWriter(),
    StreamWriter(),
)
FORMATS = tuple(writer.name for writer in _BUILT_IN)

_writers = {writer.name: writer for writer in _BUILT_IN}


def writer_of(name: str) -> Writer:
    """Return the writer of a format.

    Raises:
        FileError: there is none of this name.
    """
    if name not in _writers:
        raise FileError(f"there is no format {name!r}: there are {', '.join(_writers)}")
    return _writers[name]


def add_writer(writer: Writer) -> None:
    """Add a writer of your own, or replace that of its name."""
    _writers[writer.name] = writer
