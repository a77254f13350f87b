"""`vqserved inspect`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from vqserve.errors import InvalidArgument, InvalidOption, of_file
from vqserve.layout import Layout
from vqserve_data import SOURCES_HELP
from vqserve_server.codebooks import Codebook, load_codebook
from vqserve_tools.flags import add_flags, from_flags
from vqserve_tools.inspection.inspection import FORMAT, inspect
from vqserve_tools.inspection.pair import Side, verdict
from vqserve_tools.inspection.text import as_text, as_text_side_by_side
from vqserve_tools.latents.options import SourceOptions
from vqserve_tools.latents.rows import LatentRows
from vqserve_tools.output import check_output, check_plot, png_path

if TYPE_CHECKING:
    from vqserve_tools.latents.opening import Sources

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_inspect_parser(subparsers: Subparsers) -> None:
    """Add the parser of `inspect`; its default `run` takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser(
        "inspect",
        description="Describe a codebook file: its kind and sizes, its codes and, with latents, its fit to them. "
        "Two files are compared.",
    )
    parser.add_argument(
        "file", type=Path, nargs="+", metavar="FILE", help="a codebook file; two: they are compared, side by side"
    )
    parser.add_argument(
        "--latents",
        nargs="+",
        metavar="SRC",
        help=f"latents to encode: {SOURCES_HELP}, with 2 to 5 axes of float16, bfloat16, float32 or float64",
    )
    parser.add_argument(
        "--layout",
        choices=[str(layout) for layout in Layout],
        help="position of the channels in the latents (default: the layout of the codebook)",
    )
    parser.add_argument(
        "--save-stats",
        action="store_true",
        help="write how often the latents use each code, and their error, into FILE, for a server to compare its "
        "traffic with; tokens and digest stay",
    )
    add_flags(parser, SourceOptions)
    parser.add_argument("--json", action="store_true", help="write one JSON object, with all texts in full length")
    parser.add_argument("--plot", type=png_path, metavar="OUT.png", help="draw the figures into this file")
    parser.add_argument("--force", action="store_true", help="replace OUT.png if it exists")
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> int:
    """Write the report of one or two codebook files to stdout, and the plot of --plot; return the exit status.

    Raises:
        CodebookError: the file is not a codebook file, or it cannot be served.
        InvalidArgument: the latents or options cannot be used.
        OSError: a file cannot be read or written.
    """
    reading = from_flags(SourceOptions, args)
    files: list[Path] = args.file
    if len(files) > 2:
        raise InvalidOption(f"{len(files)} files are given: name one to describe it, or two to compare them")
    if args.latents is None:
        _check_without_latents(args, reading)
    sources = None if args.latents is None else _opened(args.latents, reading)
    paths = [] if sources is None else sources.paths
    if args.save_stats:
        _check_save(args, paths)
    if args.plot is not None:
        check_plot(args.plot, force=args.force, sources=(*files, *paths))
    # Without a terminal, stderr has errors only, and what is left out of a data set, for programs that read it.
    progress = sys.stderr.isatty()
    array = None if sources is None else sources.array
    codebooks = [load_codebook(file) for file in files]
    latents = [_latents(sources, args.layout, codebook, progress=progress) for codebook in codebooks]
    if args.save_stats and latents[0] is not None and sources is not None:
        with of_file(array):
            source = sources.title if reading.sample_rows is None else f"a sample of {sources.title}"
            from vqserve_tools.inspection.statistics import save_codebook_again, with_statistics  # noqa: PLC0415

            codebooks[0] = with_statistics(codebooks[0], latents[0], source, progress=progress)
        save_codebook_again(codebooks[0], files[0])
    names = _names(files)
    inspections = []
    for name, codebook, rows in zip(names, codebooks, latents, strict=True):
        with of_file(array), _of_codebook(name if len(files) > 1 else None):
            inspections.append(inspect(codebook, rows, progress=progress))
    if sources is not None:
        _tell_of_left_out(sources, latents[0])
    if args.plot is not None:
        from vqserve_tools.inspection.plot import draw  # noqa: PLC0415

        draw(list(zip(names, inspections, strict=True)), args.plot)
    columns = shutil.get_terminal_size(fallback=(120, 0)).columns
    reports = [inspection.report for inspection in inspections]
    if len(files) == 1:
        whole, text = reports[0].as_dict(), as_text(reports[0], columns)
    else:
        first, second = (Side(*one) for one in zip(names, codebooks, reports, strict=True))
        line = verdict(first, second, latents[0])
        whole = {"format": FORMAT, "reports": [report.as_dict() for report in reports], "verdict": line}
        text = as_text_side_by_side(names, reports, line, columns)
    sys.stdout.write(f"{json.dumps(whole, allow_nan=False)}\n" if args.json else text)
    return 0


def _opened(names: Sequence[str], reading: SourceOptions) -> Sources:
    # The readers of all formats take as long to import as a small codebook to describe.
    from vqserve_tools.latents.opening import Sources  # noqa: PLC0415

    return Sources(names, reading)


def _tell_of_left_out(sources: Sources, rows: LatentRows | None) -> None:
    from vqserve_tools.latents.sample import SampledRows, StreamedRows  # noqa: PLC0415

    if isinstance(rows, SampledRows | StreamedRows):
        sources.tell_of_left_out(rows.data)


def _check_without_latents(args: argparse.Namespace, reading: SourceOptions) -> None:
    if args.layout is not None:
        raise InvalidOption("{option} says where the channels of the latents are: give --latents too", option="layout")
    if args.save_stats:
        raise InvalidOption("{option} keeps what is measured on latents: give --latents too", option="save_stats")
    for setting in fields(reading):
        if getattr(reading, setting.name) != setting.default:
            raise InvalidOption("{option} says how latents are read: give --latents too", option=setting.name)


def _check_save(args: argparse.Namespace, paths: Sequence[Path]) -> None:
    if len(args.file) > 1:
        raise InvalidOption("{option} writes into one file: name one", option="save_stats")
    check_output(args.file[0].resolve(), force=True, sources=paths)


def _latents(sources: Sources | None, layout: str | None, codebook: Codebook, *, progress: bool) -> LatentRows | None:
    if sources is None:
        return None
    from vqserve_tools.latents.array import ArrayRows  # noqa: PLC0415
    from vqserve_tools.latents.sample import StreamedRows, draw_sample  # noqa: PLC0415

    default = codebook.quantizer.layout
    if sources.array is not None:
        return ArrayRows.open(sources.array, layout, default=default, keeps_float64=True)
    channels = codebook.quantizer.input_dim
    data = sources.data_set(layout, default=default, channels=channels, keeps_float64=True)
    if sources.options.sample_rows is None:
        return StreamedRows(data, progress=progress)
    return draw_sample(data, sources.options.sample_rows, seed=0, progress=progress)


@contextmanager
def _of_codebook(name: str | None) -> Iterator[None]:
    """Add the name of the codebook to errors about the latents that the block raises; None: there is only one."""
    try:
        yield
    except InvalidArgument as error:
        raise error.with_fields(codebook=name) from None


def _names(files: Sequence[Path]) -> list[str]:
    """Return the shortest of stem and path that tells the files apart."""
    stems = [file.stem for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file) for file in files]
