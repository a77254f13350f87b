"""`vqserve bench`: measures a server and prints the results."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

from vqserve.codebook_info import CodebookInfo
from vqserve.errors import VqserveError
from vqserve_bench import arguments
from vqserve_bench.arguments import add_arguments
from vqserve_bench.job import Job
from vqserve_bench.measure import run as measure_job
from vqserve_bench.measurement import Measurement
from vqserve_bench.plot import check_plot, draw
from vqserve_bench.report import report, to_json
from vqserve_bench.table import Table, number
from vqserve_bench.trial import Trial
from vqserve_bench.window import Window
from vqserve_bench.workload import Workload, grid_text
from vqserve_client.arguments import connection
from vqserve_client.catalogue import choose
from vqserve_client.client import Client
from vqserve_client.config import ClientConfig, client_config
from vqserve_data.files import check_output

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Measure one load after the other, print a row for each, write the requested files; return 0.

    Raises:
        VqserveError: if the server does not answer, or any request failed.
        FileError: if a file cannot be read or made, or a plot not be drawn.
        KeyboardInterrupt: after the results so far are printed and written.
    """
    for path in (args.json, args.plot):
        if path is not None:
            check_output(path, force=args.force, source=args.data)
    if args.plot is not None:
        check_plot(args.plot)
    config = client_config(**connection(args), max_message_bytes=args.max_message_bytes)
    with Client(**connection(args)) as client:
        info = choose(client.codebooks(), args.codebook, args.digest, target=args.target)
    workload = arguments.workload(args)
    jobs = _jobs(args, workload, info, config)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    title, table = _title(workload, info), Table([job.load for job in jobs])
    print(f"{title}\n\n{table.heads()}", flush=True)
    measurements: list[Measurement] = []
    try:
        for measured in _measured(jobs, processes=args.processes, progress=args.progress):
            measurements.append(measured)
            print(table.row(measured), flush=True)
    finally:
        # Results from before Ctrl-C, or before the server stopped, are kept.
        if measurements and args.json is not None:
            settings = arguments.settings(args)
            whole = report(measurements, target=args.target, codebook=info, settings=settings, began=began)
            args.json.write_text(to_json(whole))
        if measurements and args.plot is not None:
            draw(measurements, args.plot, title=title)
    _check_errors(measurements, args.target)
    return 0


def _jobs(args: argparse.Namespace, workload: Workload, info: CodebookInfo, config: ClientConfig) -> list[Job]:
    requests = workload.requests(info, config)
    return [
        Job(
            config=config,
            method=workload.path(stream=args.streams > 0),
            requests=requests,
            load=load,
            schedule=arguments.schedule(args),
            streams=args.streams,
            connections=args.connections,
            read_stats=workload.read_stats,
            seed=args.seed,
        )
        for load in arguments.loads(args)
    ]


def _measured(jobs: Sequence[Job], *, processes: int, progress: bool) -> Iterator[Measurement]:
    for job in jobs:
        interruption: KeyboardInterrupt | None = None
        with _watching(job, shown=progress) as watch:
            trial = Trial(job.load, job.schedule, watch)
            try:
                measure_job(job, trial, processes=processes)
            except KeyboardInterrupt as error:
                interruption = error
        if interruption is None or trial.windows:
            yield trial.measurement()
        if interruption is not None:
            raise interruption


@contextlib.contextmanager
def _watching(job: Job, *, shown: bool) -> Iterator[Callable[[Window], None]]:
    """Yield a function that takes each window and shows progress, or does nothing."""
    if not shown:
        yield lambda _: None
        return
    from tqdm import tqdm  # noqa: PLC0415

    form = "{desc}: window {n_fmt} of at most {total_fmt}{postfix}"
    with tqdm(total=job.schedule.max_windows, desc=str(job.load), bar_format=form, leave=False, file=sys.stderr) as bar:
        bar.set_postfix_str("warm-up")
        # The warm-up is not counted.
        numbers = itertools.count()

        def watch(window: Window) -> None:
            bar.n = next(numbers)
            bar.set_postfix_str(f"{number(window.requests_per_s)} requests/s, {number(window.mean_latency_s * 1e3)} ms")

        yield watch


def _title(workload: Workload, info: CodebookInfo) -> str:
    grids = ", ".join(grid_text(grid) for grid in workload.grids)
    data = "random data" if workload.data is None else repr(workload.data.name)
    return (
        f"{workload.method} {grids} tokens, {workload.dtype}, {data}; codebook {info.name!r}: {info.kind}, {info.size}"
    )


def _check_errors(measurements: Sequence[Measurement], target: str) -> None:
    """Raise if any request failed."""
    errors: Counter[str] = Counter()
    texts: dict[str, str] = {}
    for measured in measurements:
        errors.update(measured.errors)
        texts = {**measured.error_texts, **texts}
    if errors:
        each = "; ".join(f"{count} {name} ({texts[name]})" for name, count in errors.most_common())
        raise VqserveError(f"{sum(errors.values())} requests failed: {each}", target=target)
