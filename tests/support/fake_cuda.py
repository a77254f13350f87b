"""A library that stands in for NVIDIA's driver (fake_cuda.c), compiled for the tests that use it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

NAME = "libcuda.so.1"


class FakeCuda:
    """The library: what it was asked, and what is to fail.

    Attributes:
        path: file of the library.
        library: as `Driver` takes it.
    """

    def __init__(self, folder: Path) -> None:
        """Compile it into a folder; skip the test where there is no C compiler."""
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("needs a C compiler (cc)")
        self.path = folder / NAME
        command = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(self.path)]
        subprocess.run([*command, str(Path(__file__).with_name("fake_cuda.c"))], check=True)
        self.library = ctypes.CDLL(str(self.path))
        self.library.fake_log.restype = ctypes.c_char_p

    def take(self) -> list[str]:
        """Return the lines of its log, and begin a new one."""
        lines = self.library.fake_log().decode().splitlines()
        self.library.fake_clear()
        return lines

    def expect(self, sizes: list[int]) -> None:
        """Name the sizes of the parameters of the launches to come."""
        self.library.fake_expect((ctypes.c_int * len(sizes))(*sizes), len(sizes))

    def fail(self, name: str, code: int) -> None:
        """Let a function fail; no name: all succeed."""
        self.library.fake_fail(name.encode(), code)
