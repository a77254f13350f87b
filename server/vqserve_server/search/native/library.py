"""The compiled library: where it is, which of its instruction sets runs here, and its structures."""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_PATH = Path(__file__).with_name("libscan.so")


class CodebookStruct(ctypes.Structure):
    """A prepared codebook; scan.c says what the fields are."""

    _fields_ = (
        ("num_codes", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("panels", ctypes.c_void_p),
        ("error_slope", ctypes.c_void_p),
        ("error_base", ctypes.c_void_p),
        ("boxes", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("longest_row", ctypes.c_float),
        ("codes", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("wide_slope", ctypes.c_void_p),
        ("wide_base", ctypes.c_void_p),
        ("id", ctypes.c_void_p),
    )


class RowsStruct(ctypes.Structure):
    """The rows of one call; scan.c says what the fields are."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("narrow", ctypes.c_void_p),
        ("wide", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("home", ctypes.c_void_p),
        ("winner", ctypes.c_void_p),
    )


class OpenStruct(ctypes.Structure):
    """What one call leaves undecided; scan.c says what the fields are."""

    _fields_ = (
        ("capacity", ctypes.c_int64),
        ("pairs", ctypes.c_int64),
        ("pair_row", ctypes.c_void_p),
        ("pair_code", ctypes.c_void_p),
        ("rescan_row", ctypes.c_void_p),
        ("rescans", ctypes.c_int64),
        ("rechecked", ctypes.c_int64),
        ("expanded", ctypes.c_int64),
    )


class Library:
    """The functions for one instruction set."""

    def __init__(self, library: ctypes.CDLL, level: str) -> None:
        self.level = level
        self._scan = getattr(library, f"vq_scan_{level}")
        self._scan.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self._scan.restype = ctypes.c_int64
        panel_width = getattr(library, f"vq_panel_width_{level}")
        panel_width.restype = ctypes.c_int64
        self.panel_width: int = panel_width()

    def scan(self, book: CodebookStruct, rows: RowsStruct, left_open: OpenStruct) -> None:
        """Search; without the interpreter's lock.

        Raises:
            MemoryError: there is none for a few rows.
        """
        if self._scan(ctypes.byref(book), ctypes.byref(rows), ctypes.byref(left_open)):
            raise MemoryError("no memory for a search")


@functools.cache
def levels() -> tuple[str, ...]:
    """Return the instruction sets that this processor runs, best first; none where the library was not built."""
    if not _PATH.exists():
        logger.warning("the compiled search was not built for this platform: torch searches on the CPU, more slowly")
        return ()
    if platform.machine() != "x86_64":
        return ("default",)
    known = ("avx512", "avx2", "default")
    # Torch's own answer, so that its ATEN_CPU_CAPABILITY lowers both.
    best = torch.backends.cpu.get_cpu_capability().lower()
    return known[known.index(best) :] if best in known else ("default",)


@functools.cache
def load(level: str) -> Library:
    """Return the functions for one of `levels()`."""
    return Library(ctypes.CDLL(str(_PATH)), level)
