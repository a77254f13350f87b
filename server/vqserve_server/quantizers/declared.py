"""What a codebook file holds of a kind of quantizer: its arguments and tensors, without the class that computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from vqserve_server.quantizers.arguments import Argument, written_arguments
from vqserve_server.search.searcher import Objective

Metric: TypeAlias = Literal["l2", "cosine", "dot"]
CodeSpace: TypeAlias = Literal["latents", "directions", "bounded latents"]
Tensors: TypeAlias = Mapping[str, npt.NDArray[Any]]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

# Names of tensors that several kinds have.
WEIGHT = "embedding.weight"
NORM = "embedding.parametrizations.weight.original0"
DIRECTION = "embedding.parametrizations.weight.original1"
USED = "used"


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainCodebook:
    """One codebook without projections and remap, as numpy arrays: encode is one search, and decode one lookup.

    Attributes:
        codes: (K, D) float32 or float64, which are searched.
        objective: what the winning code minimises or maximises.
        bias: (K,) of the codes' type, added to the scores of DOT; None: zero.
        code_rows: (K, O), which are decoded; the same array as `codes` where they are the same.
        cluster_sizes: (K,) moving average of tokens per batch and code; None: the kind has no average.
        space: the space in which codes and latents are compared.
        initial_bound: b if the constructor draws codes within [-b, b]; None: initial values have no bound.
    """

    codes: npt.NDArray[np.floating[Any]]
    code_rows: npt.NDArray[np.floating[Any]]
    objective: Objective = Objective.L2
    bias: npt.NDArray[np.floating[Any]] | None = None
    cluster_sizes: npt.NDArray[np.floating[Any]] | None = None
    space: CodeSpace = "latents"
    initial_bound: float | None = None


class Declared:
    """A kind of quantizer as files hold it.

    Attributes:
        kind: the name of the class in files and on the wire.
        arguments: the constructor's arguments that a file holds, `layout` included.
        training_tensors: names in the state dict that neither encode nor decode reads.
        metric: how codes are searched; None: not by one metric that all quantizers of the class share.
        is_approximate: whether codes approximate latents, so that the distance between the two is an error.
    """

    kind: ClassVar[str]
    arguments: ClassVar[Mapping[str, Argument]]
    training_tensors: ClassVar[frozenset[str]] = frozenset()
    metric: ClassVar[Metric | None] = None
    is_approximate: bool = True

    @classmethod
    def canonical_arguments(cls, arguments: Mapping[str, object]) -> dict[str, object]:
        """Return checked arguments in the form that files and digests have, where a value can be given in several."""
        return dict(arguments)

    @classmethod
    def served_arguments(cls, arguments: Mapping[str, object], *, remapped: bool) -> dict[str, object]:
        """Return the arguments that encode and decode depend on, in the form that the digest has them.

        Args:
            arguments: all arguments, checked.
            remapped: whether there is a remap: without one `unknown_index` has no effect.
        """
        served = {
            name: value
            for name, value in written_arguments(cls.arguments, arguments).items()
            if cls.arguments[name].served
        }
        if not remapped:
            served.pop("unknown_index", None)
        return served


class PlainKind(Declared, ABC):
    """A kind of which some quantizers are plain codebooks, and all have tensors of shapes that the arguments give."""

    @classmethod
    @abstractmethod
    def tensor_shapes(cls, arguments: Mapping[str, Any]) -> Shapes:
        """Return the shape of every tensor but a remap, by name.

        Args:
            arguments: all arguments, checked.
        """

    @classmethod
    @abstractmethod
    def plain(cls, arguments: Mapping[str, Any], tensors: Tensors) -> PlainCodebook | None:
        """Return the codebook of checked arguments and tensors without a remap; None: it has projections.

        It is in the memory of the tensors if possible.
        """

    @classmethod
    def num_codes_of(cls, arguments: Mapping[str, Any]) -> int:
        """Return K."""
        [count] = (arguments[name] for name, argument in cls.arguments.items() if argument.attribute == "num_codes")
        return int(count)
