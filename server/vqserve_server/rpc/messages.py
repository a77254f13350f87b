"""Converts fields of protobuf messages to validated values, for Encode and Decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from vqserve import payload, wire
from vqserve.codebook_info import CodebookInfo
from vqserve.errors import InvalidArgument, InvalidDtype, InvalidOption, InvalidShape, MessageTooLarge
from vqserve.layout import Layout, wrong_rank
from vqserve.v1 import tokenizer_pb2 as pb

MessageT = TypeVar("MessageT", bound=Message)

# Most bytes of a request without an array. It is parsed on the transport's thread, before anything else is known of it.
MOST_PLAIN_BYTES = 4096


def parse(kind: type[MessageT], raw: bytes) -> MessageT:
    """Return the message in some bytes; for messages without an array.

    Raises:
        InvalidArgument: they are not such a message, or are too many.
    """
    if len(raw) > MOST_PLAIN_BYTES:
        name = kind.DESCRIPTOR.name
        raise InvalidArgument(f"{name} of {len(raw)} bytes: it may have at most {MOST_PLAIN_BYTES}")
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise _not_valid(kind) from None


def read(kind: type[MessageT], raw: bytes) -> tuple[MessageT, memoryview]:
    """Return the message in some bytes without its payload, and the payload.

    Raises:
        InvalidArgument: they are not such a message, or too many beside the payload.
    """
    try:
        return wire.read(kind, raw)
    except wire.HeadTooLarge as error:
        raise InvalidArgument(str(error)) from None
    except DecodeError:
        raise _not_valid(kind) from None


def _not_valid(kind: type[Message]) -> InvalidArgument:
    return InvalidArgument(f"the request is not a valid {kind.DESCRIPTOR.name}")


def layout_of(number: int) -> Layout | None:
    """Return the layout that a request names, None for the codebook's default.

    Raises:
        InvalidOption: the enum has no such number.
    """
    try:
        return payload.LAYOUT_OF_NUMBER[number]
    except KeyError:
        raise InvalidOption(f"unknown {{option}} {number}", option="layout") from None


def check_dtype(field: str, dtype: int, allowed: frozenset[int]) -> None:
    """Check that a field may have an element type.

    Raises:
        InvalidDtype: names the field and the types that it can have.
    """
    if dtype not in allowed:
        names = ", ".join(payload.dtype_name(known) for known in sorted(allowed))
        raise InvalidDtype(f"{{option}} must be one of {names}, not {payload.dtype_name(dtype)}", option=field)


def check_array_dtype(dtype: int, allowed: frozenset[int], wrong: Callable[[object], InvalidDtype]) -> None:
    """Check that the payload of a request may have an element type: one of latents, or one of indices.

    Raises:
        InvalidDtype: it may not; if it is a type of the other arrays, the text is the SDK's, made by `wrong`.
    """
    if dtype in (payload.LATENT_DTYPES | payload.INDEX_DTYPES) - allowed:
        raise wrong(payload.dtype_name(dtype))
    check_dtype("dtype", dtype, allowed)


def check_payload(nbytes: int, dtype: int, shape: Sequence[int], array: str, ranks: Sequence[int]) -> tuple[int, ...]:
    """Check that a payload has the shape that its request claims, and return the shape.

    Args:
        nbytes: size of the payload.
        dtype: type of the elements.
        shape: claimed shape.
        array: name of the array, "latents" or "indices".
        ranks: allowed numbers of axes, ascending.

    Raises:
        InvalidShape: the shape has too few or too many axes, or does not match the payload.
    """
    # Check the rank first: a shape may have millions of axes, and the other error texts contain the shape.
    if len(shape) not in ranks:
        raise wrong_rank(array, ranks, len(shape))
    try:
        payload.check(nbytes, dtype, shape)
    except payload.PayloadError as error:
        raise InvalidShape(str(error), array=array) from None
    return tuple(shape)


def check_reply_size(nbytes: int, limit: int) -> None:
    """Check that a reply fits into a message, before anything is computed.

    Raises:
        MessageTooLarge: names both sizes.
    """
    most = limit - payload.ENVELOPE_BYTES
    if nbytes > most:
        raise MessageTooLarge(
            f"the reply would have {nbytes} bytes, and the server's limit of {limit} has room for {most}",
            option="max_message_bytes",
            suggestion={"max_message_bytes": limit},
            hint="send fewer tokens at once (the SDK does with {suggestion}), or start the server with a larger "
            "--max-message-bytes",
        )


def codebook_message(info: CodebookInfo) -> pb.CodebookInfo:
    """Return a codebook's description."""
    return pb.CodebookInfo(
        name=info.name,
        digest=info.digest,
        kind=info.kind,
        num_codes=info.num_codes,
        vocab_size=info.vocab_size,
        input_dim=info.input_dim,
        code_dim=info.code_dim,
        output_dim=info.output_dim,
        num_quantizers=info.num_quantizers,
        stage_vocab_sizes=info.stage_vocab_sizes,
        version=info.version or 0,
        layout=payload.NUMBER_OF_LAYOUT[info.layout],  # type: ignore[arg-type]
    )
