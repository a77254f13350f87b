"""A module whose reported indices may be positions in a list of the ids in use."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from vqserve_server.errors import InvalidArgument
from vqserve_server.quantizers.checks import check_size, checked_indices
from vqserve_server.quantizers.remap import (
    Remap,
    UnknownIndex,
    checked_unknown,
    checked_used,
    first_positions,
    hashed_positions,
    read_used,
)

_LOG = logging.getLogger(__name__)


class RemappedModule(nn.Module):
    """K codes, of which `used` lists those in use; without a remap an index is the full id.

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
        return self._drawn(checked_indices(inds, self.num_codes))

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
        """Report full ids from now on."""
        self.used = self.remap = None
        self._count_used()

    def _drawn(self, ids: Tensor) -> Tensor:
        # What forward reports. The draw is the original's, number for number: one from the CPU's generator for each
        # unknown id in order.
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
        # The checkpoint's remap is taken up whatever the module was built with: none, or one of another length.
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
