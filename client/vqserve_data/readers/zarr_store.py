"""A Zarr store whose chunks are compared with their own headers before they are unpacked.

blosc believes the size in a chunk's header: of a chunk that was cut short it would read the memory behind it, and give
numbers. Imported only where zarr is installed.
"""

from __future__ import annotations

import struct
from typing import Any

from zarr.storage import WrapperStore

from vqserve_data.readers.handle import MAX_CHUNK_BYTES

# Version, flags and so on, then the sizes of the elements, of a block and of the whole
# (https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst).
_BLOSC_HEADER = struct.Struct("<4xI4xI")


class CheckedStore(WrapperStore[Any]):
    """A store that checks the chunks of arrays whose last codec is blosc.

    Attributes:
        chunk_bytes: size of a chunk by the path of such an array; 0: filters of the array change it.
    """

    def __init__(self, store: Any) -> None:
        """Wrap a store."""
        super().__init__(store)
        self.chunk_bytes: dict[str, int] = {}

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return the bytes of a key.

        Raises:
            ValueError: it is a chunk of blosc, and not as its header says.
        """
        value = await super().get(key, prototype, byte_range)
        if value is not None and byte_range is None:
            expected = self._chunk_bytes(key)
            if expected is not None:
                _check_blosc(value.to_bytes(), expected)
        return value

    def _chunk_bytes(self, key: str) -> int | None:
        """Return the size of the chunk of a key; None: it is no chunk of blosc."""
        folder, _, name = key.rpartition("/")
        if name.startswith(".z") or name == "zarr.json":
            return None
        while folder not in self.chunk_bytes and folder:
            folder = folder.rpartition("/")[0]
        return self.chunk_bytes.get(folder)


def _check_blosc(chunk: bytes, expected: int) -> None:
    if len(chunk) < _BLOSC_HEADER.size:
        raise ValueError("a chunk is incomplete")
    unpacked, held = _BLOSC_HEADER.unpack_from(chunk)
    if held != len(chunk) or unpacked > MAX_CHUNK_BYTES or expected not in (0, unpacked):
        raise ValueError(f"a chunk has {len(chunk)} bytes of {held}, for {unpacked} bytes of {expected}")
