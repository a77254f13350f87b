"""All that is measured of a codebook."""

from __future__ import annotations

from dataclasses import dataclass

from vqserve_server.codebooks import Codebook
from vqserve_server.device import select_device
from vqserve_server.quantizers import freeze
from vqserve_tools.inspection.codes import Codes, codebooks_of, count_dead_looking, measure_codes
from vqserve_tools.inspection.fit import FitTally, check_latents, measure_fit
from vqserve_tools.inspection.report import CodeFigures, Report
from vqserve_tools.latent_file import LatentRows


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
