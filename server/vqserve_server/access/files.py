"""Small files that the server reads at its start, and again after they have changed."""

from __future__ import annotations

import logging
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from vqserve.errors import StartError
from vqserve_server.event_log import ONCE, event
from vqserve_server.file_stamps import CLOCK_S, Stamp, last_change_s, stamp_of

T = TypeVar("T")

_MOST_BYTES = 4 << 20
# Attempts to read several files that somebody replaces one after the other.
_ATTEMPTS = 3

# Of each file; None: there is no such file.
_Stamps = tuple[Stamp | None, ...]

logger = logging.getLogger(__name__)


class Watched(Generic[T]):
    """A value made from files. It changes only when the files have changed and are good. Thread-safe.

    Nothing watches the files: `refresh` looks at them when the value is needed.

    Attributes:
        value: made from the newest good files.
    """

    def __init__(self, what: str, paths: Sequence[str], make: Callable[[Sequence[bytes]], T]) -> None:
        """Read the files.

        Args:
            what: names the value in the log.
            paths: the files.
            make: makes the value from their contents, or raises StartError.

        Raises:
            StartError: a file cannot be read, or `make` raised it.
        """
        self._what = what
        self._paths = [Path(path) for path in paths]
        self._make = make
        self._lock = threading.Lock()
        self._rejected: str | None = None
        self._contents: list[bytes] | None = None
        self._stamps: _Stamps = ()
        self._contents, self.value = self._made()

    @property
    def problem(self) -> str | None:
        """Why the newest files cannot be used, and those before are; None: they can."""
        return self._rejected

    def may_have_changed(self) -> bool:
        """Return whether `refresh` would read the files."""
        return not _is_settled(self._stamps) or _stamps(self._paths) != self._stamps

    def refresh(self) -> bool:
        """Read the files again if they have changed; return whether the value is a new one.

        The value stays if the new files cannot be used. The log says why, once.
        """
        with self._lock:
            if not self.may_have_changed():
                return False
            try:
                contents, value = self._made()
            except (StartError, OSError) as error:
                if not isinstance(error, StartError) or isinstance(error, _UnreadableError):
                    # It may be a lack of descriptors or of memory, and the files good: read them at the next refresh.
                    self._stamps = ()
                reason = str(error)
                if reason != self._rejected:
                    logger.error(event("access_rejected", what=self._what, kept="the files before", error=reason))
                self._rejected = reason
                return False
            is_new, is_mended = contents != self._contents, self._rejected is not None
            self._rejected = None
            self._contents, self.value = contents, value
            if is_new or is_mended:
                logger.info(event("access_reloaded", what=self._what))
            return is_new

    def _made(self) -> tuple[list[bytes], T]:
        left = _ATTEMPTS
        while True:
            # Take the stamps before the files are read, so that the next refresh notices a later change.
            self._stamps = _stamps(self._paths)
            try:
                contents = self._read()
                return contents, self.value if contents == self._contents else self._make(contents)
            except StartError:
                # Of two files, one may be the old and one the new.
                left -= 1
                if not left or _stamps(self._paths) == self._stamps:
                    raise

    def _read(self) -> list[bytes]:
        return [_content(path) for path in self._paths]


class _UnreadableError(StartError):
    """The system failed to read a file, whatever is in it."""


def _content(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise StartError(f"{path}: there is no such file")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise _UnreadableError(f"{path}: {error.strerror or error}") from None
    if len(content) > _MOST_BYTES:
        raise StartError(f"{path}: has more than {_MOST_BYTES} bytes")
    return content


def _stamps(paths: Sequence[Path]) -> _Stamps:
    return tuple(map(stamp_of, paths))


def _is_settled(stamps: _Stamps) -> bool:
    return last_change_s(stamps) < time.time() - CLOCK_S


def warn_if_readable(path: str, *, holds: str) -> None:
    """Log a warning if every user of the machine can read a file, or change it."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        fields = {"path": path, "holds": holds, "mode": f"{stat.S_IMODE(mode):04o}"}
        logger.warning(event("file_open_to_all", **fields), extra=ONCE)
