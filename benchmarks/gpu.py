"""All that is to be known of a GPU in its first minutes: exactness, the search beside its peers, the server.

    python benchmarks/gpu.py --minutes 8

It checks every search backend on rows that are easy to get wrong, times the searches of well-known codebooks, and the
server with several workers. The table is written after every step, so that it holds what there is when time is up.
Without a GPU (`--device cpu`, with few rows) it runs from end to end, too: that is how it is tested.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from cells import Cell, make_books
from contenders import Echo, Ours
from gpu_busy import Busy
from hard_rows import hard_rows
from search import SHAPES, make_rows, wait
from search_peers import Search, peers

from vqserve_bench import ClosedLoop, Request, Schedule, measure
from vqserve_server.search import Objective, SearchCounts, Searcher, available, prepare

RESULTS = Path(__file__).parent / "results"
# The most telling first: time may be up before the last.
ROWS = (65536, 1, 1024, 1 << 20, 16384, 64, 262144)
# Beside those of well-known codebooks: a small one, an odd dimension, many codes.
MORE_SHAPES = {"tiny": (16, 4), "odd": (1000, 17), "large": (262144, 18)}
# The part of the time after which exactness, and after which the search, gives way to the next part.
EXACT_UNTIL, SEARCH_UNTIL = 0.35, 0.75
# Peers that build the whole matrix are not run where it is larger.
MAX_MATRIX_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
CHUNK_ROWS = {"cpu": 1 << 10, "cuda": 1 << 18}
# Rows of each shape that the CPU's search decides as well: another program on another processor.
CPU_ROWS = 1 << 26
ROUND_SECONDS = 0.03
CALLERS = 64


@dataclass
class Run:
    """The options, the time that is left, and the report."""

    options: argparse.Namespace
    started: float = field(default_factory=time.monotonic)
    sections: dict[str, list[str]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    def has_time(self, share: float = 1.0) -> bool:
        """Return whether this share of the time is not over."""
        return time.monotonic() - self.started < share * self.options.minutes * 60

    def emit(self, record: logging.LogRecord) -> None:
        """Note a warning: a search that has fallen back is exact, too, but is not what is to be measured."""
        self.say(record.getMessage())
        self.write("Warnings", [*self.sections.get("Warnings", []), f"- {record.getMessage()}"])

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)

    def write(self, title: str, lines: list[str]) -> None:
        """Replace a section of the report, and write the report."""
        self.sections[title] = lines
        text = [f"# A GPU: {self.options.machine}", "", *about(self.device), ""]
        for name, body in self.sections.items():
            text += [f"## {name}", "", *body, ""]
        self.options.out.mkdir(parents=True, exist_ok=True)
        (self.options.out / f"gpu-{self.options.machine}.md").write_text("\n".join(text))


def about(device: torch.device) -> list[str]:
    """Say what was measured on, and with what."""
    if device.type != "cuda":
        return [f"No GPU: {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}."]
    properties = torch.cuda.get_device_properties(device)
    size = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
    software = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    return [f"{properties.name} (sm_{properties.major}{properties.minor}, {size}), {os.cpu_count()} cores, {software}."]


def books(run: Run, shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Return the codebooks of the shapes that were asked for, on the device."""
    generator = torch.Generator().manual_seed(0)
    chosen = {name: shape for name, shape in shapes.items() if not run.options.shapes or name in run.options.shapes}
    return {name: torch.randn(shape, generator=generator).to(run.device) for name, shape in chosen.items()}


@dataclass
class Case:
    """A codebook and an objective: the searches that are compared, and what was found.

    Attributes:
        name: of the codebook.
        codes: the codebook.
        bias: added to the scores; None for L2.
        searchers: every backend of the device.
        on_cpu: the CPU's own search.
        rows: rows that were checked.
        rows_on_cpu: those that the CPU's search decided as well.
        wrong: rows that a backend, or "CPU", decided otherwise than the reference.
        counts: of the fastest backend.
    """

    name: str
    codes: torch.Tensor
    objective: Objective
    rows: int = 0
    rows_on_cpu: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    counts: SearchCounts = field(default_factory=SearchCounts)

    def __post_init__(self) -> None:
        self.bias = None if self.objective is Objective.L2 else self.codes[:, 0].contiguous()

    @cached_property
    def searchers(self) -> dict[str, Searcher]:
        options = {"objective": self.objective, "bias": self.bias}
        return {name: prepare(self.codes, backend=name, **options) for name in available(self.codes.device)}

    def check(self, count: int, generator: torch.Generator) -> None:
        rows = hard_rows(self.codes, self.bias, count, generator)
        expected = self.searchers["reference"].search(rows)
        for place, (name, searcher) in enumerate(self.searchers.items()):
            if name != "reference":
                winners = searcher.search(rows, SearchCounts() if place else self.counts)
                self.wrong[name] += int((winners != expected).sum())
        if not self.rows:
            self.rows_on_cpu = few = min(count, max(256, CPU_ROWS // self.codes.numel()))
            bias = None if self.bias is None else self.bias.cpu()
            on_cpu = prepare(self.codes.cpu(), objective=self.objective, bias=bias).search(rows[:few].cpu())
            self.wrong["CPU"] += int((on_cpu != expected[:few].cpu()).sum())
        self.rows += count


def exactness(run: Run) -> None:
    """Compare every backend with float64 and beyond, and that with the CPU's search; count wrong rows."""
    generator = torch.Generator(run.device).manual_seed(1)
    every = books(run, SHAPES | MORE_SHAPES).items()
    cases = [Case(name, codes, objective) for name, codes in every for objective in Objective]
    wanted = -(-run.options.exact_rows // max(1, len(cases)))
    while unfinished := [case for case in cases if case.rows < wanted]:
        for case in unfinished:
            if not run.has_time(EXACT_UNTIL):
                return
            case.check(min(CHUNK_ROWS[run.device.type], wanted - case.rows), generator)
            wrong = f"wrong {case.wrong.total()}"
            run.say(f"exactness: {case.name}, {case.objective}, {'-'.join(case.searchers)}: {case.rows} rows, {wrong}")
            run.write("Exactness", exactness_table(cases))


def exactness_table(cases: Sequence[Case]) -> list[str]:
    fast = [name for name in cases[0].searchers if name != "reference"]
    lines = [
        f"{sum(case.rows for case in cases):,} rows, compared with float64 and, where it leaves a row open, more bits.",
        "Of a thousand rows 30 are near-ties and 4 extreme. The CPU's search decides the first rows of a codebook.",
        "",
        "| codebook | objective | rows | re-checked | "
        + " | ".join(f"{name}: wrong" for name in fast)
        + " | CPU: wrong |",
        "|---" * (5 + len(fast)) + "|",
    ]
    for case in cases:
        if case.rows:
            size = f"{case.name} {case.codes.shape[0]}x{case.codes.shape[1]}"
            share = f"{case.counts.rechecked / max(case.counts.rows, 1):.2%}"
            wrong = " | ".join(str(case.wrong[name]) for name in fast)
            on_cpu = f"{case.wrong['CPU']} of {case.rows_on_cpu}"
            lines.append(f"| {size} | {case.objective} | {case.rows} | {share} | {wrong} | {on_cpu} |")
    return lines


def searching(run: Run) -> None:
    """Time the search and its peers, for every codebook and number of rows."""
    generator = torch.Generator().manual_seed(2)
    found: dict[str, dict[str, Search]] = {}
    lines: list[tuple[int, int, str]] = []
    backends = [name for name in available(run.device) if name != "reference"]
    every = books(run, SHAPES)
    for turn, count in enumerate(run.options.rows):
        for place, (name, codes) in enumerate(every.items()):
            if not run.has_time(SEARCH_UNTIL):
                return
            if name not in found:
                ours = {f"ours ({backend})": prepare(codes, backend=backend).search for backend in backends}
                found[name] = ours | peers(codes, run.options.peers)
            rows = make_rows("random", codes.cpu(), count, generator).to(run.device)
            times = times_of(run, found[name], rows, matrix_bytes=4 * count * len(codes))
            lines.append((place, turn, search_line(f"{name} {codes.shape[0]}x{codes.shape[1]}", count, times)))
            run.say(f"search: {lines[-1][2]}")
            run.write("Search", [*SEARCH_HEAD, *(line for *_, line in sorted(lines))])


SEARCH_HEAD = [
    "Milliseconds of a call, the best first; rows and results stay on the device. All but ours round: they may give",
    "another code at a near-tie.",
    "",
    "| codebook | rows | ours | ours, million rows/s | fastest peer / ours | all, ms |",
    "|---|---|---|---|---|---|",
]


def times_of(run: Run, searches: dict[str, Search], rows: torch.Tensor, *, matrix_bytes: int) -> dict[str, float]:
    """Return the seconds of a call of each search that can take the rows; leave out, for good, what fails."""
    times = {}
    for name, search in list(searches.items()):
        if name in ("translation", "torch.compile") and matrix_bytes > MAX_MATRIX_BYTES[run.device.type]:
            continue
        try:
            times[name] = seconds_of(search, rows)
        except Exception as error:
            # Whatever is wrong with a peer, the others can be measured.
            run.say(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[:1]}")
            del searches[name]
    return times


def seconds_of(search: Search, rows: torch.Tensor) -> float:
    """Return the median time of a call, in rounds of calls without a pause."""
    search(rows)
    wait(rows.device)
    rounds, repeats = [], 1
    for turn in range(4):
        start = time.perf_counter()
        for _ in range(repeats):
            search(rows)
        wait(rows.device)
        taken = (time.perf_counter() - start) / repeats
        if turn == 0:
            repeats = max(1, min(1000, int(ROUND_SECONDS / max(taken, 1e-7))))
        else:
            rounds.append(taken)
    return statistics.median(rounds)


def search_line(book: str, count: int, times: dict[str, float]) -> str:
    ours = {name: seconds for name, seconds in times.items() if name.startswith("ours")}
    others = {name: seconds for name, seconds in times.items() if name not in ours}
    if not ours:
        return f"| {book} | {count} | - | - | - | - |"
    own = min(ours.values())
    best = min(others, key=others.__getitem__, default=None)
    ratio = "-" if best is None else f"{others[best] / own:.2f} ({best})"
    every = ", ".join(f"{name} {seconds * 1e3:.3g}" for name, seconds in sorted(times.items(), key=lambda one: one[1]))
    return f"| {book} | {count} | {own * 1e3:.3g} | {count / own / 1e6:.3g} | {ratio} | {every} |"


def serving(run: Run) -> None:
    """Measure the server with 1, 2, 4 and 8 workers, beside an echo of the same bytes."""
    wanted = [cell for cell in CELLS if not run.options.shapes or cell.book in run.options.shapes]
    counts: list[int] = run.options.workers
    cores = len(os.sched_getaffinity(0))
    rates: dict[str, dict[str, str]] = {cell.name: {} for cell in wanted}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_books(folder)
        for count in counts:
            if not wanted or not run.has_time():
                return
            with Ours(folder, "--device", str(run.device), "--workers", str(count)) as server:
                for cell in wanted:
                    load = {"connections": 2 * count, "processes": max(1, min(count, cores // 2))}
                    with Busy() as busy:
                        rate = load_of(run, server.target, cell.method, cell, **load)
                    rates[cell.name][f"{count} workers"] = f"{rate:.0f} ({busy})"
                    run.say(f"serving: {cell.name}, {count} workers: {rate:.0f} requests/s, GPU busy {busy}")
                    run.write("Server", serving_table(rates, counts))
    for cell in wanted:
        if not run.has_time():
            return
        with Echo("sync", cell.reply_bytes + 120) as echo:
            rate = load_of(run, echo.target, "/bench.Echo/Echo", cell, connections=2, processes=1)
        rates[cell.name]["echo"] = f"{rate:.0f}"
        run.say(f"serving: {cell.name}, echo: {rate:.0f} requests/s")
        run.write("Server", serving_table(rates, counts))


CELLS = [Cell("tiny", 1, "encode", "fp32"), Cell("ldm-f8", 1, "encode", "fp32"), Cell("ldm-f8", 16, "encode", "fp32")]
CELLS += [Cell("vqgan-f16", 16, operation, "bf16") for operation in ("encode", "decode")]


def load_of(run: Run, target: str, method: str, cell: Cell, *, connections: int, processes: int) -> float:
    measured = measure(
        target,
        method,
        [Request(cell.request)],
        ClosedLoop(CALLERS),
        schedule=Schedule(warmup_s=run.options.seconds / 3, window_s=run.options.seconds, max_windows=1),
        connections=connections,
        processes=processes,
        max_message_bytes=(1 << 31) - 1,
    )
    return measured.requests_per_s


def serving_table(rates: dict[str, dict[str, str]], counts: Sequence[int]) -> list[str]:
    names = [*(f"{count} workers" for count in counts), "echo"]
    lines = [
        f"Requests a second of {CALLERS} callers, and how busy the GPU was. The echo of the same bytes is one process.",
        "",
        "| request | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    return [
        *lines,
        *(f"| {cell} | {' | '.join(own.get(name, '-') for name in names)} |" for cell, own in rates.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which it ends, with what it has (8)")
    parser.add_argument("--exact-rows", type=int, default=10_000_000, help="rows to check, of all codebooks (10^7)")
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS, help="numbers of rows to time, in this order")
    parser.add_argument("--shapes", nargs="*", help="only these codebooks")
    parser.add_argument("--peers", nargs="*", help="only these peers, by the names of the table")
    parser.add_argument("--workers", nargs="*", type=int, default=(1, 2, 4, 8))
    parser.add_argument("--seconds", type=float, default=1.5, help="for which each load of the server lasts (1.5)")
    parser.add_argument("--machine", help="name for the results (default: the GPU's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if options.machine is None:
        is_cuda = torch.device(options.device).type == "cuda"
        options.machine = torch.cuda.get_device_name(options.device) if is_cuda else "none"
    options.machine = options.machine.replace(" ", "-")
    run = Run(options)
    handler = logging.Handler(logging.WARNING)
    handler.emit = run.emit  # type: ignore[method-assign]
    logging.getLogger("vqserve_server").addHandler(handler)
    run.say(about(run.device)[0])
    for part in (exactness, searching, serving):
        part(run)
    run.say("done" if run.has_time() else "time is up")


if __name__ == "__main__":
    main()
