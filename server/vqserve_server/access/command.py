"""`vqserved token`: makes a token."""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vqserve.errors import StartError
from vqserve_server.access.codebooks import Codebooks
from vqserve_server.access.token_file import Grant, check_name, check_pattern, entry, grants, hash_of, new_secret

_EPILOG = """\
Standard output is the token and nothing else. It is not stored anywhere: the file has its hash only.

  vqserved token trainer --file tokens.toml > trainer.token
  vqserved serve --tokens tokens.toml
  VQSERVE_TOKEN_FILE=trainer.token vqserve codebooks
"""


def add_token_parser(subparsers: Any) -> None:
    """Add the command to the parser of `vqserved`."""
    parser = subparsers.add_parser(
        "token",
        help="make a token for a caller",
        description="Make a token, and the entry for the file of --tokens.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", type=_checked(check_name), help="names the caller, also in the log")
    parser.add_argument(
        "--codebooks",
        nargs="+",
        metavar="PATTERN",
        type=_checked(check_pattern),
        help="codebooks that it may use: names, or patterns with * and ?; default: all",
    )
    parser.add_argument("--rows-per-second", type=_number, metavar="ROWS", help="rows that it may send; default: any")
    parser.add_argument(
        "--max-bytes", type=_count, metavar="BYTES", help="bytes of its requests in the server and their replies"
    )
    parser.add_argument("--max-requests", type=_count, metavar="REQUESTS", help="its requests in the server")
    parser.add_argument(
        "--expires", type=_date, metavar="DATE", help="from when on it is not valid, for example 2031-04-01 (UTC)"
    )
    parser.add_argument(
        "--admin", action="store_true", help="it may operate the server, too: reload, drain, log level, status"
    )
    parser.add_argument("--file", metavar="FILE", help="append the entry to this file, which need not exist")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make a token; return the exit code."""
    secret = new_secret()
    grant = Grant(
        args.name,
        hash_of(secret),
        codebooks=None if args.codebooks is None or "*" in args.codebooks else Codebooks(args.codebooks),
        rows_per_second=args.rows_per_second,
        max_bytes=args.max_bytes,
        max_requests=args.max_requests,
        expires=args.expires,
        admin=args.admin,
    )
    if args.file:
        append(Path(args.file), grant)
        says = f"appended [tokens.{grant.name}] to {args.file}"
    else:
        says = f"put this into the file of `vqserved serve --tokens FILE`:\n\n{entry(grant)}"
    print(says, file=sys.stderr)
    print(secret)
    return 0


def append(path: Path, grant: Grant) -> None:
    """Append a token to a file in one step: a server that reads it meanwhile gets the old file or the new one.

    Raises:
        StartError: the file is not valid, has a token of that name, or its folder is missing.
        OSError: it cannot be written.
    """
    # What a link leads to is replaced, not the link.
    path = path.resolve()
    if not path.parent.is_dir():
        raise StartError(f"there is no folder {path.parent}")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # Another such command waits, so that neither loses the other's token.
        fcntl.flock(folder, fcntl.LOCK_EX)
        before = path.read_text() if path.exists() else ""
        if before and grant.name in {known.name for known in grants(str(path), before.encode())}:
            raise StartError(f"{path} has a token {grant.name}: choose another name, or remove that one first")
        after = f"{before.rstrip()}\n\n{entry(grant)}".lstrip()
        grants(str(path), after.encode())
        _replace(path, after)
    finally:
        os.close(folder)


def _replace(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w") as file:  # noqa: PTH123
            if path.exists():
                status = path.stat()
                os.fchmod(descriptor, status.st_mode & 0o777)
                if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(descriptor, status.st_uid, status.st_gid)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


def _checked(check: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


@_checked
def _number(text: str) -> float:
    value = float(text) if text.replace(".", "", 1).isdecimal() else 0.0
    if not 0 < value <= 1 << 44:
        raise ValueError(f"must be a number above 0, not {text!r}")
    return value


@_checked
def _count(text: str) -> int:
    value = int(text) if text.isdecimal() and len(text) < 15 else 0
    if value <= 0:
        raise ValueError(f"must be an integer above 0, not {text!r}")
    return value


@_checked
def _date(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"must be a date, such as 2031-04-01, not {text!r}") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
