"""The items of a stream of tokens: files that are mapped, and their indexes."""

from __future__ import annotations

import bisect
import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from vqserve_data.errors import FileError

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class TokenStream(Sequence[Tokens]):
    """The items of a stream of tokens, mapped: what is not used is not read.

    A file `shard-00000.bin` is one shard; a folder has all of its shards, in their order. A pickled stream is its path:
    another process maps the same files.

    Attributes:
        path: the file or the folder.
        shards: the shards, each of them a `TokenStream` of one file.
    """

    def __init__(self, path: str | Path) -> None:
        """Map the tokens and read the index.

        Raises:
            FileError: there is no stream, or it is incomplete.
        """
        self.path = Path(path)
        if not self.path.exists():
            raise FileError(f"{self.path}: there is no such file or folder")
        self._starts = [0]
        if not self.path.is_dir():
            self.shards: tuple[TokenStream, ...] = (self,)
            self._tokens, self._index = _opened(self.path)
            self._starts.append(len(self._index["offsets"]) - 1)
            return
        files = sorted(self.path.glob("shard-*.bin"))
        if not files:
            raise FileError(f"{self.path} has no shard-*.bin: it is no stream of tokens")
        self.shards = tuple(TokenStream(file) for file in files)
        self._starts += itertools.accumulate(map(len, self.shards))

    @property
    def tokens(self) -> Tokens:
        """All tokens of the stream in one axis, mapped: uint16 or uint32.

        Raises:
            ValueError: there are several shards: each of `shards` has its own.
        """
        if len(self.shards) > 1:
            raise ValueError(f"{self.path} has {len(self.shards)} shards: use the tokens of each of .shards")
        return self.shards[0]._tokens

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where in `tokens` each item begins, and after the last one where it ends.

        Raises:
            ValueError: there are several shards: each of `shards` has its own.
        """
        if len(self.shards) > 1:
            raise ValueError(f"{self.path} has {len(self.shards)} shards: use the offsets of each of .shards")
        return self.shards[0]._index["offsets"]

    @property
    def keys(self) -> list[str]:
        """The keys of the items."""
        return [key for shard in self.shards for key in _keys(shard._index)]

    @property
    def metadata(self) -> dict[str, str]:
        """The codebook and the options that made the tokens."""
        values: dict[str, str] = json.loads(self.shards[0]._index["metadata"].tobytes())
        return values

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, position: int, /) -> Tokens: ...

    @overload
    def __getitem__(self, position: slice, /) -> list[Tokens]: ...

    def __getitem__(self, position: int | slice, /) -> Tokens | list[Tokens]:
        """Return the tokens of an item in their shape, mapped; of a slice a list."""
        if isinstance(position, slice):
            return [self[each] for each in range(*position.indices(len(self)))]
        at = position + len(self) if position < 0 else position
        if not 0 <= at < len(self):
            raise IndexError(f"there is no item {position}: there are {len(self)}")
        shard = bisect.bisect_right(self._starts, at) - 1
        return self.shards[shard]._item(at - self._starts[shard])

    def __iter__(self) -> Iterator[Tokens]:
        return (shard._item(at) for shard in self.shards for at in range(len(shard)))

    def __repr__(self) -> str:
        return f"TokenStream({str(self.path)!r}, {len(self)} items in {len(self.shards)} shards)"

    def __reduce__(self) -> tuple[type[TokenStream], tuple[Path]]:
        """Pickle the path: else all tokens would travel to another process."""
        return TokenStream, (self.path,)

    def _item(self, at: int) -> Tokens:
        offsets, ends = self._index["offsets"], self._index["lengths_offsets"]
        shape = self._index["lengths"][ends[at] : ends[at + 1]]
        return self._tokens[offsets[at] : offsets[at + 1]].reshape(shape)


def _opened(path: Path) -> tuple[Tokens, dict[str, npt.NDArray[Any]]]:
    index_path = path.with_suffix(".index.npz")
    try:
        with np.load(index_path, allow_pickle=False) as arrays:
            index = {name: arrays[name] for name in arrays.files}
        dtype, count = np.dtype(str(index["dtype"])).newbyteorder("<"), int(index["offsets"][-1])
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise FileError(f"{error.filename}: there is no such file") from error
    except (OSError, ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile) as error:
        raise FileError(f"{index_path} is no index of a stream of tokens: {error}") from error
    if size != count * dtype.itemsize:
        raise FileError(f"{path} has {size} bytes, and its index says {count * dtype.itemsize}: it is incomplete")
    if not count:
        # A file without bytes cannot be mapped.
        return np.empty(0, dtype), index
    return np.asarray(np.memmap(path, dtype, mode="r")), index


def _keys(index: dict[str, npt.NDArray[Any]]) -> list[str]:
    text, ends = index["keys"].tobytes(), index["keys_offsets"].tolist()
    return [text[start:end].decode() for start, end in itertools.pairwise(ends)]
