"""The scenarios by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from reliability.figure import Figure
from reliability.setup import Setup

_MODULES = (
    "full_server",
    "drain",
    "balance",
    "proxy",
    "early_sigterm",
    "unknown_fields",
    "fairness",
    "overload",
    "rolling",
    "stopped_worker",
    "device_faults",
    "streams_memory",
    "descriptors",
    "full_stderr",
    "lying_server",
    "limits",
    "tls_cost",
)


@dataclass(frozen=True)
class Scenario:
    """One command.

    Attributes:
        about: what it shows, in a line.
        seconds: length of each measurement, unless --seconds says otherwise.
        run: makes it happen and yields its figures.
    """

    about: str
    seconds: float
    run: Callable[[Setup], Iterator[Figure]]


_scenarios: dict[str, Scenario] = {}


def scenario(
    name: str, about: str, *, seconds: float
) -> Callable[[Callable[[Setup], Iterator[Figure]]], Callable[[Setup], Iterator[Figure]]]:
    """Register a function as the scenario of this name."""

    def register(run: Callable[[Setup], Iterator[Figure]]) -> Callable[[Setup], Iterator[Figure]]:
        _scenarios[name] = Scenario(about, seconds, run)
        return run

    return register


def scenarios() -> dict[str, Scenario]:
    """Return all scenarios, in the order in which docs/reliability.md has them."""
    for module in _MODULES:
        importlib.import_module(f"reliability.{module}")
    return _scenarios
