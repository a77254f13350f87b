"""For tests of strangers' files: a witness of what reading one makes this process do, its memory, and archives."""

from __future__ import annotations

# Codecs, which Python imports when they are first used.
import encodings.cp437
import encodings.raw_unicode_escape  # noqa: F401
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from vqserve_tools.importing.files import open_foreign

MIB = 1 << 20
# What an import of a small array may take beyond what the process has already.
LIMIT = 64 * MIB

# What was seen while somebody watched.
_seen: list[str] | None = None
_allowed = ""


class _Trap(ModuleType):
    """A module that is already imported, as os is: looking up a name in it needs no import, and is seen here."""

    def __getattribute__(self, name: str) -> object:
        if _seen is not None:
            _seen.append(f"trap.{name}")
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: None


def _audit(event: str, args: tuple[object, ...]) -> None:
    if _seen is not None and event != "builtins.id" and (event, str(args[0])) != ("open", _allowed):
        _seen.append(f"{event} {str(args[0])[:100] if args else ''}")


# It stays for the life of the process.
sys.addaudithook(_audit)


@contextmanager
def watching(source: Path) -> Iterator[list[str]]:
    """Yield what is seen: every audit event of Python but `id` and the opening of `source`, every look into `trap`."""
    global _seen, _allowed  # noqa: PLW0603
    seen: list[str] = []
    sys.modules["trap"] = _Trap("trap")
    _seen, _allowed = seen, str(source)
    try:
        yield seen
    finally:
        _seen = None
        del sys.modules["trap"]


def read_watched(source: Path) -> tuple[dict[str, object], list[str]]:
    """Return the arrays in a file as lists, and what reading them made this process do."""
    with watching(source) as seen, open_foreign(source) as arrays:
        values = {name: array.read().tolist() for name, array in arrays.items()}
    return values, seen


def memory(name: str) -> int:
    """Return VmRSS, the memory of this process, or VmHWM, its peak, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def members_of(path: Path) -> dict[str, bytes]:
    """Return the members of a torch file, none of which is compressed."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a torch file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def torch_archive(path: Path, description: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a torch file without numbers."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", description)
        archive.writestr("archive/version", b"3\n", zipfile.ZIP_STORED)
    return path


def text(value: str) -> bytes:
    """Return the instruction that makes a string."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
