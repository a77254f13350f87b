"""The one codebook that a call is about, however many requests it takes."""

from __future__ import annotations

from collections.abc import Sequence

from vqserve.codebook_info import CodebookInfo
from vqserve.validation import check_digest
from vqserve_client.catalogue import choose
from vqserve_client.errors import CodebookNotFound, DigestChanged, DigestMismatch, VqserveError

# How often a call that has no answer yet follows a server that replaces its codebook. On a busy machine it may be
# replaced several times between the list and the request.
_MOST_REFRESHES = 10


class WrongDigest(Exception):
    """A reply was made by another codebook than the one that was asked for: the pin decides what that means."""


class Pin:
    """The one codebook of a call, shared by the items of `encode_many`: none of its answers is another's.

    Every request names the digest that the server's list gave, so the list, which clients remember, may prove out of
    date: then, and only while nothing has been answered, it is asked for anew.

    Attributes:
        info: the codebook; None until the list was seen, and again when it proves out of date.
    """

    def __init__(self, codebook: str | None, digest: str | None, *, target: str) -> None:
        self.info: CodebookInfo | None = None
        self._refreshes = 0
        self._codebook = codebook
        self._digest = digest
        self._target = target
        self._answered = False
        self._remembered = False

    @property
    def refreshed(self) -> bool:
        """Return whether the list has to be asked for anew, or had to be."""
        return self._refreshes > 0

    def refresh(self) -> None:
        """Let the list be asked for anew."""
        self._refreshes += 1
        self.info = None

    def choose(self, codebooks: Sequence[CodebookInfo], *, remembered: bool = False) -> CodebookInfo:
        """Pin the codebook that was asked for, unless another item of the call was quicker.

        Args:
            codebooks: what is served.
            remembered: whether that was known from an earlier call.

        Raises:
            CodebookNotFound: if it is not there, or none was named and there are several.
            DigestMismatch: if it has another digest than the caller's.
        """
        if self.info is None:
            info = choose(codebooks, self._codebook, target=self._target)
            if self._digest is not None:
                self._check(self._digest, info)
            self.info = info
            self._remembered = remembered
        return self.info

    def doubt(self) -> bool:
        """Return whether the codebook may be chosen anew, because it was remembered and has not answered yet."""
        if not self._remembered or self._answered or self.refreshed:
            return False
        self.refresh()
        return True

    def claim(self, info: CodebookInfo, digest: str) -> None:
        """Take an answer of that digest to a request for that codebook.

        Raises:
            WrongDigest: if it is not the answer of the pinned codebook.
        """
        if digest != info.digest or self.info is not info:
            raise WrongDigest
        self._answered = True

    def reconsider(self, info: CodebookInfo, error: Exception) -> None:
        """Return if the request that failed may be made anew with whatever `choose` pins next; else raise why not."""
        if self.info is not info:
            return
        # A server that answers with another digest than it lists will not mend its ways.
        most = 1 if isinstance(error, WrongDigest) else _MOST_REFRESHES
        if not self._answered and self._refreshes < most:
            self.refresh()
            return
        if isinstance(error, CodebookNotFound):
            raise error
        if self._digest is not None and isinstance(error, DigestMismatch):
            raise error
        kind, text = (
            (DigestChanged, f"the codebook no longer has digest {info.digest}")
            if self._digest is None
            else (DigestMismatch, f"digest {self._digest} was pinned, the codebook has another")
        )
        request_id = error.request_id if isinstance(error, VqserveError) else None
        raise kind(text, target=self._target, codebook=info.name, request_id=request_id) from error

    def _check(self, digest: str, info: CodebookInfo) -> None:
        try:
            check_digest(digest, info=info)
        except DigestMismatch as error:
            error.target = self._target
            raise
