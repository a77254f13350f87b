"""The engine put together: admission, scheduler, device threads, and the codebooks that are being served."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vqserve.codebook_info import VERSION_MARK, CodebookInfo
from vqserve.errors import DeviceBroken, Draining
from vqserve.validation import check_digest, no_codebook
from vqserve_server.access import Codebooks
from vqserve_server.codebook_files import latest, version_of, version_order
from vqserve_server.config import EngineConfig
from vqserve_server.device import wait_for_stream
from vqserve_server.engine.admission import Admission, EngineStats
from vqserve_server.engine.quick import QuickBatches
from vqserve_server.engine.scheduler import Scheduler
from vqserve_server.engine.worker import Worker
from vqserve_server.event_log import event
from vqserve_server.metrics.recorder import Metrics
from vqserve_server.usage.live import LiveUsage

if TYPE_CHECKING:
    from vqserve_server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# A GPU is idle while a thread copies rows and replies; on a CPU the same cores do both.
_CUDA_THREADS = 2


class LiveSet:
    """Tokenizers by name. Read by any thread; never changed once made.

    Of those named "book@1", "book@2" and so on the one with the greatest number is "book" as well.
    """

    def __init__(self, tokenizers: Iterable[Tokenizer], labels: Mapping[str, str] | None = None) -> None:
        """Make it.

        Args:
            tokenizers: the codebooks.
            labels: further names of them: {"book@stable": "book@3"}.
        """
        self._by_name = {tokenizer.info.name: tokenizer for tokenizer in tokenizers}
        others = latest(self._by_name) | dict(labels or {})
        self._by_name |= {other: self._by_name[name] for other, name in others.items()}

    def __len__(self) -> int:
        return len(self._by_name)

    def tokenizers(self) -> list[Tokenizer]:
        """Return the tokenizers, in name order, each once."""
        return list({self._by_name[name]: None for name in self._names(None)})

    def infos(self, codebooks: Codebooks | None = None) -> list[CodebookInfo]:
        """Return the codebook of each name, in name order, versions as numbers.

        Args:
            codebooks: those that the caller may use; None: all.
        """
        infos = {name: self._by_name[name].info for name in self._names(codebooks)}
        return [replace(info, name=name, version=version_of(info.name)) for name, info in infos.items()]

    def resolve(self, name: str, expected_digest: str = "", codebooks: Codebooks | None = None) -> Tokenizer:
        """Return the tokenizer of that name; for no name the only one, of several versions the latest.

        Args:
            name: in the request; "": none.
            expected_digest: that the caller expects; "": any will do.
            codebooks: those that the caller may use; the others do not exist for it. None: all.

        Raises:
            PermissionDenied: the caller may not use it, whether it exists or not.
            CodebookNotFound: no codebook has that name, or no name was given and several codebooks are live.
            DigestMismatch: it has another digest than the caller expects.
        """
        if codebooks is not None and name:
            codebooks.check(name)
        tokenizer = self._by_name.get(name or self._only(codebooks))
        if tokenizer is None:
            names = self._names(codebooks)
            raise no_codebook(name, names, num_codebooks=len(_bases(names)))
        if expected_digest:
            check_digest(expected_digest, info=tokenizer.info)
        return tokenizer

    def _only(self, codebooks: Codebooks | None) -> str:
        bases = _bases(self._names(codebooks))
        return bases[0] if len(bases) == 1 else ""

    def _names(self, codebooks: Codebooks | None) -> list[str]:
        names = self._by_name if codebooks is None else filter(codebooks.allow, self._by_name)
        return sorted(names, key=version_order)


def _bases(names: Sequence[str]) -> Sequence[str]:
    """Return the names without a version; if there are none, all."""
    return [name for name in names if VERSION_MARK not in name] or names


class Engine:
    """Serves jobs on the device of its tokenizers. Its methods may be called from any thread."""

    def __init__(
        self,
        tokenizers: Iterable[Tokenizer],
        config: EngineConfig | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        threads: int | None = None,
        metrics: Metrics | None = None,
        usage: LiveUsage | None = None,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the engine; `start` starts it.

        Args:
            tokenizers: the codebooks to serve, under their names.
            config: batching and limits.
            labels: further names of them; see `LiveSet`.
            threads: number of batches that are computed at once; None: a number that suits the device.
            metrics: counts what the engine does; None: nobody reads them.
            usage: samples the rows that are encoded; None: nobody reads what it counts.
            on_broken: called, from another thread, when the engine can serve no longer, before its jobs fail.
        """
        config = config or EngineConfig()
        tokenizers = list(tokenizers)
        self.live = _live(tokenizers, labels)
        self.metrics = metrics or Metrics()
        self.stats = EngineStats(metrics=self.metrics)
        self._on_broken = on_broken
        self.admission = Admission(config, self.stats)
        self.scheduler = Scheduler(config, self.stats)
        if threads is None:
            threads = max((_threads(tokenizer) for tokenizer in tokenizers), default=1)
        self._usage = usage
        if usage is not None:
            usage.follow(tokenizers)
        self._worker = Worker(self.scheduler, self.stats, threads=threads, on_broken=self._lost, usage=usage)
        self.quick = QuickBatches(self.scheduler, self._worker)

    def swap(self, tokenizers: Iterable[Tokenizer], labels: Mapping[str, str] | None = None) -> None:
        """Serve these codebooks from now on; jobs that were made for others finish with those."""
        tokenizers = list(tokenizers)
        self.live = _live(tokenizers, labels)
        if self._usage is not None:
            self._usage.follow(tokenizers)

    def start(self) -> None:
        """Start the threads."""
        self._worker.start()

    def drain(self) -> None:
        """Accept no more requests; those in the server are answered."""
        self.admission.close(Draining("the server is stopping"))

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Finish the queued jobs and end the threads.

        Args:
            timeout_s: seconds to finish; jobs that still wait then fail with Draining.

        Returns:
            Whether the threads have ended. A batch on the device cannot be interrupted.
        """
        self.drain()
        stopping = Draining("the server is stopping")
        self.scheduler.close(stopping, drop=False)
        if self._worker.join(timeout_s):
            return True
        self.scheduler.close(stopping, drop=True)
        return self._worker.join(0.0)

    def break_down(self, message: str, line: str, cause: BaseException | None = None) -> None:
        """Serve no longer: refuse requests, and fail those in the server with DeviceBroken.

        Args:
            message: for the callers.
            line: for the log.
            cause: its traceback goes to the log.
        """
        broken = DeviceBroken(message)
        self._on_broken()
        self.admission.close(broken)
        self.scheduler.close(broken, drop=True)
        # Last: whoever reads the log may be slow.
        logger.critical(line, exc_info=cause)

    def _lost(self, error: BaseException) -> None:
        self.break_down("the device failed", event("device_failed"), error)


def _live(tokenizers: Sequence[Tokenizer], labels: Mapping[str, str] | None) -> LiveSet:
    for tokenizer in tokenizers:
        # The device threads use other streams: wait until the tables are written.
        wait_for_stream(tokenizer.device)
    return LiveSet(tokenizers, labels)


def _threads(tokenizer: Tokenizer) -> int:
    return _CUDA_THREADS if tokenizer.device.type == "cuda" else 1
