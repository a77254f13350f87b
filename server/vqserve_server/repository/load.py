"""What the command line's sources hold, as tokenizers."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vqserve.codebook_info import VERSION_MARK
from vqserve_server.codebook_files import find_codebooks, latest
from vqserve_server.codebooks import load_codebook
from vqserve_server.console import printable
from vqserve_server.errors import CodebookError, CodebookFileError, VqserveError
from vqserve_server.tokenizer import Tokenizer

# Some file systems count seconds, some even two: a file that was touched so recently may be another one by now and look
# the same.
_CLOCK_S = 2.0

logger = logging.getLogger(__name__)

# Device, inode, size, times of change: of a file that was not touched they stay.
Stamp = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One codebook file as it was loaded.

    Attributes:
        path: where it was found.
        stamp: by which it is known again; None: it has to be read to know.
        tokenizer: what serves it.
    """

    path: Path
    stamp: Stamp | None
    tokenizer: Tokenizer

    @property
    def title(self) -> str:
        """What tells it from others that a name without a version may stand for: "book@3", or its file's name."""
        return self.tokenizer.name if VERSION_MARK in self.tokenizer.name else self.path.name


@dataclass
class Tally:
    """What a rescan did, in codebooks."""

    loaded: int = 0
    unchanged: int = 0
    removed: int = 0
    refused: int = 0
    passed_over: int = 0

    def __str__(self) -> str:
        over = f", {self.passed_over} passed over" if self.passed_over else ""
        return f"{self.loaded} loaded, {self.unchanged} unchanged, {self.removed} removed, {self.refused} refused{over}"


class Repository:
    """Loads codebooks and knows what it has loaded. Belongs to one thread at a time.

    A codebook counts as loaded when its file was read and found whole, its tables are on the device, and it has
    encoded, decoded and found its own codes.
    """

    def __init__(self, sources: Sequence[str], *, device: str = "auto", search: str = "auto") -> None:
        """Load nothing yet.

        Args:
            sources: what the command line names; see `find_codebooks`.
            device: where to serve.
            search: the search backend.
        """
        self._sources = list(sources)
        self._device = device
        self._search = search
        self._entries: dict[str, Entry] = {}

    @property
    def tokenizers(self) -> list[Tokenizer]:
        """What is fit to serve, under names as "book" and, of versions, "book@3"."""
        return [entry.tokenizer for entry in self._entries.values()]

    def load(self) -> None:
        """Load all codebooks.

        Raises:
            VqserveError: one cannot be served.
        """
        found = find_codebooks(self._sources)
        found.check()
        for problem in found.problems:
            logger.warning("%s", printable(problem.text))
        for name, path in found.files.items():
            try:
                self._entries[name] = self._load(name, path)
            except CodebookError as error:
                # Some begin with the file's name.
                text = str(error)
                rest = text.removeprefix(path.name)
                raise CodebookFileError(f"{path}: {text}" if rest == text else f"{path}{rest}") from None

    def rescan(self) -> Tally:
        """Look at the disk again and take over what has changed.

        A file that cannot be served is told in the log, and what was loaded under its name stays. A file that is gone
        is dropped, unless the command line itself names it.
        """
        found = find_codebooks(self._sources)
        entries: dict[str, Entry] = {}
        tally = Tally()
        for problem in found.problems:
            kept = {name: entry for name, entry in self._entries.items() if _is_below(entry.path, problem.paths)}
            if problem.is_fatal:
                tally.refused += 1
            else:
                tally.passed_over += 1
            logger.warning("%s%s", printable(problem.text), f" ({_names(kept)})" if kept else "")
            entries.update(kept)
        for name, path in found.files.items():
            entry = self._renewed(name, path, tally)
            if entry is not None:
                entries[name] = entry
        for name in sorted(self._entries.keys() - entries.keys()):
            tally.removed += 1
            logger.info("codebook %s is gone from the disk: no longer served", name)
        before, after = latest(self._entries), latest(entries)
        for name in sorted(before.keys() & after.keys()):
            was, now = self._entries[before[name]], entries[after[name]]
            if was.title != now.title:
                digest = now.tokenizer.digest[:12]
                logger.info("codebook %s is now %s (was %s), digest %s", name, now.title, was.title, digest)
        self._entries = entries
        return tally

    def _renewed(self, name: str, path: Path, tally: Tally) -> Entry | None:
        """Return what is to be served under a name from now on: the file's codebook, else the one before it, if any."""
        before = self._entries.get(name)
        try:
            entry = self._load(name, path, before)
        except Exception as error:
            tally.refused += 1
            stays = f"digest {before.tokenizer.digest[:12]} stays" if before is not None else "it is not served"
            logger.warning("codebook %s not loaded from %s, %s: %s", name, path, stays, _reason(error))
            return before
        if before is not None and entry.tokenizer is before.tokenizer:
            tally.unchanged += 1
        else:
            tally.loaded += 1
        return entry

    def _load(self, name: str, path: Path, before: Entry | None = None) -> Entry:
        """Return the codebook in a file, fit to serve; the one before it if it is still the same."""
        # Before the file is read: what changes later shows in the next rescan.
        stamp = _stamp(path)
        if before is not None and stamp is not None and (before.path, before.stamp) == (path, stamp):
            return before
        codebook = load_codebook(path)
        if before is not None and before.tokenizer.digest == codebook.digest:
            return replace(before, path=path, stamp=stamp)
        tokenizer = Tokenizer(codebook.quantizer, name=name, device=self._device, search=self._search)
        tokenizer.check_itself()
        info = tokenizer.info
        logger.info(
            "codebook %s: %s, %s, search %s on %s, digest %s",
            name,
            info.kind,
            info.size,
            tokenizer.search,
            tokenizer.device,
            info.digest[:12],
        )
        return Entry(path, stamp, tokenizer)


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        # Whoever reads it will say why not.
        return None
    if max(status.st_mtime, status.st_ctime) > time.time() - _CLOCK_S:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_below(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _names(entries: dict[str, Entry]) -> str:
    return f"{', '.join(entries)} {'stays' if len(entries) == 1 else 'stay'}"


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, VqserveError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
