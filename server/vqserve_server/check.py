"""`vqserved serve --check`: whether a server would start with these settings and files, without listening anywhere."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from vqserve.errors import COMMAND_LINE, StartError, VqserveError
from vqserve.text import printable
from vqserve_server import event_log
from vqserve_server.access import Access
from vqserve_server.codebook_files import find_codebooks
from vqserve_server.config import CODEBOOKS, SETTINGS, Resolved, ServeConfig
from vqserve_server.config.values import written
from vqserve_server.extra import missing_package
from vqserve_server.network import address, check_protected, check_socket_path
from vqserve_server.repository import Repository, free_memory

_DAY_S = 86_400.0


def run(resolved: Resolved) -> int:
    """Print what would be used and every problem; return the exit code: 1 if the server would not start."""
    level = "debug" if resolved.config.log_level == "debug" else "warning"
    event_log.set_up(level, form=resolved.config.log_format)
    check = _Check()
    config = resolved.config
    _say("settings (the others have their defaults):")
    for line in _settings(resolved):
        _say(line)
    check.attempt(lambda: check_protected(config.rpc.host, config.access))
    if config.rpc.unix_socket:
        check.attempt(lambda: check_socket_path(config.rpc.unix_socket))
    check.attempt(lambda: _access(config))
    if config.traces.trace_endpoint:
        check.attempt(_tracing)
    _say("codebooks:")
    count = _codebooks(resolved, check)
    if check.problems:
        _say(f"would not start: {_counted(check.problems, 'problem')}")
        return 1
    _say(f"would serve {_counted(count, 'codebook')} on {address(config.rpc.host, config.rpc.port)}")
    return 0


class _Check:
    """Counts problems, and reports each on stderr."""

    def __init__(self) -> None:
        self.problems = 0

    def report(self, text: str) -> None:
        """Report one problem."""
        self.problems += 1
        sys.stderr.write(f"vqserved: error: {printable(' '.join(text.split()))}\n")
        sys.stderr.flush()

    def attempt(self, call: Callable[[], None]) -> None:
        """Call a function that raises StartError if there is a problem."""
        try:
            call()
        except StartError as error:
            self.report(error.text(COMMAND_LINE))


def _settings(resolved: Resolved) -> Iterator[str]:
    rows = [(each.name, written(each.of(resolved.config)), resolved.origins.get(each.name)) for each in SETTINGS]
    rows.append((CODEBOOKS, " ".join(resolved.codebooks), resolved.origins.get(CODEBOOKS)))
    shown = [(name, value, origin) for name, value, origin in rows if origin is not None]
    widths = [max((len(row[column]) for row in shown), default=0) for column in (0, 1)]
    for name, value, origin in shown:
        yield f"  {name:{widths[0]}}  {value:{widths[1]}}  from {origin}"


def _access(config: ServeConfig) -> None:
    access = Access(config.access)
    if access.certificates is not None:
        expires = access.certificates.value.expires
        days = (expires - datetime.now(UTC)).total_seconds() / _DAY_S
        _say(f"certificate: expires {expires:%Y-%m-%d}, in {_counted(int(days), 'day')}")
    if access.tokens is not None:
        _say(f"access tokens: {', '.join(access.tokens.names())}")


def _tracing() -> None:
    try:
        importlib.import_module("vqserve_server.rpc.tracing")
    except ModuleNotFoundError as error:
        if (text := missing_package(error)) is None:
            raise
        raise StartError(text) from None


def _codebooks(resolved: Resolved, check: _Check) -> int:
    """Load each codebook on each device, one after the other; return how many there are."""
    config = resolved.config
    found = find_codebooks(resolved.codebooks)
    for problem in found.problems:
        if problem.is_fatal:
            check.report(problem.text)
        else:
            _say(f"  {problem.text}")
    for device in dict.fromkeys(config.devices.split(",") if config.devices else [config.device]):
        repository = Repository(resolved.codebooks, device=device, search=config.search)
        for name, path, outcome in repository.examine():
            if isinstance(outcome, VqserveError):
                check.report(outcome.with_fields(path=str(path)).text(COMMAND_LINE))
            else:
                where = f"{outcome.search} on {outcome.device}"
                _say(f"  {name}  {outcome.info.kind}  {outcome.info.size}  {outcome.digest[:12]}  {where}  {path}")
            # Before the next one is loaded.
            del outcome
            free_memory()
    return len(found.files)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _say(text: str) -> None:
    sys.stdout.write(f"{printable(text)}\n")
    sys.stdout.flush()
