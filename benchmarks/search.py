"""Exact search beside the inexact ones: rows per second, memory, rows looked at twice. `make bench-search`.

Every cell compares in one process and one run, in turns; figures are medians. Compare ratios, not times.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import add_machine
from search_peers import MAX_MATRIX_BYTES, Search, peers
from tqdm import tqdm

from vqserve_server import Tokenizer
from vqserve_server.search import SearchCounts, available, prepare

SHAPES = {
    "ldm-f4": (8192, 3),
    "ldm-f8": (16384, 4),
    "llamagen": (16384, 8),
    "amused": (8192, 64),
    "encodec": (1024, 128),
    "vqgan-f16": (1024, 256),
    "vqgan-f16-16k": (16384, 256),
}
ROWS = (1, 64, 1024, 4096, 16384, 65536)
KINDS = ("random", "near codes", "clustered")
RESULTS = Path(__file__).parent / "results"
OURS = "ours, exact"
# Seconds for all rounds of a cell, and how many rounds.
CELL_SECONDS = 3.0
ROUNDS = (2, 3)
# OpenMP's threads spin for a while after a peer's call, on a core that the next one needs.
PAUSE_SECONDS = 0.25
# How long each search goes on before it is timed, and while it is.
STEADY_SECONDS = 0.1


@dataclass(frozen=True)
class Cell:
    """One comparison: median seconds of each peer, the median of the pairwise ratios to ours, and our counts."""

    codebook: str
    kind: str
    rows: int
    seconds: dict[str, float]
    counts: SearchCounts

    @property
    def best(self) -> str:
        return min((name for name in self.seconds if name != OURS), key=self.seconds.__getitem__)

    @property
    def ratio(self) -> float:
        """Our rows per second over those of the fastest inexact peer."""
        return self.seconds[self.best] / self.seconds[OURS]


def make_rows(kind: str, codes: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    shape = count, codes.shape[1]
    if kind == "random":
        return torch.randn(shape, generator=generator) * codes.std() + codes.mean(0)
    picked = torch.randint(len(codes), (count,), generator=generator)
    if kind == "near codes":
        return codes[picked] + 0.05 * codes.std() * torch.randn(shape, generator=generator)
    centres = codes[picked % 16]
    return centres + 0.3 * codes.std() * torch.randn(shape, generator=generator)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_once(search: Search, rows: torch.Tensor) -> float:
    start = time.perf_counter()
    search(rows)
    wait(rows.device)
    return time.perf_counter() - start


def compare(codebook: str, kind: str, searches: dict[str, Search], rows: torch.Tensor, counts: SearchCounts) -> Cell:
    # The first call also warms up; it only decides how often to repeat.
    first = {name: time_once(search, rows) for name, search in searches.items()}
    rounds = int(min(max(CELL_SECONDS / max(sum(first.values()), 1e-6), ROUNDS[0]), ROUNDS[1]))
    # A small call is repeated, so that the clock and the first touch of the caches don't show.
    repeats = {name: max(1, int(STEADY_SECONDS / max(seconds, 1e-7))) for name, seconds in first.items()}
    times: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(rounds):
        for name, search in searches.items():
            time.sleep(PAUSE_SECONDS)
            # As in a server that is at work: caches are warm, and so are cores, which take milliseconds to come when
            # they have slept.
            for _ in range(repeats[name]):
                search(rows)
            wait(rows.device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                search(rows)
            wait(rows.device)
            times[name].append((time.perf_counter() - start) / repeats[name])
    return Cell(codebook, kind, len(rows), {name: statistics.median(t) for name, t in times.items()}, counts)


def codebooks(folder: str | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if folder is None:
        return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".safetensors":
            tokenizer = Tokenizer.load(path, device="cpu")
            every_code = torch.arange(tokenizer.info.num_codes)
            found[path.stem] = tokenizer.decode(every_code, output="code_rows")
        elif path.suffix in (".npy", ".npz"):
            loaded = np.load(path, allow_pickle=False)
            arrays = {"": loaded} if path.suffix == ".npy" else dict(loaded)
            for key, array in arrays.items():
                flat = array.reshape(-1, *array.shape[-2:]) if array.ndim >= 2 else ()
                for stage, codes in enumerate(flat):
                    if codes.dtype.kind == "f" and len(codes) > 1:
                        found[f"{path.stem}:{key}:{stage}"] = torch.from_numpy(codes.astype(np.float32))
    return found


PEAK = """
import re, sys, torch, numpy as np
from vqserve_server.search import prepare
k, d, n = map(int, sys.argv[1:4])
searcher = prepare(torch.randn(k, d), backend=sys.argv[4])
rows = torch.randn(n, d)
searcher.search(rows[:64])
status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
searcher.search(rows)
print((status("VmHWM") - before) / 1024 - n * 8 / 2**20)
"""


def memory_peaks(backends: tuple[str, ...]) -> list[str]:
    """Return table rows: MiB that a search takes beside codebook, rows and result, each in a process of its own."""
    lines = [
        "| K x D | rows (native; others at most 1024) | " + " | ".join(backends) + " |",
        "|---|---|" + "---|" * len(backends),
    ]
    for k, d, n in ((262144, 3, 65536), (262144, 8, 4096), (262144, 64, 1024), (262144, 256, 512), (16384, 4, 1 << 20)):
        peaks = []
        for backend in backends:
            # The others are too slow for as many rows; what they take does not depend on them beyond a tile.
            count = n if backend == "native" else min(n, 1024)
            command = [sys.executable, "-c", PEAK, *map(str, (k, d, count)), backend]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append(f"{float(done.stdout):.1f}")
        lines.append(f"| {k}x{d} | {n} | " + " | ".join(peaks) + " |")
    return lines


def table(cells: list[Cell]) -> list[str]:
    names = [OURS, *dict.fromkeys(name for cell in cells for name in cell.seconds if name != OURS)]
    lines = [
        "| codebook | rows | " + " | ".join(f"{name}, ms" for name in names) + " | fastest peer / ours | re-checked |",
        "|---|---|" + "---|" * (len(names) + 2),
    ]
    for cell in cells:
        times = " | ".join(f"{cell.seconds[n] * 1e3:.3g}" if n in cell.seconds else "-" for n in names)
        again = cell.counts.rechecked / max(cell.counts.rows, 1)
        lines.append(f"| {cell.codebook} | {cell.rows} | {times} | **{cell.ratio:.2f}** ({cell.best}) | {again:.2%} |")
    return lines


def plot(cells: list[Cell], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    books = list(dict.fromkeys(cell.codebook for cell in cells))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for book in books:
        own = [cell for cell in cells if cell.codebook == book and cell.kind == "random"]
        axes.plot([c.rows for c in own], [c.ratio for c in own], marker="o", label=book)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="rows in a call", ylabel="rows/s over the fastest inexact peer's")
    axes.set_title("Exact search beside the fastest inexact one (above 1: ours is faster)")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codebooks", help="a folder of .npy, .npz or codebook files instead of the seven shapes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="*", help="only these of the seven")
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    add_machine(parser)
    options = parser.parse_args()
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(1)
    cells: list[Cell] = []
    books = codebooks(options.codebooks)
    for name, codes in tqdm(books.items()):
        if options.shapes and name not in options.shapes:
            continue
        ours = prepare(codes.to(device))
        searches: dict[str, Search] = {OURS: ours.search} | peers(codes.to(device))
        for kind in KINDS:
            for count in options.rows if kind == "random" else (4096,):
                rows = make_rows(kind, codes, count, generator).to(device)
                counts = SearchCounts()
                ours.search(rows, counts)
                fit = {
                    peer: search
                    for peer, search in searches.items()
                    if peer not in ("translation", "torch.compile") or count * len(codes) * 4 <= MAX_MATRIX_BYTES
                }
                cells.append(compare(f"{name} {len(codes)}x{codes.shape[1]}", kind, fit, rows, counts))
    report = [f"# Search on {options.machine} ({device.type}, {torch.get_num_threads()} threads)", ""]
    for kind in KINDS:
        report += [f"## Rows: {kind}", "", *table([cell for cell in cells if cell.kind == kind]), ""]
    if device.type == "cpu" and options.codebooks is None and not options.shapes:
        report += [
            "## Memory of a search beside codebook, rows and result, MiB",
            "",
            *memory_peaks(available("cpu")),
            "",
        ]
    RESULTS.mkdir(exist_ok=True)
    stem = f"search-{options.machine}" + ("-codebooks" if options.codebooks else "")
    (RESULTS / f"{stem}.md").write_text("\n".join(report))
    plot(cells, RESULTS / f"{stem}.png")
    print("\n".join(report))


if __name__ == "__main__":
    main()
