"""What every quantizer is: latents to indices and back, with sizes that a caller can rely on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqserve.layout import Layout, parse_layout
from vqserve_server.quantizers.frozen import FrozenQuantizer


class Quantizer(nn.Module, ABC):
    """Latents in, indices out, and back.

    Attributes:
        kind: the name of the class in files and on the wire.
        num_codes: K, the indices that encode can give (of each stage, if there are several).
        input_dim: channels that encode takes.
        code_dim: D, the width of a code.
        output_dim: channels that decode returns.
        num_quantizers: indices per token: 1 but for residual quantizers.
    """

    kind: ClassVar[str]
    num_codes: int
    input_dim: int
    code_dim: int
    output_dim: int
    num_quantizers: int = 1
    _layout: Layout | None = None

    @property
    def layout(self) -> Layout | None:
        """The layout of latents of 3 to 5 axes; None: channels first for 4 and 5 axes, last for 3.

        It may be set, to a layout or its name.

        Raises:
            InvalidOption: there is no layout of that name.
        """
        return self._layout

    @layout.setter
    def layout(self, layout: str | None) -> None:
        self._layout = parse_layout(layout)

    @property
    def decodable(self) -> int:
        """The exclusive bound of the indices that decode accepts."""
        return self.num_codes

    @property
    def vocab_size(self) -> int:
        """The exclusive bound of the indices that are ever reported or decoded."""
        return self.decodable

    @property
    @abstractmethod
    def weight_dtype(self) -> torch.dtype:
        """The type that decode returns."""

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """Return the indices of latents, exact and the same on every device: int64, no gradient."""

    @abstractmethod
    def decode(self, indices: Tensor) -> Tensor:
        """Return the latents of indices, of the weight's type, no gradient."""

    @abstractmethod
    def frozen(self, device: torch.device, search: str = "auto") -> FrozenQuantizer:
        """Return the form that serves, of the weights as they are now; `freeze` calls it, on a copy on the CPU.

        Raises:
            InvalidOption: the search backend does not run on the device.
            CodebookError: a weight is NaN or infinite, or decoding leaves float32's range.
        """

    def sizes(self, device: torch.device) -> dict[str, Any]:
        """Return what the form that serves on a device says of itself: the attributes of `FrozenQuantizer`."""
        return {
            "num_codes": self.num_codes,
            "vocab_size": self.vocab_size,
            "decodable": self.decodable,
            "input_dim": self.input_dim,
            "code_dim": self.code_dim,
            "output_dim": self.output_dim,
            "weight_dtype": self.weight_dtype,
            "device": device,
            "num_quantizers": self.num_quantizers,
        }

    def get_trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over all parameters in the order of registration, those that need no gradient included."""
        return self.parameters()
