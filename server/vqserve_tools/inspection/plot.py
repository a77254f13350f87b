"""Plots of an inspection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve.codebook_info import of_stages
from vqserve.errors import InvalidOption
from vqserve_tools.inspection.error import ErrorTally
from vqserve_tools.inspection.fit import UsageTally
from vqserve_tools.inspection.inspection import Inspection
from vqserve_tools.output import check_output

_BINS = 60
Floats = npt.NDArray[np.float64]


def check_plot(path: Path, *, force: bool, sources: Sequence[Path | None] = ()) -> None:
    """Check, before the measurements, that a plot can be drawn and written.

    Args:
        path: PNG file to write.
        force: whether an existing file may be replaced.
        sources: files that the inspection reads.

    Raises:
        InvalidOption: the file exists or is a source, its folder does not exist, or matplotlib is missing.
        PermissionError: this user cannot write into the folder.
    """
    check_output(path, force=force, sources=sources)
    try:
        import matplotlib.figure  # noqa: F401, PLC0415
    except ImportError:
        raise InvalidOption(f"{path.name} cannot be drawn without matplotlib: pip install 'vqserve[plot]'") from None


def draw(inspection: Inspection, path: Path) -> None:
    """Draw norms and distances of the codes and, with latents, usage and errors.

    Args:
        inspection: inspection of a codebook with stored codes, or with latents.
        path: PNG file to write or replace.

    Raises:
        InvalidOption: there is nothing to draw.
        OSError: the file cannot be written.
    """
    # pyplot would open windows and change global state.
    from matplotlib.figure import Figure  # noqa: PLC0415

    report, tally = inspection.report, inspection.tally
    panels: list[Callable[[Any], None]] = []
    if inspection.codes:
        norms = [codes.norms for codes in inspection.codes]
        distances = [codes.neighbours for codes in inspection.codes]
        panels.append(partial(_draw_histogram, values=norms, title="norms of the codes", of="norm", counted="codes"))
        title = "from a code to the nearest other"
        panels.append(partial(_draw_histogram, values=distances, title=title, of="distance", counted="codes"))
    if tally is not None:
        panels.append(partial(_draw_usage, usage=tally.usage, num_codes=report.num_codes))
        if tally.error is not None:
            panels.append(partial(_draw_error, error=tally.error))
    if not panels:
        raise InvalidOption(f"codes of kind {report.kind} are computed: without latents there is nothing to draw")
    columns, rows = min(2, len(panels)), (len(panels) + 1) // 2
    figure: Any = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    # The title has no text from the file: matplotlib would interpret it as markup.
    codes = of_stages(report.num_quantizers, report.num_codes) if report.stages else report.num_codes
    figure.suptitle(f"{report.kind}, {codes} x {report.code_dim}, digest {report.digest[:16]}")
    for place, paint in enumerate(panels, 1):
        paint(figure.add_subplot(rows, columns, place))
    figure.savefig(path, dpi=110, format="png")


def _draw_histogram(
    axes: Any,
    *,
    values: Sequence[Floats],
    title: str,
    of: str,
    counted: str,
    weights: npt.NDArray[np.int64] | None = None,
) -> None:
    """Draw a histogram of values; several stages are stacked, each in its own colour."""
    axes.set(title=title, xlabel=of, ylabel=counted)
    axes.grid(alpha=0.3)
    finite = [one[np.isfinite(one)] for one in values]
    together = np.concatenate(finite)
    if together.size == 0:
        return
    low, high = float(together.min()), float(together.max())
    # With a linear scale, nearly all norms of a codebook with norms from 0.1 to 4000 would be in the first bin.
    if low > 0 and high > 100 * np.median(together):
        axes.set_xscale("log")
        edges = np.geomspace(low, high, _BINS + 1)
    else:
        edges = np.linspace(low, high, _BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    if len(finite) == 1:
        axes.hist(together, bins=edges, weights=weights)
        return
    labels = [_stage_label(number, len(finite)) for number in range(len(finite))]
    colours = [_stage_colour(number, len(finite)) for number in range(len(finite))]
    axes.hist(finite, bins=edges, stacked=True, color=colours, label=labels)
    axes.legend()


def _stage_colour(number: int, count: int) -> Any:
    from matplotlib import colormaps  # noqa: PLC0415

    return colormaps["viridis"](number / max(1, count - 1))


def _stage_label(number: int, count: int) -> str:
    """Return the label of the first and of the last stage; matplotlib omits the others, which begin with "_"."""
    return f"index {number + 1}" if number in (0, count - 1) and count > 1 else "_"


def _draw_usage(axes: Any, *, usage: list[UsageTally], num_codes: int) -> None:
    for number, tally in enumerate(usage):
        counts = np.sort(tally.counts())[::-1]
        colour, label = _stage_colour(number, len(usage)), _stage_label(number, len(usage))
        axes.plot(np.arange(1, counts.size + 1), counts, color=colour, label=label)
    axes.set(title="usage", xlabel="code, the most used first", ylabel="tokens", xscale="log", yscale="log")
    axes.axvline(num_codes, color="grey", linestyle=":", label="all codes")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_error(axes: Any, *, error: ErrorTally) -> None:
    values, counts = error.distances.values_and_counts()
    title = "from a token to its code"
    is_finite = np.isfinite(values)
    _draw_histogram(axes, values=[values], weights=counts[is_finite], title=title, of="distance", counted="tokens")
