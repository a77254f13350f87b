"""What a table of throughputs does not show: latency alone and under random arrivals, batching, workers, memory,
the start.

`make bench-behaviour`. Ratios of what was measured in one run.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cells import Cell, make_books
from contenders import Echo, Ours
from machine import add_machine
from serving import CALLERS, RESULTS
from starting import starting

from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_bench import ClosedLoop, Measurement, OpenLoop, Request, Schedule, measure

TINY = Cell("tiny", 1, "encode", "fp32")
MIB = 1 << 20


def put(
    target: str, method: str, request: bytes, load: ClosedLoop | OpenLoop, *, seconds: float, processes: int = 1
) -> Measurement:
    schedule = Schedule(warmup_s=0.5, window_s=seconds, max_windows=3, stability=1e-9)
    return measure(
        target,
        method,
        [Request(request)],
        load,
        schedule=schedule,
        processes=processes,
        max_message_bytes=(1 << 31) - 1,
    )


def alone(ours: Ours, seconds: float) -> list[str]:
    """One caller: what a request takes beside the echo of its bytes."""
    lines = ["## One caller", "", "| request | echo p50, ms | vqserve p50, ms | more, ms |", "|---|---|---|---|"]
    for cell in (TINY, Cell("ldm-f8", 1, "encode", "fp32"), Cell("vqgan-f16", 1, "encode", "fp32")):
        with Echo("sync", cell.reply_bytes + 120) as echo:
            pairs = []
            for _ in range(3):
                floor = put(echo.target, "/bench.Echo/Echo", cell.request, ClosedLoop(1), seconds=seconds)
                served = put(ours.target, cell.method, cell.request, ClosedLoop(1), seconds=seconds)
                pairs.append((p50(floor), p50(served)))
        floor_ms, served_ms = (statistics.median(values) for values in zip(*pairs, strict=True))
        lines.append(f"| {cell.name} | {floor_ms:.3f} | {served_ms:.3f} | **{served_ms - floor_ms:.3f}** |")
    return lines


def p50(measured: Measurement) -> float:
    return measured.latency_ms.p50 if measured.latency_ms else float("nan")


def poisson(ours: Ours, seconds: float) -> list[str]:
    """Arrivals at random, at 70 % of what callers in a loop get; of three runs the one with the median ratio."""
    lines = [
        "## Random arrivals at 70 % of the peak (Poisson)",
        "",
        "| request | peak/s | rate/s | p50, ms | p99, ms | p99 / p50 | of the three runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in (TINY, Cell("ldm-f8", 16, "encode", "fp32"), Cell("vqgan-f16", 16, "encode", "fp32")):
        peak = put(ours.target, cell.method, cell.request, ClosedLoop(CALLERS), seconds=seconds).requests_per_s
        load = OpenLoop(0.7 * peak)
        runs = []
        for _ in range(3):
            latency = put(ours.target, cell.method, cell.request, load, seconds=3 * seconds).latency_ms
            if latency is None:
                raise RuntimeError("nothing was answered")
            runs.append((latency.p99 / latency.p50, latency.p50, latency.p99))
        runs.sort()
        ratios = ", ".join(f"{ratio:.1f}" for ratio, _, _ in runs)
        _, middle_p50, middle_p99 = runs[1]
        figures = (
            f"{peak:.0f} | {load.rate:.0f} | {middle_p50:.2f} | {middle_p99:.2f} | **{runs[1][0]:.1f}** | {ratios}"
        )
        lines.append(f"| {cell.name} | {figures} |")
    return lines


def batching(folder: Path, seconds: float, tokenizers: dict[str, object]) -> list[str]:
    """Small requests of many callers, in batches or each alone, beside what the search gains in process."""
    lines = [
        f"## Batching: {CALLERS} callers of 64 tokens",
        "",
        "| codebook | batches/s | alone/s | gain | gain of the search in process, 2048 rows over 64 | share | echo/s |"
        " most that the echo leaves |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rng = np.random.default_rng(0)
    with Ours(folder) as batched, Ours(folder, "--max-batch-rows", "64") as single:
        for name, tokenizer in tokenizers.items():
            width = tokenizer.info.input_dim  # type: ignore[attr-defined]
            rows = rng.standard_normal((2048, width), dtype=np.float32)
            message = pb.EncodeRequest(codebook=name, dtype=1, shape=(64, width), latents=rows[:64].tobytes())
            request = message.SerializeToString()
            with Echo("sync", 64 * 2 + 120) as echo:
                ways = (batched.target, TINY.method), (single.target, TINY.method), (echo.target, "/bench.Echo/Echo")
                rates: tuple[list[float], ...] = [], [], []
                for _ in range(3):
                    for (target, method), into in zip(ways, rates, strict=True):
                        into.append(put(target, method, request, ClosedLoop(CALLERS), seconds=seconds).requests_per_s)
            on, off, floor = (statistics.median(of_way) for of_way in rates)
            encode_rows: Callable[[object], object] = tokenizer.encode_rows  # type: ignore[attr-defined]
            search = rate_of(encode_rows, rows) / rate_of(encode_rows, rows[:64])
            figures = on, off, on / off, search, on / off / search, floor, floor / off
            lines.append(
                "| {} | {:.0f} | {:.0f} | **{:.2f}** | {:.2f} | {:.2f} | {:.0f} | {:.2f} |".format(name, *figures)
            )
    return lines


def rate_of(work: Callable[[object], object], rows: np.ndarray) -> float:
    """Rows a second."""
    work(rows)
    times = []
    ends = time.perf_counter() + 0.5
    while len(times) < 5 or time.perf_counter() < ends:
        start = time.perf_counter()
        work(rows)
        times.append(time.perf_counter() - start)
    return len(rows) / statistics.median(times)


def transports(folder: Path, seconds: float) -> list[str]:
    """The port and a socket file, by turns."""
    lines = ["## Transport", "", "| request | by port/s | by socket file/s | ratio |", "|---|---|---|---|"]
    path = folder / "socket"
    with Ours(folder, "--unix-socket", str(path)) as ours:
        for cell in (TINY, *(Cell("vqgan-f16", images, "encode", "fp32") for images in (1, 16, 64))):
            rates: dict[str, list[float]] = {ours.target: [], f"unix:{path}": []}
            for _ in range(3):
                for target, into in rates.items():
                    into.append(
                        put(target, cell.method, cell.request, ClosedLoop(CALLERS), seconds=seconds).requests_per_s
                    )
            port, file = (statistics.median(values) for values in rates.values())
            lines.append(f"| {cell.name} | {port:.0f} | {file:.0f} | **{file / port:.2f}** |")
    return lines


def workers(folder: Path, seconds: float) -> list[str]:
    """One to as many workers as there are cores, client processes and connections enough for them."""
    cores = len(os.sched_getaffinity(0))
    counts = [n for n in (1, 2, 4, 8, 16) if n <= max(2, cores)]
    lines = ["## Workers", "", "| request | " + " | ".join(f"{n} workers/s" for n in counts) + " |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    for cell in (TINY, Cell("ldm-f8", 16, "encode", "fp32")):
        rates = []
        for count in counts:
            with Ours(folder, "--workers", str(count)) as server:
                schedule = Schedule(warmup_s=0.5, window_s=seconds, max_windows=3, stability=1e-9)
                measured = measure(
                    server.target,
                    cell.method,
                    [Request(cell.request)],
                    ClosedLoop(CALLERS),
                    schedule=schedule,
                    connections=2 * count,
                    processes=max(1, count // 2),
                )
                rates.append(f"{measured.requests_per_s:.0f}")
        lines.append(f"| {cell.name} | {' | '.join(rates)} |")
    return lines


def memory(folder: Path, minutes: float) -> list[str]:
    """Resident memory after minutes at the peak, and what one large request adds to the peak, beside the echo's."""
    large = pb.EncodeRequest(codebook="ldm-f8", dtype=1, shape=(512, 4, 64, 64))
    large.latents = bytes(32 * MIB)
    request = large.SerializeToString()
    reply_bytes = 512 * 64 * 64 * 2
    lines = ["## Memory, MiB", "", "| | vqserve | echo |", "|---|---|---|"]
    with Ours(folder) as ours, Echo("aio", reply_bytes) as echo:
        rises = []
        for server, method in ((ours, TINY.method), (echo, "/bench.Echo/Echo")):
            put(server.target, method, TINY.request, ClosedLoop(4), seconds=0.3)
            reset_peak(server.pid)
            before = status_kib(server.pid, "VmHWM")
            put(server.target, method, request, ClosedLoop(1), seconds=0.5)
            rises.append((status_kib(server.pid, "VmHWM") - before) / 1024)
        lines.append(f"| a request of 32 MiB raises the peak by | **{rises[0]:.0f}** | {rises[1]:.0f} |")
    with Ours(folder) as ours:
        mixed = [Cell("ldm-f8", 16, op, "fp32") for op in ("encode", "decode")] + [
            TINY,
            Cell("vqgan-f16", 1, "encode", "fp32"),
        ]
        for cell in mixed:
            put(ours.target, cell.method, cell.request, ClosedLoop(CALLERS), seconds=2)
        warm = status_kib(ours.pid, "VmRSS") / 1024
        ends = time.monotonic() + 60 * minutes
        while time.monotonic() < ends:
            for cell in mixed:
                put(ours.target, cell.method, cell.request, ClosedLoop(CALLERS), seconds=2)
        after = status_kib(ours.pid, "VmRSS") / 1024
        lines.append(f"| resident after warm-up | {warm:.0f} | |")
        lines.append(f"| after {minutes:g} minutes at the peak | {after:.0f} (**{after - warm:+.0f}**) | |")
    return lines


def status_kib(pid: int, key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    if found is None:
        raise RuntimeError(f"no {key}")
    return int(found[1])


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each of the three windows")
    parser.add_argument("--minutes", type=float, default=10.0, help="at the peak, for the memory")
    add_machine(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizers = make_books(folder)
        report = [f"# Behaviour on {options.machine}"]
        with Ours(folder) as ours:
            for section in (alone, poisson):
                report += ["", *section(ours, options.seconds)]
                print("\n".join(report[-8:]), flush=True)
        report += ["", *batching(folder, options.seconds, dict(tokenizers))]
        report += ["", *transports(folder, options.seconds)]
        report += ["", *workers(folder, options.seconds)]
        report += ["", *memory(folder, options.minutes)]
        report += ["", *starting(folder), ""]
    print("\n".join(report))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"behaviour-{options.machine}.md").write_text("\n".join(report))


if __name__ == "__main__":
    main()
