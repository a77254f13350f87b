"""The compiled library: loading, choice of the instruction set, and structures."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
from pathlib import Path

from vqserve_server.event_log import ONCE, event

logger = logging.getLogger(__name__)

_PATH = Path(__file__).with_name("libsearch.so")
# The instruction sets beside "default", best first, and what /proc/cpuinfo lists for a processor that has them: the
# levels x86-64-v4 and x86-64-v3, for which they are compiled.
_AVX2 = frozenset(("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"))
_LEVELS = {"avx512": _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, "avx2": _AVX2}


class CodebookStruct(ctypes.Structure):
    """A prepared codebook; layout.h documents the fields."""

    _fields_ = (
        ("num_codes", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("vectors", ctypes.c_int64),
        ("panels", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("panel", ctypes.c_void_p),
        ("error_slope", ctypes.c_void_p),
        ("error_base", ctypes.c_void_p),
        ("box_groups", ctypes.c_int64),
        ("boxes", ctypes.c_void_p),
        ("outer_groups", ctypes.c_int64),
        ("outer", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("longest_row", ctypes.c_float),
        ("codes", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("wide_slope", ctypes.c_void_p),
        ("wide_base", ctypes.c_void_p),
        ("id", ctypes.c_void_p),
    )


class Library:
    """The functions for one instruction set.

    Attributes:
        search: vq_search of layout.h; it runs without the interpreter's lock, and returns how many winners are left
            undecided, as -1, or a negative number if there is no memory.
        lanes: codes that are compared at once.
    """

    def __init__(self, library: ctypes.CDLL, level: str) -> None:
        self.search = getattr(library, f"vq_search_{level}")
        self.search.argtypes = (
            ctypes.c_void_p,  # CodebookStruct
            ctypes.c_void_p,  # rows (n, dim), contiguous
            ctypes.c_int32,  # whether they are float64, not float32
            ctypes.c_int64,  # n
            ctypes.c_int32,  # threads
            ctypes.c_void_p,  # winners (n,) int64
            ctypes.c_void_p,  # two int64 to add to: rows that were rechecked, rows that float64 left open
        )
        self.search.restype = ctypes.c_int64
        self._panel_vectors = getattr(library, f"vq_panel_vectors_{level}")
        self._panel_vectors.restype = ctypes.c_int64
        lanes = getattr(library, f"vq_lanes_{level}")
        lanes.restype = ctypes.c_int64
        self.lanes: int = lanes()

    def panel_vectors(self, *, is_boxed: bool) -> int:
        """Return the number of vectors of codes in a panel."""
        vectors: int = self._panel_vectors(int(is_boxed))
        return vectors


@functools.cache
def why_unusable() -> str | None:
    """Return why the library cannot be used, which is logged once; None: it can."""
    try:
        if _PATH.exists():
            load("default")
            return None
        reason = "this installation has no compiled search: install a wheel for this platform, or build it with cc"
    except (OSError, AttributeError) as error:
        # Built for another platform, or by another version.
        reason = f"the compiled search cannot be loaded: {error}"
    logger.warning(event("search_not_compiled", slower="torch searches on the CPU", reason=reason), extra=ONCE)
    return reason


@functools.cache
def levels() -> tuple[str, ...]:
    """Return the instruction sets that this processor supports, best first; empty if the library cannot be used."""
    if why_unusable() is not None:
        return ()
    if platform.machine() != "x86_64":
        return ("default",)
    flags = _processor_flags()
    able = [*(level for level, needed in _LEVELS.items() if needed <= flags), "default"]
    # The variable lowers the level of torch and of this library.
    most = os.environ.get("ATEN_CPU_CAPABILITY", "").lower()
    return tuple(able[able.index(most) :] if most in able else able)


def _processor_flags() -> frozenset[str]:
    """Return what the first processor can do; the system leaves out what it does not let programs use."""
    try:
        with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(flags.partition(":")[2].split())


@functools.cache
def load(level: str) -> Library:
    """Return the functions of one instruction set of `levels()`."""
    return Library(ctypes.CDLL(str(_PATH)), level)
