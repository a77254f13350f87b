"""The command line of the daemon: `serve`, and the parts that all commands of `vqserved` share.

The tools (vqserve_tools) add their commands. Heavy modules are imported only when they are needed.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from vqserve import __version__
from vqserve.arguments import Parser
from vqserve.errors import COMMAND_LINE, VqserveError
from vqserve.text import printable
from vqserve_server import config as settings
from vqserve_server import signals
from vqserve_server.extra import check_server_extra, missing_package
from vqserve_server.process import worker_number


@dataclass(frozen=True)
class Command:
    """A command beside `serve`.

    Attributes:
        help: one line for the list of commands.
        module: name of the module that adds its parser; imported only if the command is used.
        needs_extra: whether it needs the extra `server`.
        function: name of the function that adds it to the subparsers. The parser's defaults are `run`, which takes the
            parsed arguments and returns the exit code, and perhaps `explain`, which takes them and unknown words and
            returns an error text or None.
    """

    help: str
    module: str
    function: str
    needs_extra: bool = True


NO_COMMANDS: Mapping[str, Command] = MappingProxyType({})


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = NO_COMMANDS) -> int:
    """Run `vqserved`; return the exit code: 0, 1 on an error, 2 on wrong usage.

    Args:
        argv: arguments; None: the arguments of the process.
        commands: commands beside `serve`, by name.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_standard_files()
    try:
        args = _parser(arguments[0] if arguments else "", commands).parse_command(arguments, _explained)
        run: Callable[[argparse.Namespace], int] = args.run
        if run is not _serve:
            signals.raise_at_sigint()
        return run(args)
    except VqserveError as error:
        return _complain(error.text(COMMAND_LINE))
    except (settings.ConfigError, OSError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        missing = missing_package(error)
        if missing is not None:
            return _complain(missing)
        # An unexpected error is one line too; the traceback is in the log with --log-level debug, a flag of `serve`.
        logging.getLogger(__name__).debug("unexpected error", exc_info=True)
        where = " (--log-level debug shows where)" if arguments[:1] == ["serve"] else ""
        return _complain(f"{type(error).__name__}: {error}{where}")


def _explained(args: argparse.Namespace, words: Sequence[str]) -> str | None:
    explain: Callable[[argparse.Namespace, Sequence[str]], str | None] | None = getattr(args, "explain", None)
    return None if explain is None else explain(args, words)


def _parser(asked: str, commands: Mapping[str, Command]) -> Parser:
    parser = Parser(prog="vqserved", description="Serve vector-quantizer codebooks over gRPC.")
    parser.add_argument("--version", action="version", version=f"vqserved {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    serve = subparsers.add_parser(
        "serve", help="serve codebooks", description="Serve codebooks until SIGTERM or SIGINT."
    )
    serve.add_argument(
        "sources",
        nargs="*",
        metavar="PATH | NAME=PATH",
        help="codebook files, or folders of them and of their versions; none: the demo codebook",
    )
    serve.add_argument(
        "--check",
        action="store_true",
        help="say what would be served, with which settings, and whether all files are good; listen on nothing",
    )
    serve.add_argument("--print-config", action="store_true", help="print a file for --config with these settings")
    settings.add_flags(serve)
    serve.set_defaults(run=_serve)
    for name, command in commands.items():
        if name == asked:
            if command.needs_extra:
                check_server_extra()
            # Import only the module of the used command: it may import torch.
            getattr(importlib.import_module(command.module), command.function)(subparsers)
        else:
            subparsers.add_parser(name, help=command.help)
    return parser


def _serve(args: argparse.Namespace) -> int:
    resolved = settings.load(vars(args), os.environ)
    if args.print_config:
        print(settings.settings_file(resolved), end="")
        return 0
    check_server_extra()
    config, sources = resolved.config, list(resolved.codebooks)
    worker = worker_number(os.environ)
    with signals.sighup_blocked():
        if worker is None and config.workers > 1 and not args.check:
            from vqserve_server import supervisor  # noqa: PLC0415

            return supervisor.run(sources, config)
        if config.log_level != "debug":
            # Any caller can make gRPC write lines that say nothing to an operator. It reads this when it is imported.
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        if args.check:
            from vqserve_server import check  # noqa: PLC0415

            return check.run(resolved)
        from vqserve_server import app  # noqa: PLC0415

        return app.run(sources, config, worker=worker)


def _open_standard_files() -> None:
    # In a process that was started without standard files, sys.stdin and so on are None. The next opened file or
    # connection would get their numbers, and libraries would write into it.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115


def _complain(text: str) -> int:
    # Names of files, and names inside files, may contain control characters.
    line = printable(" ".join(text.split()))
    print(f"vqserved: error: {line}", file=sys.stderr)
    return 1
