"""The codebooks that are being served, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vqserve.codebook_info import CodebookInfo
from vqserve_server.errors import UnknownCodebook
from vqserve_server.validation import check_digest

if TYPE_CHECKING:
    from vqserve_server.tokenizer import Tokenizer

# What an error quotes of a name that a stranger sent.
_QUOTED_CHARACTERS = 80


class LiveSet:
    """Tokenizers by name. Read by any thread; never changed once made."""

    def __init__(self, tokenizers: Iterable[Tokenizer]) -> None:
        self._by_name = {tokenizer.info.name: tokenizer for tokenizer in tokenizers}

    def __len__(self) -> int:
        return len(self._by_name)

    def infos(self) -> list[CodebookInfo]:
        """Return what is served, in name order."""
        return [self._by_name[name].info for name in sorted(self._by_name)]

    def resolve(self, name: str, expected_digest: str = "") -> Tokenizer:
        """Return the tokenizer of that name; for no name the only one.

        Raises:
            UnknownCodebook: there is none of that name, or no name was given and there are several.
            DigestMismatch: it has another digest than the caller expects ("": any will do).
        """
        if name:
            tokenizer = self._by_name.get(name)
            problem = f"no codebook {name[:_QUOTED_CHARACTERS]!r}"
        else:
            tokenizer = next(iter(self._by_name.values())) if len(self._by_name) == 1 else None
            problem = "the request names no codebook"
        if tokenizer is None:
            raise UnknownCodebook(f"{problem}; served here: {', '.join(sorted(self._by_name))}")
        if expected_digest:
            check_digest(expected_digest, info=tokenizer.info)
        return tokenizer
