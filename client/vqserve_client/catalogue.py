"""Which codebook a call is about: the list of the server, checked and remembered, and the entry pinned for a call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError

from vqserve.codebook_info import CodebookInfo
from vqserve.errors import (
    CodebookNotFound,
    DigestChanged,
    DigestMismatch,
    InvalidOption,
    ProtocolError,
    VqserveError,
    escape,
    quoted,
)
from vqserve.payload import LAYOUT_OF_NUMBER
from vqserve.text import is_name, printable
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.validation import (
    LARGEST_VOCABULARY,
    ambiguous_digest,
    is_digest,
    no_codebook,
    no_digest,
    wrong_digest,
)
from vqserve_client.requests import Request
from vqserve_client.server_info import ServerInfo

# Channels of a row at most: more have overflowed somewhere.
_WIDEST_ROW = 1 << 31
# Bytes of a list: more than twenty thousand codebooks. All of it is read, entry by entry, before a call goes on.
_LARGEST_LIST = 5 << 20
_MOST_STAGES = 1 << 12
# How often a call that has no reply yet follows a server that replaces its codebook. On a busy machine it may be
# replaced several times between the list and the request.
_MOST_REFRESHES = 10


class ListRequest(Request):
    """The request for the codebooks that are served.

    Attributes:
        catalogue: the codebooks, after the reply.
        server: what the server says about itself; None: an older server does not.
    """

    method = "ListCodebooks"

    def __init__(self, target: str) -> None:
        self._target = target
        self.catalogue = Catalogue(())
        self.server: ServerInfo | None = None

    def message(self) -> bytes:
        """Return the message to send."""
        return pb.ListCodebooksRequest().SerializeToString()

    def explain(self, error: VqserveError) -> VqserveError:
        """Return an error unchanged: there is no array."""
        return error

    def accept(self, reply: bytes) -> None:
        """Take the list if all of it is valid."""
        if len(reply) > _LARGEST_LIST:
            raise ProtocolError(
                f"the server's list of codebooks has {len(reply)} bytes, more than {_LARGEST_LIST}", target=self._target
            )
        try:
            listed = pb.ListCodebooksResponse.FromString(reply)
        except DecodeError:
            raise ProtocolError("the server's list of codebooks is not a valid message", target=self._target) from None
        codebooks = tuple(self._checked(entry) for entry in listed.codebooks)
        names = [info.name for info in codebooks]
        if len(set(names)) != len(names):
            twice, _ = Counter(names).most_common(1)[0]
            raise ProtocolError(f"the server lists a codebook twice: {quoted(twice, 200)}", target=self._target)
        self.catalogue = Catalogue(codebooks)
        self.server = ServerInfo.of(listed.server) if listed.HasField("server") else None

    def _checked(self, entry: Any) -> CodebookInfo:
        widths = (entry.input_dim, entry.code_dim, entry.output_dim)
        if not (
            is_name(entry.name)
            and is_name(entry.kind)
            and is_digest(entry.digest)
            and 1 <= entry.num_codes <= LARGEST_VOCABULARY
            and 1 <= entry.vocab_size <= LARGEST_VOCABULARY
            and all(1 <= width <= _WIDEST_ROW for width in widths)
            and 1 <= entry.num_quantizers <= _MOST_STAGES
            and _can_be_stages(entry)
            and entry.layout in LAYOUT_OF_NUMBER
        ):
            for name in ("name", "kind", "digest"):
                setattr(entry, name, getattr(entry, name)[:80])
            del entry.stage_vocab_sizes[16:]
            entry.DiscardUnknownFields()
            described = escape(printable(" ".join(str(entry).split()), 500))
            raise ProtocolError(f"the server lists a codebook that cannot be: {described}", target=self._target)
        return CodebookInfo(
            name=entry.name,
            digest=entry.digest,
            kind=entry.kind,
            num_codes=entry.num_codes,
            vocab_size=entry.vocab_size,
            input_dim=entry.input_dim,
            code_dim=entry.code_dim,
            output_dim=entry.output_dim,
            num_quantizers=entry.num_quantizers,
            stage_vocab_sizes=tuple(entry.stage_vocab_sizes),
            layout=LAYOUT_OF_NUMBER[entry.layout],
            version=entry.version or None,
        )


def _can_be_stages(entry: Any) -> bool:
    sizes = entry.stage_vocab_sizes
    return not sizes or (len(sizes) == entry.num_quantizers > 1 and min(sizes) >= 1 and max(sizes) == entry.vocab_size)


def choose(
    codebooks: Sequence[CodebookInfo], name: str | None, digest: str | None = None, *, target: str
) -> CodebookInfo:
    """Return the codebook of that name and digest.

    Args:
        codebooks: the served codebooks.
        name: name of the codebook; None: the one that has the digest; without a digest the only one, of several
            versions the latest.
        digest: its digest, or at least 8 of the first digits; None: any.
        target: the server's address, for errors.

    Raises:
        CodebookNotFound: if there is none, or several and neither name nor digest; the text lists what there is.
        DigestMismatch: the codebook has another digest; the text says which one has this digest, if any.
        InvalidOption: several digests begin with these digits.
    """
    try:
        holders = [] if digest is None else [info for info in codebooks if info.digest.startswith(digest)]
        named = [info for info in codebooks if (not info.is_version if name is None else info.name == name)]
        if name is None and holders and digest is not None:
            if len({info.digest for info in holders}) > 1:
                raise ambiguous_digest(digest, holders)
            return _most_lasting(holders)
        holder = _most_lasting(holders) if holders else None
        if len(named) == 1:
            if digest is not None and named[0] not in holders:
                raise wrong_digest(digest, info=named[0], holder=holder)
            return named[0]
        if name is None and digest is not None and codebooks:
            raise no_digest(digest, codebooks)
        raise no_codebook(name, [info.name for info in codebooks], num_codebooks=len(named), holder=holder)
    except VqserveError as error:
        error.target = target
        raise


def _most_lasting(holders: Sequence[CodebookInfo]) -> CodebookInfo:
    """Return the codebook whose name will mean this digest for the longest: a version, rather than the latest one."""
    return min(
        holders, key=lambda info: (info.version is None or not info.name.endswith(f"@{info.version}"), info.name)
    )


class Catalogue:
    """The codebooks of one list, and what was chosen from it.

    Attributes:
        codebooks: the codebooks.
        forms: forms of requests that are about them, by what they depend on.
    """

    def __init__(self, codebooks: Sequence[CodebookInfo]) -> None:
        self.codebooks = codebooks
        self.forms: dict[tuple[object, ...], Any] = {}
        self._chosen: dict[tuple[str | None, str | None], CodebookInfo] = {}

    def choose(self, name: str | None, digest: str | None, *, target: str) -> CodebookInfo:
        """Return the codebook of that name and digest; see `choose`."""
        info = self._chosen.get((name, digest))
        if info is None:
            info = self._chosen[name, digest] = choose(self.codebooks, name, digest, target=target)
        return info


class WrongDigest(Exception):
    """A reply was made by another codebook than the request named; Pin.reconsider decides what happens."""


class Pin:
    """The one codebook of a call, shared by the items of `encode_many`: all results come from it.

    Every request names the digest in the server's list. Clients remember that list, so it may be out of date: then,
    and only while there is no reply, the list is requested again.

    Attributes:
        info: the codebook; None until the list was seen, and again when it proves out of date.
        answered: whether a reply of the codebook has come.
    """

    def __init__(self, codebook: str | None, digest: str | None, *, target: str) -> None:
        """Pin nothing yet; see `choose` for name and digest."""
        self.info: CodebookInfo | None = None
        self._refreshes = 0
        self._codebook = codebook
        self._digest = digest
        self._target = target
        self.answered = False
        self._remembered = False

    def choose_remembered(self, catalogue: Catalogue | None) -> CodebookInfo | None:
        """Pin the codebook from a list that an earlier call got; None: the list must be requested.

        Args:
            catalogue: the list; None: there is none.
        """
        if catalogue is None or self._refreshes:
            return None
        try:
            info = self.info = catalogue.choose(self._codebook, self._digest, target=self._target)
        except (CodebookNotFound, DigestMismatch, InvalidOption):
            self._refresh()
            return None
        self._remembered = True
        return info

    def choose(self, catalogue: Catalogue) -> CodebookInfo:
        """Pin the codebook that the caller asked for, unless another item of the call has pinned it.

        Args:
            catalogue: the served codebooks.

        Raises:
            CodebookNotFound: it is not there, or none was named and there are several.
            DigestMismatch: it has another digest than the caller's.
            InvalidOption: the caller's digest is the beginning of several.
        """
        if self.info is None:
            self.info = catalogue.choose(self._codebook, self._digest, target=self._target)
            self._remembered = False
        return self.info

    def may_be_outdated(self) -> bool:
        """Return whether the list was remembered and has led to no reply yet; it is then requested again."""
        if not self._remembered or self.answered or self._refreshes:
            return False
        self._refresh()
        return True

    def claim(self, info: CodebookInfo, digest: str) -> None:
        """Take a reply with this digest to a request for this codebook.

        Raises:
            WrongDigest: it is not a reply of the pinned codebook.
        """
        if digest != info.digest or self.info is not info:
            raise WrongDigest
        self.answered = True

    def reconsider(self, info: CodebookInfo, error: Exception) -> None:
        """Return if the request that failed may be made again with the next pinned codebook.

        Args:
            info: the codebook of the request.
            error: how it failed.

        Raises:
            VqserveError: the request may not be made again.
        """
        if self.info is not info:
            return
        # Retry once only for a wrong digest: the server contradicts its own list.
        most = 1 if isinstance(error, WrongDigest) else _MOST_REFRESHES
        if not self.answered and self._refreshes < most:
            self._refresh()
            return
        if isinstance(error, CodebookNotFound) or (self._digest is not None and isinstance(error, DigestMismatch)):
            raise error
        kind, text = (
            (DigestChanged, f"the codebook no longer has digest {info.digest}")
            if self._digest is None
            else (DigestMismatch, f"digest {self._digest} was pinned, the codebook has another")
        )
        request_id = error.request_id if isinstance(error, VqserveError) else None
        hint = None if self._digest is None else "pin its new digest with {digest=}, or serve the old codebook again"
        raise kind(text, target=self._target, codebook=info.name, request_id=request_id, hint=hint) from error

    def _refresh(self) -> None:
        self._refreshes += 1
        self.info = None
