"""The codebooks that are being served, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from vqserve.codebook_info import VERSION_MARK, CodebookInfo
from vqserve_server.codebook_files import latest, version_order
from vqserve_server.errors import UnknownCodebook
from vqserve_server.validation import check_digest

if TYPE_CHECKING:
    from vqserve_server.tokenizer import Tokenizer

# An error quotes at most this much of a name that a caller sent.
_QUOTED_CHARACTERS = 80


class LiveSet:
    """Tokenizers by name. Read by any thread; never changed once made.

    Of those named "book@1", "book@2" and so on the one with the greatest number is "book" as well.
    """

    def __init__(self, tokenizers: Iterable[Tokenizer]) -> None:
        self._by_name = {tokenizer.info.name: tokenizer for tokenizer in tokenizers}
        self._by_name |= {base: self._by_name[name] for base, name in latest(self._by_name).items()}

    def __len__(self) -> int:
        return len(self._by_name)

    def infos(self) -> list[CodebookInfo]:
        """Return the codebook of each name, in name order, versions as numbers."""
        return [replace(self._by_name[name].info, name=name) for name in self._names()]

    def resolve(self, name: str, expected_digest: str = "") -> Tokenizer:
        """Return the tokenizer of that name; for no name the only one, of several versions the latest.

        Raises:
            UnknownCodebook: there is none of that name, or no name was given and there is not just one.
            DigestMismatch: it has another digest than the caller expects ("": any will do).
        """
        if name:
            tokenizer = self._by_name.get(name)
            problem = f"no codebook {name[:_QUOTED_CHARACTERS]!r}"
        else:
            bases = [base for base in self._by_name if VERSION_MARK not in base]
            tokenizer = self._by_name[bases[0]] if len(bases) == 1 else None
            problem = "the request names no codebook"
        if tokenizer is None:
            raise UnknownCodebook(f"{problem}; served here: {', '.join(self._names()) or 'nothing'}")
        if expected_digest:
            check_digest(expected_digest, info=tokenizer.info)
        return tokenizer

    def _names(self) -> list[str]:
        return sorted(self._by_name, key=version_order)
