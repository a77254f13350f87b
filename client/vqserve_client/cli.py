"""`vqserve`: the client on the command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from typing import Any

from vqserve import __version__
from vqserve.arguments import Parser
from vqserve.codebook_info import CodebookInfo
from vqserve.errors import COMMAND_LINE, LayoutWarning, VqserveError
from vqserve.text import printable
from vqserve_client.arguments import (
    add_connection,
    connection,
    seconds_or_zero,
)
from vqserve_client.client import Client
from vqserve_client.config import client_config
from vqserve_client.server_info import ServerInfo
from vqserve_data.errors import FileError

# Commands that are imported on demand, also of packages on top of this one: name, help, and a module with
# `add_arguments` and `run`. The parser's default of `command` is the name.
_TOOLS = {
    "encode": ("write the indices of latents: of a .npy file, or of a data set", "vqserve_client.bulk.command"),
    "decode": ("write the latents of indices: of a .npy file, or of a data set", "vqserve_client.bulk.command"),
    "admin": ("operate a server: reload, drain, log level, status", "vqserve_client.admin.command"),
    "bench": ("measure a server under load", "vqserve_bench.command"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 1 on an error, 2 on wrong usage, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser(words[0] if words else "").parse_command(words)
    try:
        with _terminable(), _warnings_of_one_line():
            return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of the output has closed it; nothing may be written to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (VqserveError, FileError, TypeError, ValueError, OSError, MemoryError) as error:
        print(f"vqserve: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _parser(command: str) -> Parser:
    parser = Parser(prog="vqserve", description="Latents to indices and back, on a vqserve server.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"vqserve {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    codebooks = _command(commands, "codebooks", "list the served codebooks", _codebooks)
    codebooks.add_argument("--json", action="store_true", help="as JSON, with all fields")

    status = _command(commands, "status", "say whether the server serves, and how; exit 0 only if it does", _status)
    status.add_argument("--wait", type=seconds_or_zero, metavar="SECONDS", help="wait at most this long until it does")
    form = status.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON, with all figures")
    form.add_argument("--quiet", action="store_true", help="say nothing but errors, and ask for the health only")

    for name, (text, module) in _TOOLS.items():
        tool = _command(commands, name, text, partial(_run_tool, module))
        if name == command:
            import_module(module).add_arguments(tool)
    return parser


def _command(commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run, command=name)
    add_connection(command)
    return command


def _codebooks(args: argparse.Namespace) -> int:
    with Client(**connection(args)) as client:
        codebooks = client.codebooks()
    print(json.dumps([asdict(info) for info in codebooks], indent=2) if args.json else _table(codebooks), flush=True)
    return 0


def _status(args: argparse.Namespace) -> int:
    # Only this command needs it, and it is slow to import.
    from vqserve_client import health  # noqa: PLC0415
    from vqserve_client.channel import Connection  # noqa: PLC0415

    config = client_config(**connection(args))
    with contextlib.ExitStack() as stack:
        servers = [Connection(config, address) for address in config.address.addresses]
        for server in servers:
            stack.callback(server.close)
        if not args.wait:
            status = health.status_of_any(servers, timeout_s=args.timeout)
        else:
            status = health.wait_until_any_serves(servers, timeout_s=args.wait)
            if status == health.UNREACHABLE:
                _print_reason(lambda: health.status_of_any(servers, timeout_s=args.timeout))
    info = _server_info(args) if status == health.SERVING and not args.quiet else None
    if args.json:
        print(json.dumps({"status": status, "server": None if info is None else asdict(info)}), flush=True)
    elif not args.quiet:
        print("\n".join([status, *([] if info is None else [str(info)])]), flush=True)
    return 0 if status == health.SERVING else 1


def _server_info(args: argparse.Namespace) -> ServerInfo | None:
    """Return what the server says about itself; None: it does not, or not to this caller, or not on this port."""
    with contextlib.suppress(VqserveError), Client(**connection(args), retries=0) as client:
        return client.server_info()
    return None


def _print_reason(ask: Callable[[], object]) -> None:
    try:
        ask()
    except VqserveError as error:
        print(f"vqserve: {_one_line(error)}", file=sys.stderr)


def _run_tool(module: str, args: argparse.Namespace) -> int:
    return int(import_module(module).run(args))


def _table(codebooks: Sequence[CodebookInfo]) -> str:
    columns: dict[str, Callable[[CodebookInfo], object]] = {
        "name": lambda info: info.name,
        "version": lambda info: info.version or "",
        "kind": lambda info: info.kind,
        "codes": lambda info: info.codes,
        "vocabulary": lambda info: info.vocab_size,
        "channels in": lambda info: info.input_dim,
        "code": lambda info: info.code_dim,
        "channels out": lambda info: info.output_dim,
        "layout": lambda info: info.layout or "default",
        "digest": lambda info: info.digest[:12],
    }
    if not any(info.version for info in codebooks):
        del columns["version"]
    rows = [[str(value(info)) for value in columns.values()] for info in codebooks]
    # A name comes from the server: it must not send control characters to the terminal.
    cells = [[printable(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the program like an error, so that no half-written file is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    """Print the SDK's warnings as its errors are printed, each text once."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: object) -> None:
        text = message.text(COMMAND_LINE) if isinstance(message, LayoutWarning) else str(message)
        if text in shown:
            return
        shown.add(text)
        print(f"vqserve: warning: {printable(text)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory"
    text = error.text(COMMAND_LINE) if isinstance(error, VqserveError) else str(error)
    return printable(" ".join(text.split())) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
