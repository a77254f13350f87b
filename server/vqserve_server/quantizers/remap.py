"""The remap of full code ids to positions in the list of those in use: tables and hashes, no state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve_server.errors import IndexOutOfRange, InvalidDtype, InvalidOption, InvalidShape
from vqserve_server.quantizers.checks import check_integers, checked_indices

Remap: TypeAlias = str | os.PathLike[str] | npt.ArrayLike | Tensor
UnknownIndex: TypeAlias = str | int

# The constants of splitmix64 as int64 bit patterns: torch multiplies and adds int64 modulo 2^64.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def read_used(remap: Remap, num_codes: int) -> Tensor:
    """Return the ids of a remap, a new (U,) int64 tensor on the CPU.

    Args:
        remap: path of a .npy file, or an integer array.
        num_codes: K.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no .npy file, or holds pickled objects, which are never loaded.
        InvalidDtype: the ids are not integers.
        InvalidShape: they are not 1-D, or none.
        IndexOutOfRange: one is not in [0, num_codes).
    """
    if isinstance(remap, Tensor):
        return checked_used(remap.detach().cpu(), num_codes).clone()
    array = np.load(Path(remap), allow_pickle=False) if isinstance(remap, str | os.PathLike) else np.asarray(remap)
    if not isinstance(array, np.ndarray):
        array.close()
        raise InvalidOption("a remap file must hold one array (.npy), not an archive of them (.npz)")
    if array.dtype.kind not in "iu":
        raise InvalidDtype(f"a remap must hold integers, not {array.dtype}")
    # numpy compares integers by value, so that a large uint64 does not wrap on its way to int64.
    if array.size and not (int(array.min()) >= 0 and int(array.max()) < num_codes):
        raise IndexOutOfRange(f"a remap must hold ids in [0, {num_codes}), not {array.min()} to {array.max()}")
    return checked_used(torch.from_numpy(array.astype(np.int64)), num_codes)


def checked_used(used: Tensor, num_codes: int) -> Tensor:
    """Return a remap's ids as int64, on their device.

    Raises:
        InvalidDtype: the ids are not integers.
        InvalidShape: they are not 1-D, or none.
        IndexOutOfRange: one is not in [0, num_codes).
    """
    check_integers(used)
    if used.ndim != 1 or used.numel() == 0:
        raise InvalidShape(f"a remap must be 1-D and not empty, not of shape {tuple(used.shape)}")
    return checked_indices(used, num_codes)


def checked_unknown(unknown_index: UnknownIndex) -> UnknownIndex:
    """Return the value if it is "random", "extra" or an integer.

    Raises:
        InvalidOption: for anything else, bool included.
    """
    is_integer = isinstance(unknown_index, int) and not isinstance(unknown_index, bool)
    if is_integer and not -(2**63) <= int(unknown_index) < 2**63:
        raise InvalidOption(f"unknown_index must fit 64 bits, {unknown_index} does not")
    if is_integer or (isinstance(unknown_index, str) and unknown_index in ("random", "extra")):
        return unknown_index
    raise InvalidOption(f"unknown_index must be 'random', 'extra' or an integer, not {unknown_index!r}")


def first_positions(used: Tensor, num_codes: int) -> Tensor:
    """Return a table (K,) int64: the first position of every full id in used (U,), and U for those not in it."""
    positions = torch.arange(used.numel(), device=used.device)
    absent = torch.full((num_codes,), used.numel(), dtype=torch.int64, device=used.device)
    return absent.scatter_reduce_(0, used, positions, "amin")


def splitmix64(ids: Tensor) -> Tensor:
    """Return the first output of the splitmix64 generator seeded with each id, as int64 bit patterns.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014, with the constants of Vigna's
    public-domain code: splitmix64(0) = 0xE220A8397B1DCDAF. The same on every device, since it is integer arithmetic.
    """
    x = ids.to(torch.int64) + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def hashed_positions(ids: Tensor, num_used: int) -> Tensor:
    """Return splitmix64(id) mod U in unsigned 64-bit arithmetic: the fixed stand-in of ids that are not in use."""
    bits = splitmix64(ids)
    # torch's int64 is signed: bits = 2 * half + low, both of which are not negative.
    half, low = _shift_right(bits, 1), bits & 1
    return ((half % num_used) * 2 + low) % num_used


def _shift_right(x: Tensor, by: int) -> Tensor:
    # torch's >> copies the sign bit.
    return (x >> by) & ((1 << (64 - by)) - 1)
