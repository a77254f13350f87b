"""The codebooks that a token may use."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import translate

from vqserve.codebook_info import VERSION_MARK
from vqserve.errors import PermissionDenied, escape

_MOST_VERDICTS = 1024
_LONGEST_NAME = 200
_SHOWN = 80


class Codebooks:
    """Names and patterns: `*` stands for any characters, `?` for one. A name without a version allows all versions.

    Read by any thread.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self._expression = re.compile("|".join(translate(pattern) for pattern in self.patterns))
        self._verdicts: dict[str, bool] = {}

    def allow(self, name: str) -> bool:
        """Return whether the codebook of that name, "book" or "book@3", may be used."""
        verdict = self._verdicts.get(name)
        if verdict is None:
            names = (name, name.partition(VERSION_MARK)[0])
            verdict = len(name) <= _LONGEST_NAME and any(map(self._expression.fullmatch, names))
            if len(self._verdicts) >= _MOST_VERDICTS:
                self._verdicts.clear()
            self._verdicts[name[: _LONGEST_NAME + 1]] = verdict
        return verdict

    def check(self, name: str) -> None:
        """Check that a codebook may be used; whether it exists makes no difference.

        Raises:
            PermissionDenied: it may not.
        """
        if not self.allow(name):
            shown = name[:_SHOWN]
            raise PermissionDenied(f"the access token may not use codebook {escape(repr(shown))}", codebook=shown)
