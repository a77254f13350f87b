"""How many rows a batch may have after the device had too little memory for more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from vqserve_server.engine.job import Key

if TYPE_CHECKING:
    from vqserve_server.tokenizer import Tokenizer

# A batch of so few rows is not halved: its memory is that of the codebook's tables.
_LEAST_ROWS = 64
# Others may free memory meanwhile. A larger batch that fails again costs one attempt.
_LOWERED_S = 30.0


class _Limit(NamedTuple):
    rows: int
    until: float


class RowLimits:
    """The lowered limits of keys, each for a while. Used by all device threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._is_used = False
        # By the codebook and the other fields of a key. A codebook that was replaced is not kept.
        self._limits: WeakKeyDictionary[Tokenizer, dict[tuple[Any, ...], _Limit]] = WeakKeyDictionary()

    def of(self, key: Key) -> int | None:
        """Return how many rows a batch of a key may have; None: no limit is lowered."""
        if not self._is_used:
            return None
        with self._lock:
            limit = self._limits.get(key.tokenizer, {}).get(key[1:])
        return None if limit is None or limit.until <= self._clock() else limit.rows

    def lower(self, key: Key, rows: int) -> int | None:
        """Halve the limit of a key after a batch of that many rows failed; return it, or None if it is the least."""
        if rows <= _LEAST_ROWS:
            return None
        limit = _Limit(max(rows // 2, _LEAST_ROWS), self._clock() + _LOWERED_S)
        with self._lock:
            self._limits.setdefault(key.tokenizer, {})[key[1:]] = limit
            self._is_used = True
        return limit.rows
