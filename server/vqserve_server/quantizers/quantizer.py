"""What every quantizer is: latents to indices and back, with sizes that a caller can rely on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vqserve.layout import Layout, parse_layout
from vqserve_server.quantizers.declared import CodeSpace, Declared
from vqserve_server.quantizers.inference.base import FrozenQuantizer
from vqserve_server.quantizers.projections import Projection

if TYPE_CHECKING:
    from vqserve_server.quantizers.abstract import AbstractQuantizer
    from vqserve_server.quantizers.inference.scalar import Channel
    from vqserve_server.quantizers.residual import ResidualPart


class Quantizer(Declared, nn.Module, ABC):
    """Latents in, indices out, and back.

    Attributes:
        kind, arguments, training_tensors, metric, is_approximate: see `Declared`.
        num_codes: K, the indices that encode can give (of each stage, if there are several; of the largest, where
            they differ).
        input_dim: channels that encode takes.
        code_dim: D, the width of a code.
        output_dim: channels that decode returns.
        num_quantizers: indices per token: 1 but for residual quantizers.
    """

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
    def stage_vocab_sizes(self) -> tuple[int, ...]:
        """The exclusive bound of each stage's indices where these differ; empty: `vocab_size` bounds all indices."""
        return ()

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
        """Return the attributes of the `FrozenQuantizer` that `freeze` would make for a device."""
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
            "stage_vocab_sizes": self.stage_vocab_sizes,
        }

    # What a codebook file needs.

    def current_arguments(self) -> dict[str, object]:
        """Return the arguments, not checked, by which the constructor makes a quantizer like this one as it is now."""
        return {name: attrgetter(argument.attribute or name)(self) for name, argument in self.arguments.items()}

    # What tools that inspect and compare codebooks need.

    @property
    def code_space(self) -> CodeSpace:
        """The space in which codes and latents are compared: unchanged, scaled to length one, or bounded."""
        return "latents"

    @property
    def num_reachable(self) -> int:
        """Number of different codes that encode can choose."""
        return self.num_codes

    @property
    def has_stages(self) -> bool:
        """Whether indices have an axis for a token's `num_quantizers` indices, in the place of the channels."""
        return False

    def chains(self) -> list[ResidualPart]:
        """Return the chains of codebooks that quantize residuals; [] for kinds with one index for each token."""
        return []

    def channels(self) -> list[Channel]:
        """Return the operation on each channel for kinds that compute their codes; [] for other kinds."""
        return []

    def codebooks(self) -> list[AbstractQuantizer]:
        """Return the codebooks, one for each of a token's indices; [] for kinds that compute their codes."""
        return []

    def input_projection(self) -> Projection | None:
        """Return weight (D, C) and bias (D,) of the projection before the search; None: there is none.

        Returns:
            Detached, in at least float32, finite.

        Raises:
            CodebookError: the projection holds NaN or infinity.
        """
        return None

    def output_projection(self) -> Projection | None:
        """Return weight (O, D) and bias (O,) of the projection behind the codes, likewise."""
        return None

    def bounded(self, z: Tensor) -> Tensor:
        """Return the values to compare with codes, (N, D) float64, from channels (N, D) after the input projection."""
        return z.double()

    def without_remap(self) -> tuple[Quantizer, Tensor | None]:
        """Return a quantizer that reports full ids, and the ids (U,) of the remap.

        Returns:
            This quantizer and None, where there is no remap, or where the codes outside it are never chosen.
        """
        return self, None

    def get_trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over all parameters in the order of registration, those that need no gradient included."""
        return self.parameters()
