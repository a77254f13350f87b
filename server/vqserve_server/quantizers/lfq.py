"""Lookup-free quantization: the signs of the channels are the index's bits."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import numpy as np

from vqserve_server.errors import InvalidOption
from vqserve_server.quantizers.checks import check_size
from vqserve_server.quantizers.frozen_scalar import Channel
from vqserve_server.quantizers.scalar import ScalarQuantizer
from vqserve_server.search.rounding import round_inverse_root

BitOrder = Literal["big", "little"]
MAX_BITS = 32


class LookupFreeQuantizer(ScalarQuantizer):
    """Bit k of the index is 1 where channel k is greater than zero: zero, of either sign, is 0.

    Yu et al. 2023, arXiv:2310.05737; as binary spherical quantization the same on the unit sphere, Zhao et al. 2024,
    arXiv:2406.07548. See `ScalarQuantizer` for the state.

    Attributes:
        bits: D.
        bit_order: "big": the first channel is the most significant bit (lucidrains); "little": the least
            (Open-MAGVIT2).
        spherical: whether codes are +-1/sqrt(D), rounded once to float32, and not +-1.
    """

    kind: ClassVar[str] = "lfq"

    def __init__(
        self,
        bits: int,
        bit_order: BitOrder,
        spherical: bool = False,
        *,
        input_dim: int | None = None,
        output_dim: int | None = None,
    ) -> None:
        """Make the quantizer.

        Args:
            bits: D, the channels and bits, at most 32.
            bit_order: "big" or "little"; trained models differ.
            spherical: codes of length one.
            input_dim: see `ScalarQuantizer`.
            output_dim: see `ScalarQuantizer`.

        Raises:
            InvalidOption: an argument has none of its values.
        """
        check_size("bits", bits)
        if bits > MAX_BITS:
            raise InvalidOption(f"{bits} bits are more than an index of {MAX_BITS} can hold")
        if bit_order not in get_args(BitOrder):
            raise InvalidOption(f"bit_order must be one of {', '.join(get_args(BitOrder))}, not {bit_order!r}")
        super().__init__([2] * bits, input_dim, output_dim)
        self.bits = int(bits)
        self.bit_order = bit_order
        self.spherical = bool(spherical)

    def channels(self) -> list[Channel]:
        """Return what becomes of each of the D channels."""
        value = round_inverse_root(self.bits) if self.spherical else np.float32(1.0)
        values = np.array([-value, value], np.float32)
        places = range(self.bits) if self.bit_order == "little" else reversed(range(self.bits))
        return [Channel(np.zeros(1), values, 1 << place) for place in places]
