"""The remap of full code ids to positions in the list of those in use: tables, hashes, and the module that has one."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vqserve.errors import IndexOutOfRange, InvalidArgument, InvalidDtype, InvalidOption, InvalidShape
from vqserve_server.quantizers.tensors import check_integers, check_size, checked_indices

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
    try:
        return checked_indices(used, num_codes)
    except IndexOutOfRange as error:
        raise error.with_fields(array="remap", hint="") from None


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
    # torch's int64 is signed: bits = 2 * half + low, and neither half nor low is negative.
    half, low = _shift_right(bits, 1), bits & 1
    return ((half % num_used) * 2 + low) % num_used


def _shift_right(x: Tensor, by: int) -> Tensor:
    # torch's >> copies the sign bit.
    return (x >> by) & ((1 << (64 - by)) - 1)


_LOG = logging.getLogger(__name__)


class RemappedModule(nn.Module):
    """K codes; `used` lists the codes in use. Without a remap an index is the full id.

    The table from ids to positions is made from `used` in every call, K entries beside the N of the call: it cannot
    go stale when `used` is loaded, moved or changed in place.

    Attributes:
        num_codes: K.
        remap: as given; where a state dict brought the first remap, the ids as an array. None without a remap.
        used: (U,) int64 buffer of the full ids in use; None without a remap, and then no key of the state dict.
        re_embed: U with a remap, else K, and one more under unknown_index="extra".
        unknown_index: what an id that is not in `used` is reported as: "random", the extra id, or the integer given.
    """

    used: Tensor | None
    re_embed: int
    unknown_index: UnknownIndex

    def __init__(self, num_codes: int, remap: Remap | None, unknown_index: UnknownIndex) -> None:
        super().__init__()
        check_size("num_codes", num_codes)
        self.num_codes = int(num_codes)
        self.remap: Remap | None = remap
        self._unknown = checked_unknown(unknown_index)
        self.register_buffer("used", None if remap is None else read_used(remap, self.num_codes))
        self._count_used()
        if remap is not None:
            _LOG.info("remap of %d codes: re_embed %d, unknown_index %s", num_codes, self.re_embed, self.unknown_index)

    @property
    def decodable(self) -> int:
        """The exclusive bound of the indices that decode accepts: re_embed, or K without a remap."""
        return self.num_codes if self.used is None else self.re_embed

    @property
    def vocab_size(self) -> int:
        """The exclusive bound of the indices that are ever reported or decoded, a sentinel included."""
        if self.used is not None and isinstance(self.unknown_index, int):
            return max(self.re_embed, self.unknown_index + 1)
        return self.decodable

    @property
    def given_unknown_index(self) -> UnknownIndex:
        """The constructor's `unknown_index`: "extra" where the attribute is the extra id."""
        in_use = self.num_codes if self.used is None else self.used.numel()
        return "extra" if self.re_embed == in_use + 1 else self.unknown_index

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Return the first position in `used` of every full id; without a remap, the ids.

        Args:
            inds: full ids in [0, K), any shape and integer type; not changed.

        Returns:
            int64 of the same shape. An id that is not in `used` becomes unknown_index: the extra id, the integer, or
            under "random" a fresh uniform position from torch's global generator.

        Raises:
            InvalidDtype: the ids are not integers.
            IndexOutOfRange: one is out of range; names the position.
        """
        return self._sampled(checked_indices(inds, self.num_codes))

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Return the full id at every position in `used`; without a remap, the positions.

        Args:
            inds: positions in [0, decodable), any shape and integer type; not changed. The extra id stands for
                `used[0]`.

        Returns:
            int64 of the same shape.

        Raises:
            InvalidDtype: the positions are not integers.
            IndexOutOfRange: one is out of range (a sentinel may be); names the position.
        """
        positions = checked_indices(inds, self.decodable)
        if self.used is None:
            return positions
        return self.used[torch.where(positions < self.used.numel(), positions, 0)]

    def reported(self, ids: Tensor) -> Tensor:
        """Return what encode reports for full ids (N,) int64 in [0, K): `remap_to_used` without chance.

        Under "random" an id that is not in `used` becomes splitmix64(id) mod U, the same on every device.
        """
        if self.used is None:
            return ids
        known = first_positions(self.used, self.num_codes)[ids]
        if isinstance(self.unknown_index, int):
            stand_in = torch.full_like(ids, self.unknown_index)
        else:
            stand_in = hashed_positions(ids, self.used.numel())
        return torch.where(known < self.used.numel(), known, stand_in)

    def drop_remap(self) -> None:
        """Remove the remap: full ids are reported from now on."""
        self.used = self.remap = None
        self._count_used()

    def _sampled(self, ids: Tensor) -> Tensor:
        # The ids that forward reports. As in the original, each unknown id in order takes one number of the CPU's
        # generator.
        if self.used is None or self.unknown_index != "random":
            return self.reported(ids)
        known = first_positions(self.used, self.num_codes)[ids]
        is_unknown = known == self.used.numel()
        draws = torch.randint(0, self.re_embed, (int(is_unknown.sum()),), device="cpu")
        known[is_unknown] = draws.to(known.device)
        return known

    def _count_used(self) -> None:
        # What follows from the number of ids in use.
        is_extra = self._unknown == "extra"
        in_use = self.num_codes if self.used is None else self.used.numel()
        self.re_embed = in_use + is_extra
        self.unknown_index = in_use if is_extra else self._unknown

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The module takes the checkpoint's remap, also if it was built without one or with one of another length.
        given = state_dict.get(f"{prefix}used")
        if isinstance(given, Tensor):
            try:
                used = checked_used(given, self.num_codes)
            except InvalidArgument as error:
                error_msgs: list[str] = args[-1]
                error_msgs.append(f"{prefix}used: {error}")
                return
            # A copy: torch copies into the buffer in place.
            self.used = torch.empty_like(used, device=self._used_device())
            if self.remap is None:
                self.remap = used.cpu().numpy().copy()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.used is not None:
            # load_state_dict(assign=True) keeps the checkpoint's integer type.
            self.used = self.used.to(torch.int64)
        self._count_used()

    def _used_device(self) -> torch.device:
        return next(self.parameters()).device if self.used is None else self.used.device
