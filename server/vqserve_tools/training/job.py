"""Training from sources of latents to a codebook file: the work of `vqserved train`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import vqserve
from vqserve.errors import InvalidOption, of_file
from vqserve_server.codebooks import save_codebook
from vqserve_tools.latents.array import ArrayRows
from vqserve_tools.latents.opening import Sources
from vqserve_tools.latents.options import SourceOptions
from vqserve_tools.latents.rows import RandomRows
from vqserve_tools.latents.sample import SampledRows, draw_sample
from vqserve_tools.output import check_output, check_plot
from vqserve_tools.training.curve import draw_curve
from vqserve_tools.training.held_out import DATA_SET_SHARE, Split, split
from vqserve_tools.training.options import TrainingOptions
from vqserve_tools.training.trainer import Trained, train


@dataclass(frozen=True, kw_only=True)
class TrainedFile:
    """Result of `train_file`.

    Attributes:
        trained: the trained codebook.
        digest: digest of its file.
        rows: latents of the training and those that were held out.
        split: which of the rows were held out; None: none.
    """

    trained: Trained
    digest: str
    rows: RandomRows
    split: Split | None


def train_file(
    sources: Sequence[str],
    out: Path,
    options: TrainingOptions,
    *,
    layout: str | None = None,
    reading: SourceOptions | None = None,
    held_out: float | None = None,
    plot: Path | None = None,
    force: bool = False,
    progress: bool = False,
    notes: Mapping[str, object] | None = None,
) -> TrainedFile:
    """Train a codebook on one .npy file, or on a sample of a data set, and write it.

    On the CPU of one machine the same latents, options and notes give the same bytes.

    Args:
        sources: one .npy file, float16, float32 or float64, 2 to 5 axes, of any size; or files, folders, globs and
            URLs of a data set.
        out: codebook file to write.
        options: options of the training.
        layout: layout of the latents; None: channels first for 4 and 5 axes, last for 2 and 3.
        reading: how a data set is read.
        held_out: share of the latents that is held out, in [0, 1); None: 0.05 of a data set, nothing of one .npy file.
        plot: PNG file to draw the course of the training into; None: nothing is drawn.
        force: whether to replace an existing `out` or `plot`.
        progress: whether to show progress on stderr, and, without `layout`, the layout in which the latents were read.
        notes: further entries for the provenance of the codebook, about the origin of the latents.

    Raises:
        InvalidArgument: the latents or options cannot be used; nothing was written.
        OSError: a file cannot be read or written.
    """
    if held_out is not None and not 0 <= held_out < 1:
        raise InvalidOption(f"{{option}} must be at least 0 and less than 1, not {held_out}", option="held_out")
    found = Sources(sources, reading)
    check_output(out, force=force, sources=found.paths)
    if plot is not None:
        check_plot(plot, force=force, sources=[*found.paths, out])
    rows, origin = _read(found, layout, options.seed, progress=progress)
    share = _usual_share(rows) if held_out is None else held_out
    with of_file(found.array):
        parts = split(rows, share, seed=options.seed) if share else None
        trained = train(
            rows if parts is None else parts.training,
            options,
            held_out=None if parts is None else parts.held_out,
            with_curve=plot is not None,
            progress=progress,
        )
    if found.array is not None:
        with found.array.open("rb") as file:
            origin = {"file": origin["file"], "sha256": hashlib.file_digest(file, "sha256").hexdigest(), **origin}
    provenance = {
        "made_by": f"vqserved train {vqserve.__version__}",
        "latents": origin,
        "options": asdict(options) | asdict(trained.plan),
        "quality": asdict(trained.quality),
        **({} if parts is None else {"held_out": _of_split(parts, share, trained)}),
        **(notes or {}),
    }
    digest = save_codebook(trained.quantizer, out, provenance=provenance, statistics=trained.statistics)
    if plot is not None:
        title = f"{options.kind}, {options.num_codes} x {rows.dim}, digest {digest[:16]}"
        draw_curve(trained.curve, plot, title=title)
    return TrainedFile(trained=trained, digest=digest, rows=rows, split=parts)


def _read(
    found: Sources, layout: str | None, seed: int, *, progress: bool
) -> tuple[ArrayRows | SampledRows, dict[str, object]]:
    """Return the rows, and what their origin is."""
    says_layout = progress and layout is None
    if found.array is not None:
        rows = ArrayRows.open(found.array, layout)
        if says_layout and rows.array.ndim > 2:
            # Shown before the training, so that a user who sees a wrong number of channels need not wait for the end.
            _say_layout("latents", rows.array.shape, str(rows.layout), rows.dim)
        array = {"shape": list(rows.array.shape), "dtype": str(rows.array.dtype), "layout": str(rows.layout)}
        return rows, {"file": found.array.name, **array}
    data = found.data_set(layout)
    sample = draw_sample(data, found.options.sample_rows, seed=seed, progress=progress)
    found.tell_of_left_out(data)
    contents = data.contents
    if says_layout and contents.first is not None and len(contents.first[1]) > 2:
        key, shape, first_layout = contents.first
        may_be_one_image = len(shape) == 3 and not found.options.unbatched
        hint = "; if they are (C, h, w), pass --unbatched" if may_be_one_image else ""
        _say_layout(f"latents such as {key}", shape, str(first_layout), data.dim, hint)
    sizes = {"items": contents.items, "bad_items": contents.bad, "rows": contents.tokens, "sampled_rows": len(sample)}
    forms = {"dtypes": sorted(contents.dtypes), "layouts": sorted(map(str, contents.layouts))}
    return sample, {**found.provenance(), **sizes, **forms}


def _usual_share(rows: ArrayRows | SampledRows) -> float:
    """Return the share that is held out by default: none of one array, whose codebook stays as it always was."""
    is_enough = isinstance(rows, SampledRows) and round(DATA_SET_SHARE * len(rows)) > 0
    return DATA_SET_SHARE if is_enough else 0.0


def _say_layout(what: str, shape: tuple[int, ...], layout: str, channels: int, hint: str = "") -> None:
    sys.stderr.write(f"{what} {shape} read {layout.replace('_', ' ')}: {channels} channels{hint}\n")


def _of_split(parts: Split, share: float, trained: Trained) -> dict[str, object]:
    return {
        "share": share,
        "unit": parts.unit,
        "units": parts.held_out_units,
        "of": parts.units,
        "rows": len(parts.held_out),
        "quality": None if trained.held_out is None else asdict(trained.held_out),
    }
