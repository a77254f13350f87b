"""`vqserve encode` and `vqserve decode`: one .npy file, or a data set."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from vqserve.dtypes import INDEX_NAMES, LATENT_NAMES
from vqserve.errors import InvalidOption, VqserveError
from vqserve.text import printable
from vqserve_client.arguments import (
    add_codebook,
    add_connections,
    add_message_limit,
    add_progress,
    connection,
    integer,
)
from vqserve_client.bulk.dataset import DataSet, JobOptions, Summary
from vqserve_client.bulk.origins import common_origin
from vqserve_client.bulk.parts import Limits
from vqserve_client.bulk.progress import counted, short
from vqserve_client.bulk.records import ERRORS
from vqserve_client.client import Client
from vqserve_client.config import ClientConfig
from vqserve_client.conversion import RESULTS, ConversionOptions
from vqserve_client.provenance import codebook_of, conversion_of, description, sidecar, with_sidecar
from vqserve_client.transfer import Progress, Task, convert_file
from vqserve_data import SOURCES_HELP
from vqserve_data.errors import FileError
from vqserve_data.files import check_output
from vqserve_data.readers import suffix_of
from vqserve_data.readers.protocol import Selection
from vqserve_data.writers import FORMATS

# Exit code of a job that came to its end, with items that have no result.
SOME_BAD = 3
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# Long enough for a server to start again.
_RETRIES = 20
# Options for data sets only.
_FOR_FOLDERS: dict[str, object] = {
    "format": "npy",
    "column": None,
    "member": [],
    "key": None,
    "map": None,
    "map_processes": 0,
    "shard_items": None,
    "shard_bytes": Limits.shard_bytes,
    "max_errors": Limits.errors,
    "json": False,
    "dry_run": False,
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `encode` or `decode`."""
    operation = command.get_default("command")
    made = RESULTS[operation]
    command.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help=f"{SOURCES_HELP}; "
        + ("with --map of any files" if operation == "encode" else "or the folder that `vqserve encode` wrote"),
    )
    command.add_argument(
        "-o", "--out", type=Path, required=True, metavar="OUT", help="the folder to write; NAME.npy for one .npy file"
    )
    command.add_argument(
        "--force",
        action="store_true",
        help="replace what is there" + ("" if operation == "encode" else "; decode tokens of another codebook"),
    )
    add_codebook(command)
    command.add_argument(
        "--num-quantizers",
        type=integer(1),
        metavar="N",
        help="residual codebooks: number of indices for each token (default: all)",
    )
    command.add_argument(
        "--unbatched", action="store_true", help="arrays have no batch axis: (C, h, w), (C, t, h, w), (s, C)"
    )
    if operation == "encode":
        command.add_argument("--dtype", choices=INDEX_NAMES, help="of the indices (default: the smallest that fits)")
    else:
        command.add_argument(
            "--dtype", choices=LATENT_NAMES, default="float32", help="of the latents (bfloat16 is stored as float32)"
        )
        command.add_argument("--output", choices=("latents", "code_rows"), default="latents", help="what to write")
    _add_selection(command, mapped=operation == "encode")
    output = command.add_argument_group("output of a data set")
    output.add_argument("--format", choices=FORMATS, default="npy", help=f"of the {made} (npy: one file an item)")
    output.add_argument(
        "--shard-items", type=integer(1), metavar="N", help="items of a shard at most (100,000; npy: 1,000)"
    )
    output.add_argument(
        "--shard-bytes",
        type=byte_count,
        default=Limits.shard_bytes,
        metavar="N",
        help="a shard ends when its arrays have so many bytes: 500M, 2G (128M)",
    )
    output.add_argument(
        "--max-errors",
        type=integer(0),
        default=Limits.errors,
        metavar="N",
        help=f"stop when more items than this have no result ({Limits.errors}); with fewer the exit code is 3",
    )
    output.add_argument(
        "--dry-run", action="store_true", help="say what would be read and written, and its size, and end"
    )
    add_message_limit(command)
    command.add_argument(
        "--retries",
        type=integer(0),
        metavar="N",
        help=f"while the server is overloaded or unreachable ({ClientConfig.retries}, half a second; of a data set "
        f"{_RETRIES}, a minute)",
    )
    add_connections(command)
    command.add_argument("--quiet", action="store_true", help="say nothing but errors")
    command.add_argument("--json", action="store_true", help="progress and result as lines of JSON on stdout")
    add_progress(command, "a progress bar")


def _add_selection(command: argparse.ArgumentParser, *, mapped: bool) -> None:
    group = command.add_argument_group("which arrays of the sources")
    group.add_argument("--column", metavar="NAME", help="column of tables with the arrays (default: the only one)")
    group.add_argument(
        "--member",
        action="append",
        default=[],
        metavar="GLOB",
        help="members of archives, such as 'latents*' (default: all arrays); may be given again",
    )
    group.add_argument("--key", metavar="NAME", help="column of tables with the keys (default: the number of the row)")
    if mapped:
        group.add_argument(
            "--map", metavar="MODULE:FUNCTION", help="function that makes the latents of an item, such as an encoder"
        )
        group.add_argument(
            "--map-processes", type=integer(0), default=0, metavar="N", help="processes that call it (0: this one)"
        )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    operation = args.command
    with Client(
        **connection(args),
        retries=_retries(args),
        max_message_bytes=args.max_message_bytes,
        connections=args.connections,
    ) as client:
        if _is_one_file(args):
            return _convert_file(client, args, operation)
        return _convert_data_set(client, args, operation)


def _is_one_file(args: argparse.Namespace) -> bool:
    return bool(args.out.suffix == ".npy" and not args.out.is_dir())


def _retries(args: argparse.Namespace) -> int:
    if args.retries is not None:
        return int(args.retries)
    return ClientConfig.retries if _is_one_file(args) else _RETRIES


def _options(args: argparse.Namespace) -> ConversionOptions:
    return ConversionOptions(
        layout=args.layout,
        num_quantizers=args.num_quantizers,
        batched=not args.unbatched,
        dtype=args.dtype,
        output=getattr(args, "output", "latents"),
    )


def _convert_file(client: Client, args: argparse.Namespace, operation: str) -> int:
    for name, default in _FOR_FOLDERS.items():
        if getattr(args, name, default) != default:
            raise InvalidOption(f"{{option}} is for data sets, and {args.out} is one file: name a folder", option=name)
    if len(args.sources) > 1:
        raise FileError(f"{args.out} is one file, and there are {len(args.sources)} sources: name a folder to write")
    source = Path(args.sources[0])
    if source.is_dir():
        raise FileError(f"{args.out} is one file, and {source} is a folder: name a folder to write")
    made_by = common_origin([source]) if operation == "decode" else None
    info = codebook_of(
        made_by,
        client.codebooks(),
        name=args.codebook,
        digest=args.digest,
        target=client.target,
        force=args.force,
    )
    conversion = conversion_of(operation, info, _options(args), made_by)
    task = Task(source=source, target=args.out, force=args.force, is_pinned=args.digest is not None)
    with _bar(shown=args.progress and not args.quiet) as progress:
        if operation == "encode":
            check_output(sidecar(args.out), force=args.force)
            with with_sidecar(args.out, description(operation, info, conversion.options)):
                done = convert_file(client, task, conversion, progress)
        else:
            done = convert_file(client, task, conversion, progress)
    if not args.quiet:
        shape = "x".join(map(str, done.shape))
        summary = f"{shape} {done.dtype}, codebook {done.info.name}, digest {done.info.digest}"
        print(printable(f"wrote {task.target}: {summary}"), file=sys.stderr)
    return 0


def _convert_data_set(client: Client, args: argparse.Namespace, operation: str) -> int:
    if suffix_of(args.out.name) is not None and not args.out.exists():
        raise FileError(
            f"{args.out} is the name of a file, and what is written is a folder: name a folder, and its --format"
        )
    data = DataSet(client, operation, args.sources, args.out, _job_options(args))
    if args.dry_run:
        outlook = data.outlook()
        print(outlook.json() if args.json else printable_lines(outlook.text()), flush=True)
        return 0
    if data.skipped and not args.quiet:
        _say(f"left out: {counted(len(data.skipped), 'file')} of types that are not read, such as {data.skipped[0]}")
    try:
        summary = data.run()
    except (KeyboardInterrupt, SystemExit):
        # Ctrl-C, or SIGTERM.
        _say(f"stopped: what is whole is in {args.out}; the same command goes on from there")
        raise
    except VqserveError as error:
        # The item is a piece of this run: its number says nothing about the data set.
        raise error.with_fields(item=None).noted("the same command goes on where it was") from error
    if args.json:
        print(_json(summary, data), flush=True)
    elif not args.quiet:
        print(printable_lines(_text(summary, data)), file=sys.stderr)
    return SOME_BAD if summary.bad else 0


def _job_options(args: argparse.Namespace) -> JobOptions:
    mapped = args.command == "encode"
    if mapped and args.map_processes and not args.map:
        raise InvalidOption("{option} needs --map", option="map_processes")
    return JobOptions(
        conversion=_options(args),
        codebook=args.codebook,
        digest=args.digest,
        format=args.format,
        select=Selection(column=args.column, members=tuple(args.member), key=args.key),
        limits=Limits(shard_items=args.shard_items, shard_bytes=args.shard_bytes, errors=args.max_errors),
        map=args.map if mapped else None,
        map_processes=args.map_processes if mapped else 0,
        force=args.force,
        progress="json" if args.json else "none" if args.quiet else "bar" if args.progress else "lines",
    )


def _text(summary: Summary, data: DataSet) -> str:
    counts, info = summary.counts, data.conversion.info
    seconds = max(counts.seconds, 1e-9)
    was_complete = 0 < counts.begun_items == summary.items + summary.bad
    lines = [
        f"{'complete before: ' if was_complete else 'wrote '}{summary.folder}: {counted(summary.items, 'item')}, "
        f"{short(summary.tokens)}tokens, codebook {info.name}, digest {info.digest}"
    ]
    if not was_complete:
        lines.append(
            f"{counts.seconds:.1f} s, {short(counts.tokens / seconds)}tokens/s; waited for the sources "
            f"{counts.waited_for_sources_s / seconds:.0%} of the time, for the output "
            f"{counts.waited_for_output_s / seconds:.0%}"
        )
        if counts.begun_items:
            lines.append(f"done before: {counted(counts.begun_items, 'item')}")
    if summary.bad:
        errors = summary.folder / ERRORS
        with errors.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        lines.append(f"without a result: {counted(summary.bad, 'item')}; {errors} says why. The first:")
        lines.append(f"{first['key']} in {first['source']}: {first['reason']}")
    return "\n".join(lines)


def _json(summary: Summary, data: DataSet) -> str:
    counts, info = summary.counts, data.conversion.info
    return json.dumps(
        {
            "event": "end",
            "out": str(summary.folder),
            "codebook": info.name,
            "digest": info.digest,
            "items": summary.items,
            "bad": summary.bad,
            "tokens": summary.tokens,
            "seconds": round(counts.seconds, 3),
            "waited_for_sources_s": round(counts.waited_for_sources_s, 3),
            "waited_for_output_s": round(counts.waited_for_output_s, 3),
        }
    )


def byte_count(text: str) -> int:
    """Return a number of bytes: "1000000", "500M", "2G"."""
    match = re.fullmatch(r"(\d{1,9})([KMGT]?)(?:i?B)?", text, re.ASCII)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"must be a number of bytes such as 500M or 2G, not {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def printable_lines(text: str) -> str:
    """Return a text of several lines with its control characters escaped."""
    return "\n".join(printable(line) for line in text.splitlines())


def _say(text: str) -> None:
    print(f"vqserve: {printable(text)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(*, shown: bool) -> Iterator[Progress]:
    """Yield a function that begins a progress bar, or one that shows nothing."""
    if not shown:
        yield lambda _: lambda _: None
        return
    from tqdm import tqdm  # noqa: PLC0415

    with contextlib.ExitStack() as stack:

        def begin(tokens: int) -> Callable[[int], None]:
            bar = stack.enter_context(tqdm(total=tokens, unit="token", unit_scale=True, file=sys.stderr))

            def advance(count: int) -> None:
                bar.update(count)

            return advance

        yield begin
