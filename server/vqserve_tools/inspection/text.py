"""A report as text lines."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vqserve.text import printable
from vqserve_tools.inspection.inspection import CodeFigures, Neighbours, Norms, Report
from vqserve_tools.latents.rows import Description

if TYPE_CHECKING:
    from vqserve_tools.inspection.error import QuantizationError
    from vqserve_tools.inspection.fit import Fit, Usage, UsageBin
    from vqserve_tools.inspection.rounding import Changed

# The longest name of an argument fits; names in the provenance can have any length.
_NAME_COLUMNS = 32
_LEAST_VALUE_COLUMNS = 20
# Head of the columns of `_stage`, which are medians.
_STAGE_HEAD = f"{'norm':>9} {'neighbour':>9} {'duplicates':>10}"
_Line = tuple[str, str]


def as_text(report: Report, columns: int = 120) -> str:
    """Return the report in lines of about `columns` characters.

    Each argument and each entry of the provenance is cut to one line; the JSON report has them in full.
    """
    figures = [*_figures(report), *(() if report.fit is None else _fit(report, report.fit))]
    width = max(len(name) for name, _ in figures)
    left = max(columns - width - 2, _LEAST_VALUE_COLUMNS)
    lines = [line for name, value in figures for line in _wrapped(name, value, width, left)]

    own = [
        (_cut(printable(f"{what} {name}"), _NAME_COLUMNS), _plain(value))
        for what, values in (("argument", report.arguments), ("provenance", report.provenance))
        for name, value in values.items()
    ]
    width = max(len(name) for name, _ in own)
    left = max(columns - width - 2, _LEAST_VALUE_COLUMNS)
    lines += [f"{name:{width}}  {_cut(printable(value), left)}" for name, value in own]
    lines += [line for sign in report.warnings for line in _wrapped("warning", sign, len("warning"), columns - 9)]
    return "".join(f"{line}\n" for line in lines)


def as_text_side_by_side(names: Sequence[str], reports: Sequence[Report], verdict: str, columns: int = 120) -> str:
    """Return the figures of two reports in two columns, and the verdict in the last line.

    Args:
        names: headings of the two columns.
        reports: two reports.
        verdict: one line of text.
        columns: characters of a line.
    """
    tables = [dict(_summary(report)) for report in reports]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    width = max(len("verdict"), *map(len, keys))
    left = max((columns - width - 4) // 2, _LEAST_VALUE_COLUMNS)
    lines = []
    for key, cells in [("", tuple(names)), *((key, tuple(table.get(key, "-") for table in tables)) for key in keys)]:
        first, second = (_cut(printable(cell), left) for cell in cells)
        lines.append(f"{key:{width}}  {first:{left}}  {second}".rstrip())
    for name, report in zip(names, reports, strict=True):
        for sign in report.warnings:
            lines += _wrapped("warning", f"{printable(name)}: {sign}", width, columns - width - 2)
    lines += _wrapped("verdict", printable(verdict), width, columns - width - 2)
    return "".join(f"{line}\n" for line in lines)


def _summary(report: Report) -> Iterator[_Line]:
    """Yield the figures that fit half a line."""
    yield "kind", report.kind
    yield "digest", report.digest[:16]
    yield "codes", f"{report.codes} of width {report.code_dim}, {report.dtype}"
    yield "indices", f"{report.num_quantizers} for a token"
    yield "channels", f"{report.input_dim} in, {report.output_dim} out"
    if report.norms is not None:
        yield "norms", _short(report.norms)
        yield "neighbours", "none" if report.neighbours is None else _short(report.neighbours)
        yield "duplicates", str(report.duplicates)
    if report.dead_looking is not None:
        yield "dead-looking", str(report.dead_looking)
    if report.fit is not None:
        fit = report.fit
        yield "entropy", f"{sum(usage.bits for usage in fit.usage):.2f} bits a token"
        yield "used codes", ", ".join(str(usage.used) for usage in fit.usage)
        if fit.error is not None:
            snr = "" if fit.error.snr_db is None else f", SNR {fit.error.snr_db:.2f} dB"
            yield "error", f"{fit.error.mean_squared:.6g}{snr}"


def _short(figures: Norms | Neighbours) -> str:
    return f"{figures.min:.4g} / {figures.median:.4g} / {figures.max:.4g}"


def _plain(value: object) -> str:
    """Return text unchanged, and other values as JSON, as in the file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _wrapped(name: str, value: str, width: int, columns: int) -> list[str]:
    # A digest is never broken, even if the terminal is narrower.
    parts = textwrap.wrap(value, columns, break_long_words=False, break_on_hyphens=False)
    return [f"{first:{width}}  {part}" for first, part in zip([name, *[""] * len(parts)], parts, strict=False)]


def _figures(report: Report) -> Iterator[_Line]:
    yield "kind", report.kind
    yield "digest", report.digest
    yield "codes", f"{report.codes} of width {report.code_dim}, {report.dtype}"
    yield "vocabulary", str(report.vocab_size)
    yield "indices", f"{report.num_quantizers} for a token"
    layout = report.layout or "layout by the number of axes"
    yield "channels", f"{report.input_dim} in, {report.output_dim} out, {layout}"
    computed = "none: the codes are computed"
    yield "norms", computed if report.norms is None else _spread(report.norms)
    yield "neighbours", computed if report.norms is None else _neighbours(report)
    if report.norms is not None:
        yield "duplicates", f"{report.duplicates} (codes equal to an earlier one)"
    if report.dead_looking is not None:
        dead = f"{report.dead_looking} of {report.num_codes}"
        yield "dead-looking", f"{dead} ({report.dead_looking_means})"
    if report.statistics is not None:
        saved = report.statistics
        error = "" if saved.error is None else f", error {saved.error:.6g}"
        yield "statistics", f"of {saved.rows} tokens{error}: {printable(saved.source)}"
    yield "search", ", ".join(f"{backend} on {device}" for device, backend in report.search.items())
    if report.stages and report.fit is None:
        yield "stage", _STAGE_HEAD
        for number, stage in enumerate(report.stages, 1):
            yield f"{number:5}", _stage(stage)


def _fit(report: Report, fit: Fit) -> Iterator[_Line]:
    yield "latents", f"{_described(fit.latents)}, encoded on {fit.device}"
    if len(fit.usage) == 1:
        yield from _usage(fit.usage[0])
    else:
        bits, most = sum(usage.bits for usage in fit.usage), sum(math.log2(usage.codes) for usage in fit.usage)
        yield "entropy", f"{bits:.2f} of {most:.2f} bits a token, each index for itself"
    if fit.outside_remap is not None:
        outside = _share(fit.outside_remap, fit.latents.tokens)
        yield "outside remap", f"{outside} of the tokens; all figures are about their own codes"
    yield from _error(fit.error)
    for dtype, rounded in fit.rounded.items():
        parts = ("latents", rounded.latents), ("codebook", rounded.codebook), ("both", rounded.both)
        changes = "; ".join(f"{what} {_changed(changed, fit.latents.tokens)}" for what, changed in parts)
        yield f"in {dtype}", f"tokens change: {changes}"
    yield from _rechecked(fit)
    if report.stages:
        yield "stage", f"{_STAGE_HEAD} {'used':>7} {'bits':>6} {'float16':>9} {'float64':>9}"
        for number, (stage, rechecked) in enumerate(zip(report.stages, fit.rechecked, strict=True)):
            searched_again = _percent(rechecked.float64, rechecked.rows)
            yield f"{number + 1:5}", f"{_stage(stage)} {_stage_fit(fit, number)} {searched_again:>9}"
    elif len(fit.usage) > 1:
        # Their codes are computed: they have no figures of their own, and nothing is searched.
        yield "stage", f"{'used':>7} {'bits':>6} {'float16':>9}"
        for number in range(len(fit.usage)):
            yield f"{number + 1:5}", _stage_fit(fit, number)


def _described(latents: Description) -> str:
    """Return what the latents are: "5984 tokens: 1 x 16 x 68 x 88 float32, channels_first"."""
    form = f"{latents.dtype}, {latents.layout}"
    size = latents.data_set
    if latents.shape is not None:
        return f"{latents.tokens} tokens: {' x '.join(map(str, latents.shape))} {form}"
    if size is None:
        return f"{latents.tokens} tokens: {form}"
    which = f"a sample of {latents.tokens} of {size.tokens}" if size.is_sampled else f"all {latents.tokens}"
    return f"{which} tokens: {size.text}, {form}"


def _stage_fit(fit: Fit, number: int) -> str:
    usage, both = fit.usage[number], fit.rounded["float16"].both
    changed = "-" if both is None else _percent(both.indices[number], fit.latents.tokens)
    return f"{usage.used:7} {usage.bits:6.2f} {changed:>9}"


def _usage(usage: Usage) -> Iterator[_Line]:
    largest = f"the most used one has {100 * usage.largest_share:.3g} % of the tokens"
    yield "usage", f"{_share(usage.used, usage.codes)} of the codes, {usage.dead} dead; {largest}"
    share = f"{100 * usage.share:.3g} % of {usage.codes}"
    yield "perplexity", f"{usage.perplexity:.6g}, {share}: {usage.bits:.2f} of {math.log2(usage.codes):.2f} bits"
    bins = [f"{one.codes} with {_range(one)}" for one in usage.histogram if one.codes]
    yield "codes by use", f"{', '.join(bins)} tokens"


def _range(one: UsageBin) -> str:
    return str(one.least) if one.most == one.least else f"{one.least} to {one.most}"


def _error(error: QuantizationError | None) -> Iterator[_Line]:
    if error is None:
        yield "error", "none: these codes do not approximate latents"
        return
    of_variance = "" if error.relative is None else f", {100 * error.relative:.3g} % of the variance"
    snr = "" if error.snr_db is None else f", SNR {error.snr_db:.2f} dB"
    yield "error", f"{error.mean_squared:.6g} mean squared{of_variance}{snr} ({error.compared})"
    distance = error.distance
    yield "distance", f"p50 {distance.p50:.4g}, p90 {distance.p90:.4g}, p99 {distance.p99:.4g}, max {distance.max:.4g}"
    if error.by_stages:
        known = [one for one in error.by_stages if one.snr_db is not None]
        yield "SNR in dB", ", ".join(f"{one.snr_db:.2f} with {one.num_quantizers}" for one in known)


def _rechecked(fit: Fit) -> Iterator[_Line]:
    if not fit.rechecked:
        yield "re-checked", "none: nothing is searched"
        return
    rows = sum(one.rows for one in fit.rechecked)
    float64 = _share(sum(one.float64 for one in fit.rechecked), rows)
    beyond = _share(sum(one.beyond_float64 for one in fit.rechecked), rows)
    yield "re-checked", f"{float64} of the searched rows in float64, {beyond} beyond; {fit.backend} on {fit.device}"


def _changed(changed: Changed | None, tokens: int) -> str:
    if changed is None:
        return "out of range"
    lost = f", {changed.lost} out of range" if changed.lost else ""
    return _share(changed.tokens, tokens) + lost


def _stage(stage: CodeFigures) -> str:
    neighbour = "-" if stage.neighbours is None else f"{stage.neighbours.median:.4g}"
    return f"{stage.norms.median:9.4g} {neighbour:>9} {stage.duplicates:10}"


def _neighbours(report: Report) -> str:
    found = report.neighbours
    if found is None:
        return "none: there is one code"
    sizes = report.stage_vocab_sizes or (report.num_codes,) * max(1, len(report.stages))
    all_codes = sum(size for size in sizes if size > 1)
    drawn = "" if found.codes == all_codes else f", from {found.codes} codes that were drawn"
    return f"{_spread(found)} (distance to the nearest other code{drawn})"


def _spread(figures: Norms | Neighbours) -> str:
    return f"min {figures.min:.6g}, median {figures.median:.6g}, max {figures.max:.6g}"


def _share(count: int, of: int) -> str:
    return f"{count} ({_percent(count, of)})"


def _percent(count: int, of: int) -> str:
    return f"{100 * count / of:.3g} %"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
