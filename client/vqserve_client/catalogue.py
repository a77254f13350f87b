"""What the server says it serves, checked and remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError

from vqserve.codebook_info import CodebookInfo
from vqserve.layout import Layout
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.validation import no_codebook
from vqserve_client.config import is_digest
from vqserve_client.errors import ProtocolError, VqserveError

LAYOUT_OF_WIRE = {
    pb.LAYOUT_UNSPECIFIED: None,
    pb.LAYOUT_CHANNELS_FIRST: Layout.CHANNELS_FIRST,
    pb.LAYOUT_CHANNELS_LAST: Layout.CHANNELS_LAST,
}
WIRE_OF_LAYOUT = {
    Layout.CHANNELS_FIRST: pb.LAYOUT_CHANNELS_FIRST,
    Layout.CHANNELS_LAST: pb.LAYOUT_CHANNELS_LAST,
}

# What the widest index type of the wire's replies, uint32, can name.
_MOST_INDICES = 1 << 32
_WIDEST_ROW = 1 << 31


class ListPart:
    """The request for what is served."""

    method = "ListCodebooks"

    def __init__(self, target: str) -> None:
        self._target = target
        self.codebooks: tuple[CodebookInfo, ...] = ()

    def request(self) -> bytes:
        """Return the message to send."""
        return pb.ListCodebooksRequest().SerializeToString()

    def explain(self, error: VqserveError) -> VqserveError:
        """Return an error as it is: there is no array."""
        return error

    def accept(self, reply: bytes) -> None:
        """Take the list, if all of it makes sense."""
        try:
            listed = pb.ListCodebooksResponse.FromString(reply)
        except DecodeError:
            raise ProtocolError("the server's list of codebooks is not a valid message", target=self._target) from None
        codebooks = tuple(self._checked(entry) for entry in listed.codebooks)
        names = [info.name for info in codebooks]
        if len(set(names)) != len(names):
            raise ProtocolError(f"the server lists a codebook twice: {', '.join(names)}", target=self._target)
        self.codebooks = codebooks

    def _checked(self, entry: Any) -> CodebookInfo:
        widths = (entry.input_dim, entry.code_dim, entry.output_dim)
        if not (
            entry.name
            and is_digest(entry.digest)
            and 1 <= entry.num_codes <= _MOST_INDICES
            and 1 <= entry.vocab_size <= _MOST_INDICES
            and all(1 <= width <= _WIDEST_ROW for width in widths)
            and entry.num_quantizers >= 1
            and entry.layout in LAYOUT_OF_WIRE
        ):
            described = " ".join(str(entry).split())
            raise ProtocolError(f"the server lists a codebook that cannot be: {described[:500]}", target=self._target)
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
            layout=LAYOUT_OF_WIRE[entry.layout],
        )


def choose(codebooks: Sequence[CodebookInfo], name: str | None, *, target: str) -> CodebookInfo:
    """Return the codebook of that name; without a name, the only one, of several versions the latest.

    Raises:
        CodebookNotFound: if there is none, or several and no name; the text lists what there is.
    """
    chosen = [info for info in codebooks if (not info.is_version if name is None else info.name == name)]
    if len(chosen) == 1:
        return chosen[0]
    error = no_codebook(name, [info.name for info in codebooks], num_codebooks=len(chosen))
    error.target = target
    raise error
