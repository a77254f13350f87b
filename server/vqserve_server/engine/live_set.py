"""The codebooks that are being served, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from vqserve.codebook_info import VERSION_MARK, CodebookInfo
from vqserve.validation import check_digest, no_codebook
from vqserve_server.codebook_files import latest, version_order

if TYPE_CHECKING:
    from vqserve_server.tokenizer import Tokenizer


class LiveSet:
    """Tokenizers by name; immutable, so any thread may read it.

    The latest of the versions "book@1", "book@2" and so on is also served as "book".
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
        """Return the tokenizer of a name; for an empty name, the only codebook in its latest version.

        Raises:
            CodebookNotFound: there is no such codebook, or the name is empty and there are several.
            DigestMismatch: it has another digest than expected ("" accepts any).
        """
        bases = [base for base in self._by_name if VERSION_MARK not in base]
        asked = name or (bases[0] if len(bases) == 1 else "")
        tokenizer = self._by_name.get(asked)
        if tokenizer is None:
            raise no_codebook(name, self._names(), num_codebooks=len(bases))
        if expected_digest:
            check_digest(expected_digest, info=tokenizer.info)
        return tokenizer

    def _names(self) -> list[str]:
        return sorted(self._by_name, key=version_order)
