"""Measurements as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqserve_bench.measurement import Measurement
from vqserve_data.errors import FileError

SUFFIXES = (".png", ".svg", ".pdf")
_PERCENTILES = ("p50", "p90", "p95", "p99")


def check_plot(path: Path) -> None:
    """Check, before anything is measured, that a plot can be drawn.

    Raises:
        FileError: for another kind of file, or without matplotlib.
    """
    if path.suffix not in SUFFIXES:
        raise FileError(f"a plot's name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}: {path}")
    try:
        import matplotlib.figure  # noqa: F401, PLC0415
    except ImportError:
        raise FileError(f"{path} cannot be drawn without matplotlib: pip install 'vqserve[plot]'") from None


def draw(measurements: Sequence[Measurement], path: Path, *, title: str) -> None:
    """Draw latency over throughput, and where the time of an average request went.

    Args:
        measurements: one per load; those without replies are left out.
        path: of the file to make or replace.
        title: of the picture.
    """
    # Not pyplot: it opens windows and has global state.
    from matplotlib.figure import Figure  # noqa: PLC0415

    shown = [measured for measured in measurements if measured.latency_ms is not None]
    figure: Any = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    latency, spent = figure.subplots(1, 2)
    draw_latency(latency, shown)
    _draw_time_spent(spent, shown)
    figure.savefig(path, dpi=150)


def draw_latency(axes: Any, measurements: Sequence[Measurement]) -> None:
    """Draw percentiles of the latency over throughput into matplotlib's axes."""
    for name in _PERCENTILES:
        axes.plot(
            [measured.requests_per_s for measured in measurements],
            [getattr(measured.latency_ms, name) for measured in measurements],
            marker="o",
            label=name,
        )
    tops = [measured.latency_ms.p99 if measured.latency_ms else 0.0 for measured in measurements]
    fastest = max((measured.requests_per_s for measured in measurements), default=0.0)
    for measured, top in zip(measurements, tops, strict=True):
        # Towards the middle, so that it stays inside.
        side = "right" if measured.requests_per_s > fastest / 2 else "left"
        where: Any = {"xytext": (0, 6), "textcoords": "offset points", "ha": side}
        axes.annotate(str(measured.load), (measured.requests_per_s, top), fontsize=8, **where)
    axes.set(xlabel="requests/s", ylabel="latency, ms", title="latency")
    axes.set_xlim(0, 1.1 * fastest or 1.0)
    axes.set_ylim(0, 1.15 * max(tops, default=0.0) or 1.0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_time_spent(axes: Any, measurements: Sequence[Measurement]) -> None:
    names = [str(measured.load) for measured in measurements]
    parts = [time_spent(measured) for measured in measurements]
    bottom = [0.0] * len(names)
    for part in ("server: queue", "server: compute", "server: the rest", "outside the server"):
        heights = [spent.get(part, 0.0) for spent in parts]
        axes.bar(names, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set(ylabel="ms of an average request", title="where the time goes")
    axes.tick_params(axis="x", rotation=20)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()


def time_spent(measured: Measurement) -> dict[str, float]:
    """Return the milliseconds of an average request, by where they were spent.

    A request that was split waits for one part while another is computed, so that the parts may be more than the whole:
    then the rest is 0.
    """
    if measured.latency_ms is None:
        return {}
    server = measured.server
    if server is None:
        return {"outside the server": measured.latency_ms.avg}
    return {
        "server: queue": server.queue_ms,
        "server: compute": server.compute_ms,
        "server: the rest": max(0.0, server.total_ms - server.queue_ms - server.compute_ms),
        "outside the server": max(0.0, measured.latency_ms.avg - server.total_ms),
    }
