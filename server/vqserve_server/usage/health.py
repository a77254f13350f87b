"""The figures of codebook health, from what the processes of a server have counted (docs/codebook-health.md)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vqserve_server.code_groups import Ints
from vqserve_server.metrics.collector import Sample
from vqserve_server.usage.drift import measure_drift
from vqserve_server.usage.memory import BlockText, Snapshot, UsageReader

# Groups of codes whose shares a picture shows.
MOST_SHARES = 1024
# The figures of a large codebook take some ten milliseconds, which requests then lack. So they are computed at most so
# often, and for at most so large a share of the time.
_LEAST_AGE_S = 1.0
_MOST_TIME_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class StageHealth:
    """Figures of one stage, over the rows of the window.

    Attributes:
        codes: number of codes.
        codes_per_group: codes that are counted as one, if there are very many; else 1.
        sampled_rows: rows of the window that have an index of this stage.
        used: codes (or groups) with at least one row.
        dead: the others.
        perplexity: 2^H of the codes' (or groups') shares with their entropy H in bits; None without rows.
        drift_bits: Jensen-Shannon divergence of live usage and the file's; None: the file has no statistics, or there
            are too few rows.
        usage: shares of the rows of at most 1024 groups of neighbouring codes, of equal size but for the last.
        reference: the same of the file; None: it has no statistics.
    """

    codes: int
    codes_per_group: int
    sampled_rows: int
    used: int
    dead: int
    perplexity: float | None
    drift_bits: float | None
    usage: list[float]
    reference: list[float] | None


@dataclass(frozen=True, kw_only=True)
class CodebookHealth:
    """Figures of one codebook.

    Attributes:
        name: of the codebook.
        digest: of the codebook.
        kind: "vq", "ema" and so on.
        sampled_rows: rows that were sampled since the codebook of this name was first loaded.
        stages: figures of each stage.
        error: mean squared error of a channel, over the rows of the window with all indices; None: there is none.
        error_ratio: `error` divided by that in the file; None: there is none.
    """

    name: str
    digest: str
    kind: str
    sampled_rows: int
    stages: list[StageHealth]
    error: float | None
    error_ratio: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**vars(self), "stages": [vars(stage) for stage in self.stages]}


class HealthReader:
    """Reads what all processes of a server have counted. Used by one thread at a time."""

    def __init__(self, memories: Sequence[memoryview]) -> None:
        """Read nothing yet.

        Args:
            memories: those that the processes write to (`LiveUsage`).
        """
        self._readers = [UsageReader(memory) for memory in memories]
        self._next_at = -math.inf
        self._codebooks: list[CodebookHealth] = []

    def codebooks(self) -> list[CodebookHealth]:
        """Return the figures of all codebooks that are served, in the order of their names.

        The counts of the processes are added up. If they serve different codebooks of one name, as in the middle of a
        reload, the one that was loaded last counts.
        """
        started = time.monotonic()
        if started >= self._next_at:
            self._codebooks = _read(self._readers)
            taken = time.monotonic() - started
            self._next_at = started + max(_LEAST_AGE_S, taken / _MOST_TIME_SHARE)
        return self._codebooks

    def as_json(self) -> list[dict[str, Any]]:
        """Return the figures as plain data: the content of `/codebooks.json`."""
        return [codebook.as_dict() for codebook in self.codebooks()]

    def samples(self) -> Iterator[Sample]:
        """Yield the figures as metrics; those that are not known yet are left out."""
        for codebook in self.codebooks():
            of_codebook = {"codebook": codebook.name}
            yield "codebook_sampled_rows", of_codebook, codebook.sampled_rows
            if codebook.error is not None:
                yield "codebook_error", of_codebook, codebook.error
            if codebook.error_ratio is not None:
                yield "codebook_error_ratio", of_codebook, codebook.error_ratio
            for number, stage in enumerate(codebook.stages):
                if stage.perplexity is None:
                    continue
                of_stage = {**of_codebook, "stage": str(number)}
                yield "codebook_window_rows", of_stage, stage.sampled_rows
                yield "codebook_used_ratio", of_stage, stage.used / (stage.used + stage.dead)
                yield "codebook_dead_codes", of_stage, stage.dead
                yield "codebook_perplexity", of_stage, stage.perplexity
                if stage.drift_bits is not None:
                    yield "codebook_drift_bits", of_stage, stage.drift_bits


def _read(readers: Sequence[UsageReader]) -> list[CodebookHealth]:
    by_name: dict[str, list[Snapshot]] = {}
    for reader in readers:
        for block in reader.blocks():
            snapshot = block.snapshot()
            if snapshot is not None:
                by_name.setdefault(snapshot.text.name, []).append(snapshot)
    return [_health(by_name[name]) for name in sorted(by_name)]


def _health(snapshots: Sequence[Snapshot]) -> CodebookHealth:
    """Return the figures of one name, from the snapshots of all processes."""
    last = max(snapshots, key=lambda snapshot: snapshot.made_at)
    same = [snapshot for snapshot in snapshots if snapshot.text == last.text]
    usage = np.stack([snapshot.usage for snapshot in same]).sum(axis=0)
    error_rows = sum(snapshot.error_rows for snapshot in same)
    error = sum(snapshot.error_sum for snapshot in same) / error_rows if error_rows else None
    known = last.reference_error
    return CodebookHealth(
        name=last.text.name,
        digest=last.text.digest,
        kind=last.text.kind,
        sampled_rows=sum(snapshot.total_rows for snapshot in snapshots),
        stages=[_stage(last.text, number, usage, last.reference) for number in range(len(last.text.sizes))],
        error=_known(error),
        error_ratio=_known(error / known if error is not None and known else None),
    )


def _known(figure: float | None) -> float | None:
    # A file may have an error so small that no float holds the ratio. JSON has no word for infinity.
    return figure if figure is not None and math.isfinite(figure) else None


def _stage(text: BlockText, number: int, usage: Ints, reference: Ints | None) -> StageHealth:
    groups = text.groups
    stage = groups.stages[number]
    # Rows without a code (a remap's sentinel) drift, too, but are no code's.
    with_none = slice(stage.start, stage.stop + 1)
    counts = usage[stage]
    rows = int(usage[with_none].sum())
    used = int(np.count_nonzero(counts))
    drift = None if reference is None else measure_drift(usage[with_none], reference[with_none])
    return StageHealth(
        codes=text.sizes[number],
        codes_per_group=groups.codes_per_group,
        sampled_rows=rows,
        used=used,
        dead=counts.size - used,
        perplexity=_perplexity(counts),
        drift_bits=drift.bits if drift is not None and drift.is_known else None,
        usage=_shares(counts),
        reference=None if reference is None else _shares(reference[stage]),
    )


def _perplexity(counts: Ints) -> float | None:
    there = counts[counts > 0]
    if not there.size:
        return None
    shares = there / there.sum()
    # abs: with one used code the sum is -0.
    return float(2.0 ** abs((shares * np.log2(shares)).sum()))


def _shares(counts: Ints) -> list[float]:
    width = -(-counts.size // MOST_SHARES)
    sums = np.add.reduceat(counts, np.arange(0, counts.size, width))
    total = int(sums.sum())
    # Six digits are more than a picture shows.
    return [float(f"{share:.6g}") for share in (sums / total).tolist()] if total else [0.0] * sums.size
