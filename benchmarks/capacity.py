"""What one core serves, by a load generator that is nobody's: `make bench-capacity`.

Every server has the first core, the generator the second. h2load (Debian: nghttp2-client) speaks HTTP/2 to servers of
gRPC and HTTP/1.1 to the others, and is written in C, so that its own cost counts little. All of a table was measured in
turns, round after round, in one run; figures are medians, and what is worth reporting is their ratio.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from cells import Cell, make_books
from contenders import BEFORE, Contender, Echo, Mosec, Ours, environment_of, wait_for_idle
from machine import add_machine
from profile_split import split
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
SERVER_CORE, GENERATOR_CORE = 0, 1
IN_FLIGHT = 32
CELLS = (
    Cell("tiny", 1, "encode", "fp32"),
    Cell("ldm-f8", 1, "encode", "fp32"),
    Cell("ldm-f8", 16, "encode", "fp32"),
    Cell("vqgan-f16", 1, "encode", "fp32"),
    Cell("tiny", 1, "decode", "fp32"),
)
# Of 1 and 4 MiB, for what concerns the transport of large messages.
LARGE_CELLS = tuple(
    Cell("vqgan-f16", images, operation, "fp32") for images in (4, 16) for operation in ("encode", "decode")
)
EXPERIMENTS = ("tcp_rcv_lowat", "tcp_frame_size_tuning")
_GRPC_HEADERS = ("-H", "content-type: application/grpc", "-H", "te: trailers")
_SPLIT_S = 3.0


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Start processes on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True)
class Target:
    """Where and what h2load sends."""

    url: str
    body: bytes
    is_grpc: bool

    def arguments(self, in_flight: int, connections: int) -> list[str]:
        """Return the arguments for that many requests in flight."""
        if not self.is_grpc:
            return ["--h1", "-c", str(in_flight), self.url]
        connections = min(connections, in_flight)
        return [*_GRPC_HEADERS, "-c", str(connections), "-m", str(in_flight // connections), self.url]


def target_of(contender: Contender, cell: Cell) -> Target:
    """Return how a contender is asked for a cell."""
    if isinstance(contender, Mosec):
        return Target(f"http://127.0.0.1:{contender.port}/inference", bytes(cell.given), is_grpc=False)
    assert isinstance(contender, (Echo, Ours))
    method = "/bench.Echo/Echo" if isinstance(contender, Echo) else cell.method
    # A message in gRPC's frame: not compressed, then its length.
    body = b"\0" + len(cell.request).to_bytes(4, "big") + cell.request
    return Target(f"http://{contender.target}{method}", body, is_grpc=True)


def check(contender: Contender, cell: Cell) -> None:
    """Ask once for a reply: h2load counts an error of gRPC, which is in the trailers, as a success."""
    if isinstance(contender, Ours):
        with grpc.insecure_channel(contender.target) as channel:
            channel.unary_unary(cell.method)(cell.request, timeout=30)


def rate(target: Target, folder: Path, seconds: float, connections: int) -> float:
    """Return the requests a second with IN_FLIGHT in flight."""
    text = _h2load(target, folder, target.arguments(IN_FLIGHT, connections), seconds)
    return float(_found(r"finished in .*?, ([\d.]+) req/s", text))


def alone_us(target: Target, folder: Path, seconds: float) -> float:
    """Return the median time of a request, with one in flight, in microseconds."""
    log = folder / "requests.log"
    log.unlink(missing_ok=True)
    _h2load(target, folder, ["--log-file", str(log), *target.arguments(1, 1)], seconds)
    times = [int(line.split("\t")[2]) for line in log.read_text().splitlines()]
    # The first ones find a connection that is being opened.
    return statistics.median(times[len(times) // 10 :])


def _h2load(target: Target, folder: Path, arguments: list[str], seconds: float) -> str:
    (folder / "body").write_bytes(target.body)
    command = [
        "h2load",
        "-t",
        "1",
        "-D",
        f"{round(seconds * 1000)}ms",
        "--warm-up-time",
        "500ms",
        "-d",
        str(folder / "body"),
        *arguments,
    ]
    with pinned(GENERATOR_CORE):
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 60).stdout
    done, failed = (int(_found(rf"(\d+) {word}", text)) for word in ("succeeded", "failed"))
    # Requests in flight at the end count as failed ones.
    if not done or failed > IN_FLIGHT:
        raise RuntimeError(f"{target.url}: {text}")
    return text


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"h2load printed no {pattern!r}: {text}")
    return match[1]


@dataclass
class Figures:
    """What was measured of one contender and cell."""

    rates: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    split: str = ""


def contenders(stack: ExitStack, folder: Path, cell: Cell, options: argparse.Namespace) -> list[Contender]:
    """Start those of one cell."""
    with pinned(SERVER_CORE):
        made: list[Contender] = [stack.enter_context(Ours(folder))]
        if options.before is not None:
            made.append(stack.enter_context(Ours(folder, name=BEFORE, checkout=options.before)))
        if options.experiments:
            for names in (*((name,) for name in EXPERIMENTS), EXPERIMENTS):
                os.environ["GRPC_EXPERIMENTS"] = ",".join(names)
                made.append(stack.enter_context(Ours(folder, name=f"vqserve, {' and '.join(names)}")))
            os.environ.pop("GRPC_EXPERIMENTS")
            return made
        made += [stack.enter_context(Echo(kind, cell.reply_bytes + 120)) for kind in ("queue", "sync")]
        if environment_of("mosec").exists():
            made.append(stack.enter_context(Mosec(folder, cell, "ours")))
    return made


def measure_cell(cell: Cell, folder: Path, options: argparse.Namespace) -> dict[str, Figures]:
    """Measure all contenders of a cell, in turns."""
    figures: dict[str, Figures] = {}
    with ExitStack() as stack:
        started = contenders(stack, folder, cell, options)
        for contender in started:
            check(contender, cell)
        for turn in range(options.rounds):
            for contender in started[:: -1 if turn % 2 else 1]:
                target, figure = target_of(contender, cell), figures.setdefault(contender.name, Figures())
                wait_for_idle()
                figure.rates.append(rate(target, folder, options.seconds, options.connections))
                figure.alone.append(alone_us(target, folder, options.seconds))
                if isinstance(contender, Ours):
                    with pinned(GENERATOR_CORE):
                        figure.own.append(contender.rate(cell, IN_FLIGHT, options.seconds))
        for contender in started if options.split else ():
            target = target_of(contender, cell)
            figures[contender.name].split = split(
                contender.pid, _SPLIT_S, lambda target=target: rate(target, folder, _SPLIT_S + 1, options.connections)
            )
    return figures


def table(cell: Cell, figures: dict[str, Figures]) -> list[str]:
    """Return the lines of a cell; ratios are to the first contender."""
    ours = statistics.median(figures["vqserve"].rates)
    lines = []
    for name, figure in figures.items():
        requests = statistics.median(figure.rates)
        own = f"{statistics.median(figure.own):.0f}" if figure.own else "-"
        lines.append(
            f"| {cell.name} | {name} | {requests:.0f} | {1e6 / requests:.0f} | {ours / requests:.2f} | "
            f"{statistics.median(figure.alone):.0f} | {own} | {figure.split or '-'} |"
        )
    return lines


HEAD = (
    "| request | server | requests/s | us a request | vqserve over it | alone, p50 us | requests/s, our generator | "
    "time by perf |",
    "|---|---|---|---|---|---|---|---|",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="only those whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--connections", type=int, default=4, help="of HTTP/2, among which the requests are divided")
    parser.add_argument("--before", type=Path, help="another checkout, installed, whose server is measured in turn")
    parser.add_argument("--experiments", action="store_true", help="gRPC's experiments for large messages instead")
    parser.add_argument("--split", action="store_true", help="where the server's time goes, by perf")
    add_machine(parser)
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        sys.exit("h2load is not installed: `apt-get install nghttp2-client`")
    if (os.cpu_count() or 1) < 2:
        sys.exit("two cores are needed: one for the servers, one for the generator")
    every = LARGE_CELLS if options.experiments else CELLS
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_books(folder)
        for cell in tqdm([cell for cell in every if not options.cells or any(n in cell.name for n in options.cells)]):
            lines += (made := table(cell, measure_cell(cell, folder, options)))
            tqdm.write("\n".join(made))
    what = "gRPC's experiments" if options.experiments else "Capacity"
    report = [
        f"# {what} on {options.machine}",
        "",
        f"The server on one core, h2load on another, {IN_FLIGHT} requests in flight; medians of {options.rounds}.",
        "",
        *HEAD,
        *lines,
        "",
    ]
    print("\n".join(report))
    if not options.cells:
        name = "experiments" if options.experiments else "capacity"
        (RESULTS / f"{name}-{options.machine}.md").write_text("\n".join(report))


if __name__ == "__main__":
    main()
