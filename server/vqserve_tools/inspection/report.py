"""A codebook in numbers, as a program gets them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vqserve_tools.inspection.codes import Codes
from vqserve_tools.inspection.fit import Fit

# Raised when a field changes its meaning or goes; new ones may come.
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Euclidean norms of the codes."""

    min: float
    median: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Euclidean distances from codes to their nearest other one, of its codebook.

    Attributes:
        min, median, max: of the distances.
        codes: how many were measured: all, unless that takes too long.
    """

    min: float
    median: float
    max: float
    codes: int


@dataclass(frozen=True, kw_only=True)
class CodeFigures:
    """The codes of one codebook, or of all stages'.

    Attributes:
        norms: of the code rows, as decode gives them.
        neighbours: None where there is no other code. Cosine codes are scaled to length one.
        duplicates: codes that equal an earlier one of their codebook: encode never gives them.
    """

    norms: Norms
    neighbours: Neighbours | None
    duplicates: int

    @classmethod
    def of(cls, measured: Sequence[Codes]) -> CodeFigures:
        """Return the figures of codebooks together, at least one."""
        norms = np.concatenate([codes.norms for codes in measured])
        distances = np.concatenate([codes.neighbours for codes in measured])
        distances = distances[np.isfinite(distances)]
        return cls(
            norms=Norms(min=float(norms.min()), median=float(np.median(norms)), max=float(norms.max())),
            neighbours=Neighbours(
                min=float(distances.min()),
                median=float(np.median(distances)),
                max=float(distances.max()),
                codes=distances.size,
            )
            if distances.size
            else None,
            duplicates=sum(codes.duplicates for codes in measured),
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """A codebook in numbers.

    Attributes:
        kind: "vq", "ema" and so on.
        digest: lower-case hexadecimal SHA-256 of what encode and decode read.
        num_codes: K (of each stage, if there are several).
        vocab_size: indices lie in [0, vocab_size).
        num_quantizers: indices per token.
        layout: of latents where a call does not say; None: by the number of axes.
        input_dim: channels that encode takes.
        code_dim: D.
        output_dim: channels that decode returns.
        dtype: element type of the codebook.
        arguments: of the quantizer's constructor.
        provenance: where the codebook came from, as its writer told it.
        norms: of the codes, those of all stages; None where codes are computed and not kept.
        neighbours: likewise; None too where there is no other code.
        duplicates: codes that equal an earlier one of their stage: encode never gives them.
        stages: of each of a token's indices' codebooks; empty unless there are several.
        dead_looking: codes that training seems never to have moved or met; None where nothing tells.
        dead_looking_means: what `dead_looking` counts.
        search: the search backend chosen, by device type.
        fit: how the codebook fits latents; None where there are none.
    """

    kind: str
    digest: str
    num_codes: int
    vocab_size: int
    num_quantizers: int
    layout: str | None
    input_dim: int
    code_dim: int
    output_dim: int
    dtype: str
    arguments: Mapping[str, object]
    provenance: Mapping[str, object]
    norms: Norms | None
    neighbours: Neighbours | None
    duplicates: int
    stages: tuple[CodeFigures, ...]
    dead_looking: int | None
    dead_looking_means: str
    search: Mapping[str, str]
    fit: Fit | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; None stands for what is not finite."""
        plain: dict[str, Any] = _plain({"format": FORMAT, **asdict(self)})
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
