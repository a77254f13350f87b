"""The releases of grpcio that the server is tested with; `rpc` uses a private part of grpcio."""

from __future__ import annotations

import importlib.metadata
import logging
import re

from vqserve_server.event_log import event

# The oldest tested release, and the first release that is too new. pyproject.toml contains the same bounds, and
# `make test-grpcio` runs the tests on the oldest and the newest release between them.
OLDEST = "1.72.2"
BELOW = "1.86"

logger = logging.getLogger(__name__)


def is_tested(release: str) -> bool:
    """Return whether a release, such as "1.85.1" or "1.86.0rc1", is in the tested range."""
    return _numbers(OLDEST) <= _numbers(release) < _numbers(BELOW)


def warn_if_untested() -> None:
    """Log a warning where the installed grpcio is outside the tested range."""
    try:
        release = importlib.metadata.version("grpcio")
    except importlib.metadata.PackageNotFoundError:
        release = "unknown"
    if not is_tested(release):
        logger.warning(event("grpcio_untested", release=release, tested=f"{OLDEST} to below {BELOW}"))


def _numbers(release: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", release)
    return tuple(int(number) for number in match.group().split(".")) if match else ()
