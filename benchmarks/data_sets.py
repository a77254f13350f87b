"""`vqserve encode` of data sets that are made as they are read, beside what the server can do: `make bench-data-sets`.

For each kind of item: tokens a second of the job, of the best load of `vqserve bench` on the same server in the same
run, their ratio, the job's memory, and the share of the time for which it waited for its sources and its output.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cells import Cell, make_books
from contenders import Ours, grpc_rate, wait_for_idle
from machine import add_machine
from tqdm import tqdm

from vqserve_client import Client, bulk

RESULTS = Path(__file__).parent / "results"
SUFFIX = ".synthetic"
# Arrays that take turns as items: to make random numbers would take longer than to send them.
DIFFERENT = 16
# Loads that a server is measured with; the best one counts.
CALLERS = (8, 32)
STREAMS = (0, 4)


@dataclass(frozen=True)
class Kind:
    """One kind of items."""

    name: str
    book: str
    shape: tuple[int, ...]
    items: int

    @property
    def tokens(self) -> int:
        return self.shape[0] * int(np.prod(self.shape[2:]))

    @property
    def nbytes(self) -> int:
        return 4 * int(np.prod(self.shape))


class SyntheticReader:
    """Reads items that are in no file: a file says how many of which shape."""

    suffixes = (SUFFIX,)

    def entries(self, file: bulk.SourceFile, select: bulk.Selection) -> Iterator[bulk.Entry]:
        shape, items = self._content(file)
        for number in range(items):
            yield bulk.Entry(f"{file.key}/{number:08}", shape, np.dtype(np.float32))

    def read(self, file: bulk.SourceFile, select: bulk.Selection, *, start: int = 0) -> Iterator[bulk.Item]:
        shape, items = self._content(file)
        arrays = np.random.default_rng(0).standard_normal((DIFFERENT, *shape), dtype=np.float32)
        for number in range(start, items):
            yield bulk.Item(f"{file.key}/{number:08}", arrays[number % DIFFERENT].copy(), file.name)

    def _content(self, file: bulk.SourceFile) -> tuple[tuple[int, ...], int]:
        with file.open() as opened:
            content = json.load(opened)
        return tuple(content["shape"]), content["items"]


def work(target: str, book: str, source: str, out: str) -> None:
    """Run one job and print its figures: in a process of its own, whose memory is measured."""
    bulk.add_reader(SyntheticReader())
    with Client(target) as client:
        options = bulk.JobOptions(codebook=book, format="stream")
        summary = bulk.encode(client, [source], Path(out), options)
    counts = summary.counts
    figures = {
        "items": summary.items,
        "tokens": summary.tokens,
        "seconds": counts.seconds,
        "sources": counts.waited_for_sources_s / counts.seconds,
        "output": counts.waited_for_output_s / counts.seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    print(json.dumps(figures))


def run_job(target: str, kind: Kind, items: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / f"items{SUFFIX}"
        source.write_text(json.dumps({"shape": kind.shape, "items": items}))
        command = [sys.executable, __file__, "--work", target, kind.book, str(source), str(Path(scratch) / "out")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    assert figures["items"] == items
    return figures


def best_rate(target: str, kind: Kind) -> float:
    """Tokens a second of the best load of the load generator with requests of this kind."""
    cell = Cell(kind.book, kind.shape[0], "encode", "fp32")
    rates = []
    for callers in CALLERS:
        for streams in STREAMS:
            method = cell.method + ("Stream" if streams else "")
            wait_for_idle()
            rates.append(grpc_rate(target, method, cell.request, callers, 2.0, streams=streams) * cell.tokens)
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--gigabytes", type=float, default=20, help="of each data set of images")
    parser.add_argument("--small", type=int, default=1_000_000, help="items of 16 tokens")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of load generator and job")
    add_machine(parser)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    kinds = [
        Kind("16384 x 4, one image", "ldm-f8", (1, 4, 32, 32), 0),
        Kind("16384 x 4, 16 images", "ldm-f8", (16, 4, 32, 32), 0),
        Kind("1024 x 256, one image", "vqgan-f16", (1, 256, 16, 16), 0),
        Kind("1024 x 256, 16 images", "vqgan-f16", (16, 256, 16, 16), 0),
    ]
    lines = [
        f"# Data sets on {options.machine}",
        "",
        f"{options.gigabytes:g} GB of latents each, {options.rounds} rounds; ratios are medians.",
        "",
        "| items | job, tokens/s | bench, tokens/s | **job over bench** | peak MiB | waits: sources | waits: output |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        make_books(Path(scratch))
        server = stack.enter_context(Ours(Path(scratch)))
        for kind in tqdm(kinds):
            items = max(1, round(options.gigabytes * 1e9 / options.rounds / kind.nbytes))
            rows = []
            for _ in range(options.rounds):
                bench = best_rate(server.target, kind)
                wait_for_idle()
                figures = run_job(server.target, kind, items)
                rows.append((figures["tokens"] / figures["seconds"], bench, figures))
            ratio = statistics.median(job / bench for job, bench, _ in rows)
            job, bench, figures = sorted(rows, key=lambda row: row[0])[len(rows) // 2]
            lines.append(
                f"| {kind.name} | {job:.4g} | {bench:.4g} | **{ratio:.2f}** | {figures['peak_mib']:.0f} | "
                f"{figures['sources']:.0%} | {figures['output']:.0%} |"
            )
            tqdm.write(lines[-1])
        small = Kind("16 tokens", "tiny", (1, 4, 4, 4), options.small)
        lines += ["", "| items of 16 tokens | items/s | peak MiB |", "|---|---|---|"]
        for items in (options.small // 10, options.small):
            figures = run_job(server.target, small, items)
            lines.append(f"| {items:,} | {figures['items'] / figures['seconds']:.0f} | {figures['peak_mib']:.0f} |")
            tqdm.write(lines[-1])
    report = "\n".join([*lines, ""])
    print(report)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"data-sets-{options.machine}.md").write_text(report)


if __name__ == "__main__":
    main()
