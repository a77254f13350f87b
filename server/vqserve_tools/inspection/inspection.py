"""All that is measured of a codebook."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vqserve_server.codebooks import Codebook
from vqserve_server.device import select_device
from vqserve_server.quantizers import freeze
from vqserve_tools.inspection.codes import Codes, codebooks_of, count_dead_looking, measure_codes
from vqserve_tools.inspection.fit import Fit, FitTally, check_latents, measure_fit
from vqserve_tools.latent_file import LatentRows

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


@dataclass(frozen=True, eq=False)
class Inspection:
    """A report and what was counted for it.

    Attributes:
        report: the figures.
        codes: of each codebook, one for each of a token's indices; empty where codes are computed.
        tally: of the tokens; None without latents.
    """

    report: Report
    codes: list[Codes]
    tally: FitTally | None


def inspect(codebook: Codebook, latents: LatentRows | None = None, *, progress: bool = False) -> Inspection:
    """Measure a codebook; memory is bounded by a few times the codebook's own, however many latents there are.

    Args:
        codebook: of a file.
        latents: to encode and decode, on the preferred device; None: only the codebook itself is looked at.
        progress: tell on stderr how far it is.

    Raises:
        CodebookError: the codebook cannot be served.
        InvalidShape: the latents have another channel count, or no tokens.
        NonFiniteLatents: they hold NaN or infinity, or leave float32's range on their way to the codes.
    """
    quantizer = codebook.quantizer
    if latents is not None:
        check_latents(latents, quantizer)
    device = select_device("auto")
    frozen = {name: freeze(quantizer, device=name) for name in sorted({"cpu", device.type})}
    form = frozen[device.type]
    codes = measure_codes(codebooks_of(quantizer), progress=progress)
    figures = CodeFigures.of(codes) if codes else None
    dead_looking, means = count_dead_looking(codebook)
    tally = None if latents is None else FitTally(quantizer, form)
    report = Report(
        kind=codebook.kind,
        digest=codebook.digest,
        num_codes=form.num_codes,
        vocab_size=form.vocab_size,
        num_quantizers=form.num_quantizers,
        layout=None if quantizer.layout is None else str(quantizer.layout),
        input_dim=form.input_dim,
        code_dim=form.code_dim,
        output_dim=form.output_dim,
        dtype=str(form.weight_dtype).removeprefix("torch."),
        arguments=dict(codebook.arguments),
        provenance=dict(codebook.provenance),
        norms=None if figures is None else figures.norms,
        neighbours=None if figures is None else figures.neighbours,
        duplicates=0 if figures is None else figures.duplicates,
        stages=tuple(CodeFigures.of([one]) for one in codes) if len(codes) > 1 else (),
        dead_looking=dead_looking,
        dead_looking_means=means,
        search={name: one.search_backend for name, one in frozen.items()},
        fit=None if tally is None or latents is None else measure_fit(tally, latents, progress=progress),
    )
    return Inspection(report, codes, tally)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
