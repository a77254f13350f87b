"""The codebook files that the command line names, loaded as tokenizers, and loaded again when they have changed."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vqserve.codebook_info import VERSION_MARK
from vqserve.errors import CodebookError, VqserveError
from vqserve_server.codebook_files import Label, find_codebooks, latest
from vqserve_server.codebooks import load_codebook
from vqserve_server.device import why_no_cuda
from vqserve_server.event_log import ONCE, event
from vqserve_server.file_stamps import CLOCK_S, Stamp, last_change_s, stamp_of
from vqserve_server.process import trim_memory
from vqserve_server.search import SearchCounts
from vqserve_server.tokenizer import Tokenizer

# What a reload ends with.
RELOAD_RESULTS = ("ok", "rejected", "failed")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One codebook file as it was loaded.

    Attributes:
        path: where it was found.
        stamp: identifies the file's content without reading it; None: it must be read.
        tokenizer: serves it.
    """

    path: Path
    stamp: Stamp | None
    tokenizer: Tokenizer

    @property
    def title(self) -> str:
        """Distinguishes it from other versions of its name: "book@3", or the name of its file."""
        return self.tokenizer.name if VERSION_MARK in self.tokenizer.name else self.path.name


@dataclass
class ReloadCounts:
    """Numbers of codebooks that a reload loaded, kept, removed, rejected (invalid files) and skipped.

    Attributes:
        problems: why files were rejected or skipped.
    """

    loaded: int = 0
    unchanged: int = 0
    removed: int = 0
    rejected: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list, compare=False)

    def numbers(self) -> dict[str, int]:
        """Return the numbers by name."""
        return {name: value for name, value in vars(self).items() if name != "problems"}


class Repository:
    """Loads codebooks, and reloads those whose files have changed. Used by one thread at a time.

    A codebook counts as loaded when its file is complete, its tables are on the device, and its self-test has passed.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        device: str = "auto",
        search: str = "auto",
        counts_of: Callable[[str], SearchCounts] | None = None,
    ) -> None:
        """Load nothing yet.

        Args:
            sources: what the command line names; see `find_codebooks`.
            device: where to serve.
            search: the search backend.
            counts_of: returns, by the name of a codebook, what its searches add to; None: they are not counted.
        """
        self._counts_of = counts_of
        self._sources = list(sources)
        self._device = device
        self._search = search
        self._entries: dict[str, Entry] = {}
        self._labels: dict[str, Label] = {}

    @property
    def tokenizers(self) -> list[Tokenizer]:
        """The codebooks to serve; their names are "book" or, of versions, "book@3"."""
        return [entry.tokenizer for entry in self._entries.values()]

    @property
    def labels(self) -> dict[str, str]:
        """The names of versions by label: {"book@stable": "book@3"}."""
        return {name: label.version for name, label in self._labels.items()}

    def load(self) -> None:
        """Load all codebooks.

        Raises:
            VqserveError: one cannot be served.
        """
        found = find_codebooks(self._sources)
        found.check()
        for problem in found.problems:
            logger.warning(event("codebook_skipped", problem=problem.text), extra=ONCE)
        for name, path in found.files.items():
            try:
                self._entries[name] = self._load(name, path)
            except CodebookError as error:
                raise error.with_fields(path=str(path)) from None
        self._labels = found.labels
        free_memory()
        if self._device == "auto" and (reason := why_no_cuda()):
            logger.info(event("device_chosen", device="cpu", reason=reason), extra=ONCE)

    def examine(self) -> Iterator[tuple[str, Path, Tokenizer | VqserveError]]:
        """Yield each codebook that `load` would load, or why it cannot, and keep none: one at a time is in memory."""
        for name, path in find_codebooks(self._sources).files.items():
            try:
                yield name, path, self._load(name, path).tokenizer
            except VqserveError as error:
                yield name, path, error

    def reload(self) -> ReloadCounts:
        """Load the files that have changed, and drop those whose file was removed.

        A file that cannot be served is logged, and the codebook of its name stays. So do all codebooks of a source (a
        file or folder that the command line names) that does not exist or is empty: its volume may be unmounted.
        """
        found = find_codebooks(self._sources)
        entries: dict[str, Entry] = {}
        labels: dict[str, Label] = {}
        counts = ReloadCounts()
        for problem in found.problems:
            kept = {name: entry for name, entry in self._entries.items() if _is_below(entry.path, problem.paths)}
            labels |= {name: label for name, label in self._labels.items() if _is_below(label.path, problem.paths)}
            if problem.is_fatal:
                counts.rejected += 1
            else:
                counts.skipped += 1
            counts.problems.append(problem.text)
            fields = {"kept": ",".join(kept)} if kept else {}
            if problem.is_lost:
                logger.error(event("source_lost", problem=problem.text, **fields))
            else:
                logger.warning(event("codebook_skipped", problem=problem.text, **fields))
            entries.update(kept)
        for name, path in found.files.items():
            entry = self._renewed(name, path, counts)
            if entry is not None:
                entries[name] = entry
        for name in sorted(self._entries.keys() - entries.keys()):
            counts.removed += 1
            logger.info(event("codebook_removed", name=name))
        before, after = latest(self._entries), latest(entries)
        for name in sorted(before.keys() & after.keys()):
            was, now = self._entries[before[name]], entries[after[name]]
            if was.title != now.title:
                digest = now.tokenizer.digest[:12]
                logger.info(event("codebook_version", name=name, now=now.title, was=was.title, digest=digest))
        self._entries = entries
        self._move_labels({name: label for name, label in (labels | found.labels).items() if label.version in entries})
        return counts

    def _move_labels(self, labels: dict[str, Label]) -> None:
        before = self.labels
        self._labels = labels
        for name in sorted(before.keys() | labels.keys()):
            was, now = before.get(name, "nothing"), self.labels.get(name, "nothing")
            if was != now:
                logger.info(event("codebook_label", name=name, now=now, was=was))

    def _renewed(self, name: str, path: Path, counts: ReloadCounts) -> Entry | None:
        """Return the codebook of a file; if it cannot be loaded, the previous one, if any."""
        before = self._entries.get(name)
        try:
            entry = self._load(name, path, before)
        except Exception as error:
            counts.rejected += 1
            kept = "nothing" if before is None else before.tokenizer.digest[:12]
            logger.warning(event("codebook_rejected", name=name, path=path, kept=kept, error=_reason(error)))
            counts.problems.append(f"{path}: {_reason(error)}")
            return before
        if before is not None and entry.tokenizer is before.tokenizer:
            counts.unchanged += 1
        else:
            counts.loaded += 1
        return entry

    def _load(self, name: str, path: Path, before: Entry | None = None) -> Entry:
        """Return the codebook of a file, checked; the previous one if it has not changed."""
        # Take the stamp before the file is read, so that the next reload notices a later change.
        stamp = _stamp(path)
        if before is not None and stamp is not None and (before.path, before.stamp) == (path, stamp):
            return before
        codebook = load_codebook(path)
        if before is not None and before.tokenizer.digest == codebook.digest:
            # The digest does not cover them.
            before.tokenizer.statistics = codebook.statistics
            return replace(before, path=path, stamp=stamp)
        tokenizer = Tokenizer.of_codebook(codebook, name=name, device=self._device, search=self._search)
        tokenizer.check_itself()
        if self._counts_of is not None:
            tokenizer.count_searches(self._counts_of(name))
        info = tokenizer.info
        slower = None
        if self._search == "auto" and tokenizer.search != "native":
            from vqserve_server.search import why_slower  # noqa: PLC0415

            slower = why_slower(tokenizer.search, tokenizer.device)
        logger.info(
            event(
                "codebook_loaded",
                name=name,
                kind=info.kind,
                size=info.size,
                search=tokenizer.search,
                device=tokenizer.device,
                digest=info.digest[:12],
                **({"slower_because": slower} if slower else {}),
            )
        )
        return Entry(path, stamp, tokenizer)


class Reloader:
    """Reloads a repository when asked. Belongs to one event loop."""

    def __init__(
        self,
        repository: Repository,
        on_done: Callable[[], None],
        *,
        on_result: Callable[[str], None] = lambda result: None,
    ) -> None:
        """Do nothing yet.

        Args:
            repository: what is loaded again.
            on_done: called, on the loop, after every reload.
            on_result: called with one of `RELOAD_RESULTS`: "rejected" if a file could not be used.
        """
        self._repository = repository
        self._on_done = on_done
        self._on_result = on_result
        # Of the requests that the next reload answers.
        self._waiting: list[asyncio.Future[ReloadCounts]] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a reload is running."""
        return self._task is not None

    def request(self) -> asyncio.Future[ReloadCounts]:
        """Start a reload, or one more after the reload that is running, which may have missed a change.

        Returns:
            What that reload did, when it is done.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[ReloadCounts] = loop.create_future()
        self._waiting.append(done)
        if self._task is None:
            self._task = loop.create_task(self._run())
        return done

    async def _run(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            started = time.monotonic()
            try:
                counts = await asyncio.to_thread(self._repository.reload)
                self._on_done()
                await asyncio.to_thread(free_memory)
            except Exception:
                # The codebooks that were live stay live.
                self._on_result("failed")
                logger.exception(event("reload_failed"))
                counts = ReloadCounts(problems=["the reload failed; the log has the reason"])
            else:
                self._on_result("rejected" if counts.rejected else "ok")
                logger.info(event("reload_done", seconds=time.monotonic() - started, **counts.numbers()))
            for done in waiting:
                if not done.done():
                    done.set_result(counts)
        self._task = None


def free_memory() -> None:
    """Free reference cycles, and return free memory to the system.

    The traceback of a rejected request is a cycle that keeps its codebook. glibc keeps freed tables in the middle of
    its heaps: preparing a large codebook leaves such holes, and so do a hundred reloads.
    """
    gc.collect()
    trim_memory()


def _stamp(path: Path) -> Stamp | None:
    """Return the stamp of a file that has not changed just now; None: read it, which raises the error if it is gone."""
    stamp = stamp_of(path)
    return None if last_change_s([stamp]) > time.time() - CLOCK_S else stamp


def _is_below(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _reason(error: Exception) -> str:
    # The event has the path in a field of its own.
    text = str(error.with_fields(path=None)) if isinstance(error, VqserveError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
