"""Plots of an inspection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vqserve.errors import InvalidOption
from vqserve_tools.inspection.inspection import Inspection

if TYPE_CHECKING:
    from vqserve_tools.inspection.error import ErrorTally
    from vqserve_tools.inspection.fit import UsageTally

# Odd, so that equal values are in the middle of one bin.
_BINS = 61
# Half the width of an axis of equal values, as a part of their median.
_LEAST_SPREAD = 0.05
# Where the two codebooks of a comparison are drawn.
_SIDES = ("left", "right")
Floats = npt.NDArray[np.float64]


def draw(inspections: Sequence[tuple[str, Inspection]], path: Path) -> None:
    """Draw norms and distances of the codes and, with latents, usage and errors.

    Args:
        inspections: name and inspection of one codebook, or of two that are drawn side by side on the same axes; with
            stored codes, or with latents.
        path: PNG file to write or replace.

    Raises:
        InvalidOption: there is nothing to draw.
        OSError: the file cannot be written.
    """
    # pyplot would open windows and change global state.
    from matplotlib.figure import Figure  # noqa: PLC0415

    panels = [_panels(inspection) for _, inspection in inspections]
    titles = list(dict.fromkeys(title for one in panels for title in one))
    if not titles:
        kind = inspections[0][1].report.kind
        raise InvalidOption(f"codes of kind {kind} are computed: without latents there is nothing to draw")
    if len(inspections) == 1:
        columns, rows = min(2, len(titles)), (len(titles) + 1) // 2
    else:
        columns, rows = len(inspections), len(titles)
    figure: Any = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    figure.suptitle(
        "\n".join(
            _heading(one, f"{side}, {name}" if len(inspections) > 1 else "")
            for side, (name, one) in zip(_SIDES, inspections, strict=False)
        )
    )
    for row, title in enumerate(titles):
        first = None
        for column, one in enumerate(panels):
            place = row * columns + column + 1 if len(inspections) > 1 else row + 1
            axes = figure.add_subplot(rows, columns, place, sharex=first, sharey=first)
            axes.set_title(title if len(inspections) == 1 else f"{title}, {_SIDES[column]}")
            if title in one:
                one[title](axes)
            else:
                axes.text(0.5, 0.5, "none for this kind", transform=axes.transAxes, ha="center", va="center")
            first = first or axes
    figure.savefig(path, dpi=110, format="png")


def _heading(inspection: Inspection, name: str) -> str:
    report = inspection.report
    # Without text from the file, which matplotlib would interpret as markup; a name comes from the user.
    left = f"{name.replace('$', chr(92) + '$')}: " if name else ""
    return f"{left}{report.kind}, {report.codes} x {report.code_dim}, digest {report.digest[:16]}"


def _panels(inspection: Inspection) -> dict[str, Callable[[Any], None]]:
    """Return a function for each panel, by title; it draws into axes."""
    report, tally = inspection.report, inspection.tally
    panels: dict[str, Callable[[Any], None]] = {}
    if inspection.codes:
        for title, of, values in (
            ("norms of the codes", "norm", [codes.norms for codes in inspection.codes]),
            ("from a code to the nearest other", "distance", [codes.neighbours for codes in inspection.codes]),
        ):
            if len(values) > 1:
                panels[title] = partial(_draw_by_stage, values=values, of=of)
            else:
                panels[title] = partial(_draw_histogram, values=values[0], of=of, counted="codes")
    if tally is not None:
        panels["usage"] = partial(_draw_usage, usage=tally.usage, num_codes=report.num_codes)
        if tally.error is not None:
            panels["from a token to its code"] = partial(_draw_error, error=tally.error)
    return panels


def _draw_histogram(
    axes: Any, *, values: Floats, of: str, counted: str, weights: npt.NDArray[np.int64] | None = None
) -> None:
    axes.set(xlabel=of, ylabel=counted)
    axes.grid(alpha=0.3)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return
    low, high, middle = float(finite.min()), float(finite.max()), float(np.median(finite))
    # With a linear scale, nearly all norms of a codebook with norms from 0.1 to 4000 would be in the first bin.
    if low > 0 and high > 100 * middle:
        axes.set_xscale("log")
        edges = np.geomspace(low, high, _BINS + 1)
    else:
        # Norms that are 1 but for rounding, as those of cosine codes, would fill the axis as if they differed.
        room = _LEAST_SPREAD * middle or 0.5
        low, high = min(low, middle - room), max(high, middle + room)
        edges = np.linspace(low, high, _BINS + 1)
    axes.hist(finite, bins=edges, weights=weights)


def _draw_by_stage(axes: Any, *, values: Sequence[Floats], of: str) -> None:
    """Draw the median of each stage, and the range of 90 % of its codes; on a scale where a collapsed stage shows."""
    stages = np.arange(1, len(values) + 1)
    finite = [one[np.isfinite(one)] for one in values]
    low, middle, high = np.array([np.percentile(one, (5, 50, 95)) if one.size else [np.nan] * 3 for one in finite]).T
    axes.vlines(stages, low, high, linewidth=6, alpha=0.3, label="90 % of the codes")
    axes.plot(stages, middle, marker="o", markersize=3, label="median")
    largest = np.nanmax(high) if np.isfinite(high).any() else 0.0
    if largest > 0:
        # Linear near zero, so that a stage of equal codes is at the bottom and not left out. The linear part ends just
        # below the stages, or all of them would be in the uppermost part of the axis.
        axes.set_yscale("symlog", linthresh=max(1e-6 * largest, 0.1 * np.nanmin(low[low > 0], initial=largest)))
        axes.set_ylim(bottom=0)
    axes.set(xlabel="stage", ylabel=of)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
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
    axes.set(xlabel="code, the most used first", ylabel="tokens", xscale="log", yscale="log")
    axes.axvline(num_codes, color="grey", linestyle=":", label="all codes")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_error(axes: Any, *, error: ErrorTally) -> None:
    values, counts = error.distances.values_and_counts()
    _draw_histogram(axes, values=values, weights=counts[np.isfinite(values)], of="distance", counted="tokens")
