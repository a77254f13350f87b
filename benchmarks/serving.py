"""Serving beside its floors and its peers: `make bench`.

Everything in a row of a table was measured in turns, round after round, in one run. Figures are medians of rounds; what
is worth reporting is their ratio.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cells import BOOKS, Cell, make_books
from contenders import BEFORE, PEER_KINDS, Contender, Echo, Ours, PeerFailed, environment_of, wait_for_idle
from machine import add_machine
from tqdm import tqdm

from vqserve_server import Tokenizer

RESULTS = Path(__file__).parent / "results"
CALLERS = 32
STREAMS = 4
# Requests whose rows are searched at once for the floor of compute.
FLOOR_REQUESTS = 16


@dataclass
class Row:
    """Medians of one cell: requests a second of each contender, seconds of the search for one request."""

    cell: Cell
    rates: dict[str, float] = field(default_factory=dict)
    search_s: float = 0.0

    @property
    def echo(self) -> float:
        """The faster of the two bare servers."""
        return max(rate for name, rate in self.rates.items() if name.startswith("echo"))

    @property
    def efficiency(self) -> float:
        """(t_echo + t_search) / t_served, where client and server share the cores."""
        return self._efficiency("vqserve")

    @property
    def sdk_efficiency(self) -> float:
        """The same where the SDK calls, in threads of one process."""
        return self._efficiency("vqserve, SDK")

    def _efficiency(self, name: str) -> float:
        return (1 / self.echo + self.search_s) * self.rates[name]


def search_floor(cell: Cell, tokenizer: Tokenizer) -> Callable[[], float]:
    """Return the time of one request's computation in process, with the rows of several requests at once."""
    if cell.operation == "encode":
        latents = np.concatenate([cell.latents] * FLOOR_REQUESTS)
        work: Callable[[], object] = lambda: tokenizer.encode(latents)  # noqa: E731
    else:
        indices = np.concatenate([cell.indices] * FLOOR_REQUESTS)
        work = lambda: tokenizer.decode(indices)  # noqa: E731

    def once() -> float:
        work()
        times = []
        ends = time.perf_counter() + 0.5
        while len(times) < 3 or time.perf_counter() < ends:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times) / FLOOR_REQUESTS

    return once


def measure_cell(
    cell: Cell, servers: Sequence[Ours], tokenizer: Tokenizer, folder: Path, options: argparse.Namespace
) -> Row:
    row = Row(cell)
    with ExitStack() as stack:
        overhead = 120
        contenders: list[Contender] = [
            stack.enter_context(Echo(kind, cell.reply_bytes + overhead)) for kind in ("sync", "aio")
        ]
        contenders += servers
        if cell.dtype == "fp32" and not options.no_peers:
            # The plain search takes minutes for as many large requests as there are callers.
            kernels = ("ours", "plain") if cell.images == 1 else ("ours",)
            for kind in PEER_KINDS:
                for kernel in kernels if environment_of(kind.kind).exists() else ():
                    try:
                        contenders.append(stack.enter_context(kind(folder, cell, kernel)))
                    except PeerFailed as error:
                        tqdm.write(f"{cell.name}: {kind.kind} is left out: {error}")
        rates: dict[str, list[float]] = {}
        floors = []
        floor = search_floor(cell, tokenizer)
        for turn in range(options.rounds):
            wait_for_idle()
            floors.append(floor())
            # The order alternates, so that none is always measured after the same other.
            for contender in contenders[:: -1 if turn % 2 else 1]:
                wait_for_idle()
                try:
                    rate = contender.rate(cell, CALLERS, options.seconds)
                except PeerFailed as error:
                    tqdm.write(f"{cell.name}: {contender.name} is left out: {error}")
                    contenders.remove(contender)
                    rates.pop(contender.name, None)
                else:
                    rates.setdefault(contender.name, []).append(rate)
            wait_for_idle()
            rates.setdefault("vqserve, streams", []).append(
                servers[0].stream_rate(cell, CALLERS, options.seconds, STREAMS)
            )
            rates.setdefault("vqserve, SDK", []).append(servers[0].sdk_rate(cell, CALLERS, options.seconds))
            rates.setdefault("vqserve, many", []).append(servers[0].many_rate(cell, options.seconds))
    row.rates = {name: statistics.median(values) for name, values in rates.items()}
    row.search_s = statistics.median(floors)
    return row


def cells(names: Sequence[str]) -> list[Cell]:
    every = [Cell("tiny", 1, operation, "fp32") for operation in ("encode", "decode")]
    for book in BOOKS:
        if book != "tiny":
            every += [
                Cell(book, images, operation, dtype)
                for images in (1, 16, 64)
                for operation in ("encode", "decode")
                for dtype in ("fp32", "bf16")
            ]
    return [cell for cell in every if not names or any(name in cell.name for name in names)]


def table(rows: list[Row]) -> list[str]:
    compared = any(BEFORE in row.rates for row in rows)
    peers = list(dict.fromkeys(name for row in rows for name in row.rates if "," in name and "vqserve" not in name))
    heads = [
        "request",
        "echo/s",
        "search, us",
        "vqserve/s",
        *(["before/s", "after over before"] if compared else []),
        "**efficiency**",
        f"by Client.encode or decode in {CALLERS} threads/s",
        "**its efficiency**",
        "by stream/s",
        "by encode_many or decode_many/s",
        *(f"{p}/s" for p in peers),
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        figures = [
            row.cell.name,
            f"{row.echo:.0f}",
            f"{row.search_s * 1e6:.0f}",
            f"{row.rates['vqserve']:.0f}",
            *([f"{row.rates[BEFORE]:.0f}", f"{row.rates['vqserve'] / row.rates[BEFORE]:.2f}"] if compared else []),
            f"**{row.efficiency:.2f}**",
            f"{row.rates['vqserve, SDK']:.0f}",
            f"**{row.sdk_efficiency:.2f}**",
            f"{row.rates['vqserve, streams']:.0f}",
            f"{row.rates['vqserve, many']:.0f}",
            *(f"{row.rates[p]:.0f}" if p in row.rates else "-" for p in peers),
        ]
        lines.append(f"| {' | '.join(figures)} |")
    return lines


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.35 * len(rows) + 1.2), layout="constrained")
    names = [row.cell.name for row in rows][::-1]
    axes.barh(names, [row.efficiency for row in rows][::-1], color="#4878a8")
    axes.axvline(1, color="black", linewidth=1)
    axes.axvline(0.85, color="gray", linewidth=1, linestyle="--")
    axes.set(
        xlabel="serving efficiency: (echo + search) / served",
        title=f"{CALLERS} callers, client and server on one machine",
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="only those whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.8, help="of each measurement")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--before", type=Path, help="another checkout, installed, whose server is measured in turn")
    parser.add_argument(
        "--before-flags",
        default="",
        help='flags of that server, which without --before is this checkout\'s: "--metrics-port 0 --sample-one-in 0"',
    )
    add_machine(parser)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizers = make_books(folder)
        with ExitStack() as stack:
            servers = [stack.enter_context(Ours(folder))]
            if options.before or options.before_flags:
                flags = shlex.split(options.before_flags)
                servers.append(stack.enter_context(Ours(folder, *flags, name=BEFORE, checkout=options.before)))
            for cell in tqdm(cells(options.cells)):
                rows.append(measure_cell(cell, servers, tokenizers[cell.book], folder, options))
                tqdm.write(table(rows[-1:])[-1])
    report = [
        f"# Serving on {options.machine}",
        "",
        f"{CALLERS} callers, or one `encode_many` or `decode_many` of the SDK; medians of {options.rounds} rounds.",
        "",
        *table(rows),
        "",
    ]
    print("\n".join(report))
    if not options.cells:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"serving-{options.machine}.md").write_text("\n".join(report))
        plot(rows, RESULTS / f"serving-{options.machine}.png")


if __name__ == "__main__":
    main()
