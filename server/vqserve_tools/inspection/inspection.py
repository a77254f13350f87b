"""Inspection of a codebook: the measurements, and the report with all figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vqserve.codebook_info import of_stages
from vqserve_server.codebooks import Codebook
from vqserve_server.device import select_device
from vqserve_server.quantizers.inference.host import HostLookup
from vqserve_server.quantizers.inference.served import Served
from vqserve_tools.inspection.codes import Codes, count_dead_looking, measure_codes, stored_codes
from vqserve_tools.inspection.wrong_import import signs_of_wrong_import
from vqserve_tools.latents.rows import LatentRows

if TYPE_CHECKING:
    from vqserve_server.quantizers.inference.on_device import OnDevice
    from vqserve_tools.inspection.fit import Fit, FitTally

# Version of the JSON report: increased when a field is removed or changes its meaning, not when one is added.
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Euclidean norms of the codes."""

    min: float
    median: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Euclidean distances from codes to the nearest other code of their codebook.

    Attributes:
        min, median, max: figures of the distances.
        codes: number of measured codes: all codes, or a sample if all take too long.
    """

    min: float
    median: float
    max: float
    codes: int


@dataclass(frozen=True, kw_only=True)
class CodeFigures:
    """Figures of the codes of one codebook, or of all stages together.

    Attributes:
        norms: norms of the code rows that decode returns.
        neighbours: distances between codes, for cosine codes between their directions; None if there is only one code.
        duplicates: number of codes that equal an earlier code of their codebook; encode never returns them.
    """

    norms: Norms
    neighbours: Neighbours | None
    duplicates: int

    @classmethod
    def of(cls, measured: Sequence[Codes]) -> CodeFigures:
        """Return the figures of at least one codebook, taken together."""
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
class SavedStatistics:
    """Statistics in the file.

    Attributes:
        rows: number of tokens that they are about.
        error: mean squared error of a channel; None: the kind has none.
        source: what the latents were.
        used: number of used codes of each stage; of groups of neighbouring codes, if there are very many.
    """

    rows: int
    error: float | None
    source: str
    used: tuple[int, ...]

    @classmethod
    def of(cls, codebook: Codebook) -> SavedStatistics | None:
        """Return a summary of the statistics of a file; None if there are none."""
        saved = codebook.statistics
        if saved is None:
            return None
        stages = codebook.code_groups.stages
        used = tuple(int(np.count_nonzero(saved.usage[stage])) for stage in stages)
        return cls(rows=saved.rows, error=saved.error, source=saved.source, used=used)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All figures of a codebook.

    Attributes:
        kind: "vq", "ema" and so on.
        digest: lower-case hexadecimal SHA-256 of the data that encode and decode use.
        num_codes: number of codes K; of several stages, the largest.
        stage_vocab_sizes: number of codes of each stage, if the stages differ; else empty.
        vocab_size: indices lie in [0, vocab_size).
        num_quantizers: indices per token.
        layout: default layout of latents; None: it depends on the number of axes.
        input_dim: channels of the latents that encode takes.
        code_dim: width D of a code.
        output_dim: channels of the latents that decode returns.
        dtype: element type of the codebook.
        arguments: arguments of the quantizer's constructor.
        provenance: origin of the codebook, as written into its file.
        statistics: statistics in the file, for a server to compare its traffic with; None: there are none.
        norms: norms of the codes of all stages; None if codes are computed and not stored.
        neighbours: distances between the codes of all stages; None if there is only one code, or as for `norms`.
        duplicates: number of codes that equal an earlier code of their stage; encode never returns them.
        stages: figures of each stage; empty if there is only one.
        dead_looking: number of codes that training seems never to have used; None if unknown.
        dead_looking_means: criterion of `dead_looking`.
        search: chosen search backend, by device type.
        fit: fit to latents; None without latents.
        warnings: signs that the codebook was imported wrongly.
    """

    kind: str
    digest: str
    num_codes: int
    stage_vocab_sizes: tuple[int, ...]
    vocab_size: int
    num_quantizers: int
    layout: str | None
    input_dim: int
    code_dim: int
    output_dim: int
    dtype: str
    arguments: Mapping[str, object]
    provenance: Mapping[str, object]
    statistics: SavedStatistics | None
    norms: Norms | None
    neighbours: Neighbours | None
    duplicates: int
    stages: tuple[CodeFigures, ...]
    dead_looking: int | None
    dead_looking_means: str
    search: Mapping[str, str]
    fit: Fit | None
    warnings: tuple[str, ...]

    @property
    def codes(self) -> str:
        """Number of codes: "1024", "8 stages of 1024" or "1 stage of 4096 and 9 of 1024"."""
        if self.num_quantizers == 1:
            return str(self.num_codes)
        return of_stages(self.num_quantizers, self.num_codes, self.stage_vocab_sizes)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; None stands for a number that is not finite."""
        plain: dict[str, Any] = _plain({"format": FORMAT, **asdict(self)})
        return plain


@dataclass(frozen=True, eq=False)
class Inspection:
    """A report and the measurements behind it.

    Attributes:
        report: all figures.
        codes: measurements of each stage's codebook; empty if codes are computed.
        tally: counts over the tokens; None without latents.
    """

    report: Report
    codes: list[Codes]
    tally: FitTally | None


def inspect(codebook: Codebook, latents: LatentRows | None = None, *, progress: bool = False) -> Inspection:
    """Measure a codebook; the memory used is a few times that of the codebook, and independent of the latents.

    Args:
        codebook: codebook from a file.
        latents: latents to encode and decode, on the preferred device; None: only the codebook itself is measured.
        progress: whether to show progress on stderr.

    Raises:
        CodebookError: the codebook cannot be served.
        InvalidShape: the latents have another channel count, or no tokens.
        NonFiniteLatents: the latents hold NaN or infinity, or their projection overflows float32.
    """
    if latents is not None:
        from vqserve_tools.inspection.fit import check_latents  # noqa: PLC0415

        check_latents(latents, codebook.quantizer)
    device = select_device("auto")
    plain = _plain_form(codebook) if latents is None and device.type == "cpu" else None
    by_torch = {} if plain is not None else _forms_by_torch(codebook, sorted({"cpu", device.type}))
    forms: Mapping[str, Served] = by_torch if plain is None else {"cpu": plain}
    served = forms[device.type]
    stages = stored_codes(codebook)
    codes = measure_codes(stages, progress=progress)
    figures = CodeFigures.of(codes) if codes else None
    dead_looking, means = count_dead_looking(codebook, stages)
    tally = fit = None
    if latents is not None:
        tally, fit = _measured_fit(codebook, by_torch[device.type], latents, progress=progress)
    sizes = served.sizes
    report = Report(
        kind=codebook.kind,
        digest=codebook.digest,
        num_codes=sizes.num_codes,
        stage_vocab_sizes=sizes.stage_vocab_sizes,
        vocab_size=sizes.vocab_size,
        num_quantizers=sizes.num_quantizers,
        layout=codebook.state.layout,
        input_dim=sizes.input_dim,
        code_dim=sizes.code_dim,
        output_dim=sizes.output_dim,
        dtype=served.dtype.name,
        arguments=dict(codebook.arguments),
        provenance=dict(codebook.provenance),
        statistics=SavedStatistics.of(codebook),
        norms=None if figures is None else figures.norms,
        neighbours=None if figures is None else figures.neighbours,
        duplicates=0 if figures is None else figures.duplicates,
        stages=tuple(CodeFigures.of([one]) for one in codes) if len(codes) > 1 else (),
        dead_looking=dead_looking,
        dead_looking_means=means,
        search={name: one.search_backend for name, one in forms.items()},
        fit=fit,
        warnings=signs_of_wrong_import(stages, codes, dead_looking=dead_looking, fit=fit),
    )
    return Inspection(report, codes, tally)


def _plain_form(codebook: Codebook) -> Served | None:
    """Return what serves a plain codebook on the CPU, without torch."""
    plain = codebook.state.plain(shares_memory=True)
    return None if plain is None else HostLookup.of(plain)


def _forms_by_torch(codebook: Codebook, devices: Sequence[str]) -> dict[str, OnDevice]:
    from vqserve_server.quantizers.inference.base import freeze  # noqa: PLC0415
    from vqserve_server.quantizers.inference.on_device import OnDevice  # noqa: PLC0415

    return {name: OnDevice(freeze(codebook.quantizer, device=name)) for name in devices}


def _measured_fit(codebook: Codebook, form: OnDevice, latents: LatentRows, *, progress: bool) -> tuple[FitTally, Fit]:
    from vqserve_tools.inspection.fit import FitTally, measure_fit  # noqa: PLC0415

    tally = FitTally(codebook.quantizer, form.frozen)
    return tally, measure_fit(tally, latents, progress=progress)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
