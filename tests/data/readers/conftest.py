"""What the tests of readers share: files of each format, written by its own library, and how they are read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, Entry, Item, Record
from vqserve_data.readers import Selection, reader_of
from vqserve_data.sources import find


class Files:
    """Reads the files that arguments name, one after the other."""

    def __init__(self, *arguments: str | Path, any_suffix: bool = False, **select: Any) -> None:
        self.files = find([str(argument) for argument in arguments], any_suffix=any_suffix).files
        self.select = Selection(**select)

    def read(self, start: int = 0) -> list[Record]:
        return [item for file in self.files for item in reader_of(file).read(file, self.select, start=start)]

    def entries(self) -> list[Entry]:
        return [entry for file in self.files for entry in reader_of(file).entries(file, self.select)]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by key; check on the way that entries tell the truth, and that items can be left out."""
        records = self.read()
        items = [record for record in records if isinstance(record, Item)]
        assert len(items) == len(records), [record for record in records if not isinstance(record, Item)]
        for entry, item in zip(self.entries(), items, strict=True):
            assert entry.key == item.key
            assert entry.shape in (None, item.array.shape)
            assert entry.dtype in (None, item.array.dtype)
        if len(self.files) == 1:
            for start in range(len(items) + 2):
                assert [record.key for record in self.read(start)] == [item.key for item in items[start:]]
        return {item.key: np.asarray(item.array[()]) for item in items}

    def bad(self) -> dict[str, str]:
        return {record.key: record.reason for record in self.read() if isinstance(record, BadItem)}


@pytest.fixture
def files() -> type[Files]:
    return Files


@pytest.fixture
def same() -> Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], None]:
    """Check that arrays by key are the same: keys in order, types, shapes and bits."""

    def check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
        assert list(found) == list(expected)
        for key, array in expected.items():
            assert found[key].dtype == array.dtype, key
            np.testing.assert_array_equal(found[key], array, err_msg=key)

    return check


@pytest.fixture
def draw() -> Callable[..., np.ndarray]:
    """Draw numbers: draw(4, 8, 8, dtype=np.float16)."""

    def make(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
        return (np.random.default_rng(seed).standard_normal(shape) * 100).astype(dtype)

    return make


@pytest.fixture
def damaged(tmp_path: Path, files: type[Files]) -> Callable[..., set[str]]:
    """Read a file cut off at many lengths and with many bytes changed; return the reasons of bad items.

    Anything but items, bad items and FileErrors fails the test by itself.
    """

    def check(path: Path, *, cuts: int = 400, flips: int = 400, seed: int = 0, **select: Any) -> set[str]:
        whole = path.read_bytes()
        keys = [record.key for record in files(path, **select).read()]
        broken = path.with_name(f"broken{''.join(path.suffixes)}")
        random = np.random.default_rng(seed)
        lengths: Sequence[int] = range(0, len(whole), max(1, len(whole) // cuts))
        reasons = set()
        for length in lengths:
            broken.write_bytes(whole[:length])
            records = _survives(files(broken, **select))
            reasons |= {record.reason for record in records if isinstance(record, BadItem)}
            assert any(isinstance(record, BadItem) for record in records), f"{length} of {len(whole)} bytes"
            assert len(records) <= len(keys) + 1
        for _ in range(flips):
            data = bytearray(whole)
            for place in random.integers(0, len(whole), random.integers(1, 4)):
                data[place] = random.choice([0, 0x7F, 0x80, 0xFF, random.integers(256)])
            broken.write_bytes(data)
            reasons |= {record.reason for record in _survives(files(broken, **select)) if isinstance(record, BadItem)}
        broken.unlink()
        return reasons

    return check


def _survives(files: Files) -> list[Record]:
    with contextlib.suppress(FileError):
        files.entries()
    try:
        records = files.read()
    except FileError:
        # The selection does not fit what a damaged file says that it has.
        return [BadItem("", "", "the selection does not fit")]
    for record in records:
        if isinstance(record, Item):
            np.asarray(record.array[()])
        elif isinstance(record, BadItem):
            assert record.reason
            assert "\n" not in record.reason
    return records
