"""What the SDK adds to a bare gRPC stub: `make bench-sdk`.

One server. A stub sends bytes that are ready and drops the reply; beside it `Client.encode` and `decode` send and
return arrays: one call at a time, from 32 threads, and `AsyncClient` from 64 tasks beside a stub of grpc.aio. Stub and
SDK take turns in short windows of one run, so that a busy machine slows both. Figures are medians of windows, and the
ratio is the median of the ratios of neighbours. CPU is that of the calling process alone.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cells import Cell, make_books
from contenders import Ours
from machine import add_machine

from vqserve_client import AsyncClient, Client

RESULTS = Path(__file__).parent / "results"
THREADS, TASKS = 32, 64
STUB, SDK = "stub", "SDK"
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
CELLS = tuple(
    Cell(book, images, operation, "fp32")
    for book, images in (("tiny", 1), ("ldm-f8", 1), ("vqgan-f16", 16))
    for operation in ("encode", "decode")
)


@dataclass(frozen=True)
class Window:
    """What one window measured: microseconds of a call, calls a second, microseconds of CPU a call."""

    call_us: float
    rate: float
    cpu_us: float


def alone(call: Callable[[], object], seconds: float) -> Window:
    call()
    times = []
    cpu, began = time.process_time(), time.perf_counter()
    ended = began
    while ended < began + seconds or len(times) < 5:
        call()
        before, ended = ended, time.perf_counter()
        times.append(ended - before)
    return Window(
        statistics.median(times) * 1e6,
        len(times) / (ended - began),
        (time.process_time() - cpu) / len(times) * 1e6,
    )


def from_threads(call: Callable[[], object], seconds: float) -> Window:
    counts = [0] * THREADS
    ready = threading.Barrier(THREADS + 1)
    end = 0.0

    def work(number: int) -> None:
        call()
        ready.wait()
        while time.perf_counter() < end:
            call()
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    end = time.perf_counter() + 60
    ready.wait()
    cpu, began = time.process_time(), time.perf_counter()
    end = began + seconds
    for thread in threads:
        thread.join()
    return _window(sum(counts), time.perf_counter() - began, time.process_time() - cpu, THREADS)


async def from_tasks(call: Callable[[], Awaitable[object]], seconds: float) -> Window:
    await asyncio.gather(*(call() for _ in range(TASKS)))
    count = 0
    cpu, began = time.process_time(), time.perf_counter()
    end = began + seconds

    async def work() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await call()
            count += 1

    await asyncio.gather(*(work() for _ in range(TASKS)))
    return _window(count, time.perf_counter() - began, time.process_time() - cpu, TASKS)


def _window(count: int, wall_s: float, cpu_s: float, callers: int) -> Window:
    return Window(wall_s * callers / count * 1e6, count / wall_s, cpu_s / count * 1e6)


@dataclass(frozen=True)
class Row:
    """The windows of one cell and one way to call, in turn."""

    cell: Cell
    how: str
    windows: dict[str, list[Window]]

    def median(self, name: str, figure: str) -> float:
        return statistics.median(getattr(window, figure) for window in self.windows[name])

    def line(self) -> str:
        pairs = list(zip(self.windows[STUB], self.windows[SDK], strict=True))
        more_us = statistics.median(sdk.call_us - stub.call_us for stub, sdk in pairs)
        ratio = statistics.median(sdk.rate / stub.rate for stub, sdk in pairs)
        figures = [
            self.cell.name,
            self.how,
            *(f"{self.median(name, 'call_us'):.0f}" for name in (STUB, SDK)),
            f"**{more_us:+.0f}**" if self.how == "alone" else f"{more_us:+.0f}",
            *(f"{self.median(name, 'rate'):.0f}" for name in (STUB, SDK)),
            f"**{ratio:.2f}**",
            *(f"{self.median(name, 'cpu_us'):.0f}" for name in (STUB, SDK)),
        ]
        return f"| {' | '.join(figures)} |"


HEAD = [
    "request",
    "calls",
    "stub, us",
    "SDK, us",
    "SDK more, us",
    "stub/s",
    "SDK/s",
    "SDK over stub",
    "stub, CPU us",
    "SDK, CPU us",
]


def in_turn(measured: dict[str, Callable[[], Window]], rounds: int) -> dict[str, list[Window]]:
    windows: dict[str, list[Window]] = {name: [] for name in measured}
    for turn in range(rounds):
        for name in list(measured)[:: -1 if turn % 2 else 1]:
            windows[name].append(measured[name]())
    return windows


def blocking_rows(target: str, cell: Cell, rounds: int, seconds: float) -> list[Row]:
    with ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(target, options=UNLIMITED))
        client = stack.enter_context(Client(target, codebook=cell.book))
        stub = channel.unary_unary(cell.method)
        calls: dict[str, Callable[[], object]] = {STUB: lambda: stub(cell.request), SDK: cell.call(client)}
        return [
            Row(cell, how, in_turn({name: _bound(work, call, seconds) for name, call in calls.items()}, rounds))
            for how, work in (("alone", alone), (f"{THREADS} threads", from_threads))
        ]


def _bound(work: Callable[..., Window], call: Callable[[], object], seconds: float) -> Callable[[], Window]:
    return lambda: work(call, seconds)


def awaited_row(target: str, cell: Cell, rounds: int, seconds: float) -> Row:
    async def measured() -> dict[str, list[Window]]:
        async with AsyncExitStack() as stack:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target, options=UNLIMITED))
            client = await stack.enter_async_context(AsyncClient(target, codebook=cell.book))
            stub, method = channel.unary_unary(cell.method), getattr(client, cell.operation)
            calls: dict[str, Callable[[], Any]] = {
                STUB: lambda: stub(cell.request),
                SDK: lambda: method(cell.array),
            }
            windows: dict[str, list[Window]] = {name: [] for name in calls}
            for turn in range(rounds):
                for name in list(calls)[:: -1 if turn % 2 else 1]:
                    windows[name].append(await from_tasks(_awaitable(calls[name]), seconds))
            return windows

    return Row(cell, f"{TASKS} tasks", asyncio.run(measured()))


def _awaitable(call: Callable[[], Any]) -> Callable[[], Awaitable[object]]:
    async def once() -> object:
        return await call()

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", help="only those whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each window")
    add_machine(parser)
    options = parser.parse_args()
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        make_books(Path(scratch))
        with Ours(Path(scratch)) as server:
            for cell in CELLS:
                if options.cells and not any(name in cell.name for name in options.cells):
                    continue
                rows = blocking_rows(server.target, cell, options.rounds, options.seconds)
                rows.append(awaited_row(server.target, cell, options.rounds, options.seconds))
                lines += [row.line() for row in rows]
                print("\n".join(lines[-len(rows) :]), flush=True)
    if not options.cells:
        RESULTS.mkdir(exist_ok=True)
        notes = f"Medians of {options.rounds} pairs of windows of {options.seconds:g} s, stub and SDK in turn."
        report = [f"# The SDK beside a bare stub on {options.machine}", "", notes, "", *lines, ""]
        (RESULTS / f"sdk-{options.machine}.md").write_text("\n".join(report))


if __name__ == "__main__":
    main()
