"""What is known about the latents that a codebook was measured on: how often each code was chosen, and the error.

It is kept in the codebook's file (docs/codebooks.md), so that a server can tell whether the latents that it is asked
about are like those. It has no effect on tokens, and none on the digest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from vqserve_server.code_groups import CodeGroups, Ints
from vqserve_server.codebooks.state import Claim, StateError, canonical_json

if TYPE_CHECKING:
    from vqserve_server.quantizers import Quantizer

# Name of the tensor of the counts, and of the entry of the metadata without its prefix.
USAGE = "statistics.usage"
ENTRY = "statistics"
_MOST_SOURCE_CHARACTERS = 1000
_CHECKSUM_TAG = "vqserve statistics 1"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Figures of a codebook on some latents.

    Attributes:
        rows: number of tokens.
        usage: (CodeGroups.total,) tokens by counter.
        error: mean squared error of a channel, in the space of `quantizers.comparison`; None: it has none.
        source: what the latents were, for people.
    """

    rows: int
    usage: Ints
    error: float | None
    source: str = ""

    def written(self, digest: str) -> str:
        """Return the entry for the metadata of a file, whose tensor `USAGE` is `usage`.

        Args:
            digest: of the codebook.
        """
        return canonical_json({**self._fields(), "sha256": self._checksum(digest)})

    @classmethod
    def read(cls, entry: Mapping[str, object], usage: Ints, *, groups: CodeGroups, digest: str) -> Self:
        """Return the statistics of a file.

        Args:
            entry: the JSON object of the metadata.
            usage: the tensor `USAGE`, which `check_claim` has accepted.
            groups: of the codebook.
            digest: of the codebook.

        Raises:
            StateError: names the field that is damaged.
        """
        fields = {"rows", "error", "source", "sha256"}
        if set(entry) != fields:
            odd = sorted(set(entry) ^ fields)[0]
            raise StateError(f"vqserve.{ENTRY}: field {odd!r} is {'missing' if odd in fields else 'unknown'}")
        rows, error, source = entry["rows"], entry["error"], entry["source"]
        if type(rows) is not int or not 0 < rows < 1 << 63:
            raise StateError(f"vqserve.{ENTRY}: rows must be a positive integer, not {rows!r:.40}")
        if error is not None and not (isinstance(error, float) and math.isfinite(error) and error >= 0):
            raise StateError(f"vqserve.{ENTRY}: error must be null or a float from 0 on, not {error!r:.40}")
        if not isinstance(source, str) or len(source) > _MOST_SOURCE_CHARACTERS:
            raise StateError(f"vqserve.{ENTRY}: source must be a text of at most {_MOST_SOURCE_CHARACTERS} characters")
        read = cls(rows, usage, error, source)
        read._check_usage(groups)
        if entry["sha256"] != read._checksum(digest):
            raise StateError(
                f"vqserve.{ENTRY}: sha256 does not fit the other fields, the tensor {USAGE!r} and the digest"
            )
        return read

    def _check_usage(self, groups: CodeGroups) -> None:
        if int(self.usage.min()) < 0:
            place = int(self.usage.argmin())
            raise StateError(f"{USAGE}[{place}] is {int(self.usage[place])}, which is no count")
        for number, stage in enumerate(groups.stages):
            counts = self.usage[stage.start : stage.stop + 1]
            # Counts are compared as floating-point numbers, too: the sum of damaged ones may overflow.
            if float(counts.sum(dtype=np.float64)) > 2.0**62 or int(counts.sum()) != self.rows:
                raise StateError(f"{USAGE} does not count {self.rows} rows in stage {number}")

    def _fields(self) -> dict[str, object]:
        return {"rows": self.rows, "error": self.error, "source": self.source}

    def _checksum(self, digest: str) -> str:
        sha = hashlib.sha256(canonical_json([_CHECKSUM_TAG, digest, self._fields()]).encode())
        sha.update(np.ascontiguousarray(self.usage, "<i8").data)
        return sha.hexdigest()


def code_groups(quantizer: Quantizer) -> CodeGroups:
    """Return the counters of the indices that a quantizer's encode gives."""
    return CodeGroups(quantizer.stage_vocab_sizes or (quantizer.decodable,) * quantizer.num_quantizers)


def check_claim(claim: Claim | None, groups: CodeGroups) -> None:
    """Check element type and shape of the tensor `USAGE`, before it is read.

    Raises:
        StateError: it is missing or another.
    """
    if claim is None:
        raise StateError(f"tensor {USAGE!r} is missing, and vqserve.{ENTRY} is there")
    if claim != ("I64", (groups.total,)):
        dtype, shape = claim
        raise StateError(f"tensor {USAGE!r} is {dtype} of shape {list(shape)}, not I64 of shape [{groups.total}]")


class StatisticsTally:
    """Accumulates the statistics of tokens."""

    def __init__(self, groups: CodeGroups) -> None:
        """Start with no tokens."""
        self._groups = groups
        self._usage = np.zeros(groups.total, np.int64)
        self._rows = 0
        self._error = 0.0
        self._error_rows = 0

    def add(self, indices: Ints, errors: npt.NDArray[np.float64] | None) -> None:
        """Add tokens.

        Args:
            indices: (n, q) of all stages.
            errors: (n,) mean squared error of each token's channels, NaN or infinite for one without; None: the
                codebook has none.
        """
        np.add.at(self._usage, self._groups.places(indices).ravel(), 1)
        self._rows += len(indices)
        if errors is not None:
            finite = errors[np.isfinite(errors)]
            self._error += float(finite.sum())
            self._error_rows += finite.size

    def statistics(self, source: str) -> Statistics:
        """Return the statistics of all tokens; there must be at least one."""
        error = self._error / self._error_rows if self._error_rows else None
        # A sum of squares overflows float64 where latents exceed 1e150.
        known = error if error is not None and math.isfinite(error) else None
        return Statistics(self._rows, self._usage, known, source[:_MOST_SOURCE_CHARACTERS])
