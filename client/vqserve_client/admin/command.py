"""`vqserve admin`: operates a server from the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from vqserve_client.admin.client import (
    AdminClient,
    LiveCodebook,
    WorkerDrain,
    WorkerLogLevel,
    WorkerReload,
    WorkerStatus,
)
from vqserve_client.arguments import connection

_LEVELS = ("debug", "info", "warning", "error")
_EPILOG = """\
Each command acts on all processes of the server and prints what each did. The exit code is 0 only if all did, and no
file was rejected, those of certificates and access tokens included. They need an access token that may operate the
server (`vqserved token NAME --admin`).
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add what follows `vqserve admin`."""
    command.epilog = _EPILOG
    command.add_argument(
        "action",
        choices=tuple(_ACTIONS),
        # Without it an error would call the argument "action", a word that no help has.
        metavar=f"{{{','.join(_ACTIONS)}}}",
        help="status: what is served, and the load; reload: load what has changed; log-level: log more, or less; "
        "drain: answer what was accepted, and end",
    )
    command.add_argument("level", nargs="?", choices=_LEVELS, help="for log-level")
    command.add_argument("--json", action="store_true", help="as JSON, with all fields")
    command.set_defaults(explain_level=command.error)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    if (args.level is not None) != (args.action == "log-level"):
        args.explain_level(f"log-level needs one of {', '.join(_LEVELS)}; the others take no level")
    call, describe = _ACTIONS[args.action]
    with AdminClient(**connection(args)) as client:
        workers = call(client, args.level)
    if args.json:
        print(json.dumps([asdict(worker) for worker in workers], indent=2), flush=True)
    else:
        for worker in workers:
            lines = [f"failed: {worker.error}"] if worker.error else list(describe(worker))
            # One process needs no number.
            first = f"worker {worker.worker}: " if len(workers) > 1 else ""
            print("\n".join([first + lines[0], *(f"  {line}" for line in lines[1:])]), flush=True)
    return 1 if any(map(_failed, workers)) else 0


def _failed(worker: Any) -> bool:
    # What is skipped is no mistake. All other problems are, also those that `rejected` does not count: certificates and
    # access tokens that cannot be used, and a reload that failed.
    return bool(worker.error) or (isinstance(worker, WorkerReload) and len(worker.problems) > worker.skipped)


def _status(worker: WorkerStatus) -> Iterator[str]:
    yield f"{worker.server}; log level {worker.log_level}, pid {worker.pid}"
    yield from _codebooks(worker.codebooks)


def _reload(worker: WorkerReload) -> Iterator[str]:
    numbers = ("loaded", "unchanged", "removed", "rejected", "skipped")
    yield ", ".join(f"{getattr(worker, name)} {name}" for name in numbers)
    yield from worker.problems
    yield from _codebooks(worker.codebooks)


def _log_level(worker: WorkerLogLevel) -> Iterator[str]:
    yield f"the level was {worker.previous}"


def _drain(worker: WorkerDrain) -> Iterator[str]:
    yield f"stopping, within {worker.drain_seconds:g} s: {worker.requests} requests to answer"


def _codebooks(codebooks: Sequence[LiveCodebook]) -> Iterator[str]:
    for codebook in codebooks:
        # A name without a version, and a label, mean one.
        means = "" if codebook.version is None else f" (version {codebook.version})"
        yield f"{codebook.name}{means} {codebook.digest[:12]}"


# The call of a command, with the level of the log, and what is printed of each process.
_ACTIONS: dict[str, tuple[Callable[[AdminClient, Any], Sequence[Any]], Callable[[Any], Iterator[str]]]] = {
    "status": (lambda client, _: client.status(), _status),
    "reload": (lambda client, _: client.reload(), _reload),
    "log-level": (lambda client, level: client.set_log_level(level), _log_level),
    "drain": (lambda client, _: client.drain(), _drain),
}
