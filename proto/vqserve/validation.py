"""What must be true of a caller's arrays and options: the checks, and the texts, that client and server share.

The SDK checks before it sends, the server because others send too, and `Tokenizer` in process. Nothing here looks at
the data of an array; whoever does makes the error with one of the functions at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Number

import numpy as np

from vqserve.codebook_info import CodebookInfo
from vqserve.dtypes import BY_NAME, LATENTS
from vqserve.errors import (
    CodebookNotFound,
    DigestMismatch,
    IndexOutOfRange,
    InvalidDtype,
    InvalidOption,
    InvalidShape,
    NonFiniteLatents,
    NotAnArray,
)
from vqserve.layout import LATENT_RANKS, Layout, channel_axis, parse_layout, resolve_layout, wrong_rank

# Of indices: those of a token may be an axis.
INDEX_RANKS = (1, 2, 3, 4)
# What the widest index type of replies, uint32, can name.
LARGEST_VOCABULARY = 1 << 32
OUTPUTS = ("latents", "code_rows")
# Positions and byte counts are signed 64-bit numbers everywhere.
_MAX_ELEMENTS = (1 << 63) // 8
# What a text quotes of a name or a digest that a stranger sent.
_QUOTED_CHARACTERS = 80
_DIGEST_CHARACTERS = 64


# Options.


def check_output(output: object) -> None:
    """Refuse what decode cannot give.

    Raises:
        InvalidOption: it is neither "latents" nor "code_rows".
    """
    if output not in OUTPUTS:
        names = ", ".join(map(repr, OUTPUTS))
        raise InvalidOption(f"{{option}} must be one of {names}, not {output!r:.40}", option="output")


def check_count(num_quantizers: object) -> None:
    """Refuse a number of indices for each token that no codebook has.

    Raises:
        InvalidOption: it is neither None, which is all, nor an integer of 1 or more.
    """
    if num_quantizers is None:
        return
    if not isinstance(num_quantizers, Integral) or isinstance(num_quantizers, bool) or int(num_quantizers) < 1:
        raise InvalidOption(
            f"{{option}} must be an integer of 1 or more, not {num_quantizers!r:.40}", option="num_quantizers"
        )


def check_num_quantizers(asked: object, *, available: int) -> int:
    """Return how many of a codebook's indices for each token are meant.

    Args:
        asked: what the caller wants; None: all.
        available: `CodebookInfo.num_quantizers`.

    Raises:
        InvalidOption: it is no integer in [1, available].
    """
    check_count(asked)
    if not isinstance(asked, Integral):
        return available
    if int(asked) > available:
        allowed = f"an integer in [1, {available}]" if available > 1 else "1"
        reason = "" if available > 1 else ": a token of this codebook has one index"
        raise InvalidOption(
            f"{{option}} must be {allowed}, not {asked}{reason}",
            option="num_quantizers",
            suggestion={"num_quantizers": available},
        )
    return int(asked)


def check_has_output(output: str, *, info: CodebookInfo) -> None:
    """Refuse code rows of a residual codebook.

    Raises:
        InvalidOption: the codebook has a code row for each index, and none for a token.
    """
    if output == "code_rows" and info.has_stages:
        raise InvalidOption(
            f"codebook {info.name!r} has stages: its tokens have latents, but no code rows",
            option="output",
            suggestion={"output": "latents"},
        )


def check_digest_form(digest: str) -> None:
    """Refuse a text that is no digest.

    Raises:
        InvalidOption: it is not 64 lower-case hexadecimal digits.
    """
    if not is_digest(digest):
        raise InvalidOption(
            f"{{option}} must be the codebook's 64 lower-case hexadecimal digits, not {digest!r:.80}", option="digest"
        )


def is_digest(text: str) -> bool:
    """Return whether a text has a digest's form."""
    return len(text) == _DIGEST_CHARACTERS and set(text) <= set("0123456789abcdef")


def check_digest(expected: str, *, info: CodebookInfo) -> None:
    """Refuse a codebook that is not the one that the caller pinned.

    Raises:
        DigestMismatch: names both digests.
    """
    if expected != info.digest:
        raise wrong_digest(expected, info=info)


def wrong_digest(expected: str, *, info: CodebookInfo) -> DigestMismatch:
    """Return the error of a caller who pinned another digest than the codebook has."""
    return DigestMismatch(
        f"codebook {info.name!r} has digest {info.digest}, not {expected[:_DIGEST_CHARACTERS]!r}",
        codebook=info.name,
        digest=info.digest,
    )


def no_codebook(name: str | None, served: Sequence[str], *, num_codebooks: int) -> CodebookNotFound:
    """Return the error of a caller whose codebook is not there.

    Args:
        name: what the caller asked for; None or "": nothing.
        served: all names that could be asked for.
        num_codebooks: how many codebooks that are, versions of one counted once.
    """
    names = ", ".join(served)
    if not served:
        return CodebookNotFound("no codebook is served", codebook=name)
    if not name:
        return CodebookNotFound(f"{num_codebooks} codebooks are served, say which with {{codebook=}}: {names}")
    quoted = name[:_QUOTED_CHARACTERS]
    return CodebookNotFound(f"no codebook {quoted!r} is served, only: {names}", codebook=quoted)


# Shapes.


def check_latents_shape(shape: Sequence[int], layout: str | None, *, info: CodebookInfo) -> Layout:
    """Return the layout of latents whose shape the codebook takes.

    Args:
        shape: of the latents.
        layout: "channels_first", "channels_last" or None, the codebook's default.
        info: the codebook.

    Raises:
        InvalidOption: `layout` is not the name of one.
        InvalidShape: the rank is not 2 to 5, the channel count is not the codebook's, or a size overflows.
    """
    resolved = resolve_layout(len(shape), parse_layout(layout), info.layout)
    check_channels(shape, resolved, info.input_dim)
    # An empty axis lets the others be as large as they like: the reply would not be addressable.
    if math.prod([length or 1 for length in shape]) > _MAX_ELEMENTS:
        raise InvalidShape(f"latents of shape {tuple(shape)} are too large", array="latents")
    return resolved


def check_channels(shape: Sequence[int], layout: Layout, channels: int) -> None:
    """Refuse latents of another channel count.

    Args:
        shape: of the latents, of the rank that the layout needs.
        layout: how the shape is read.
        channels: what the codebook takes.

    Raises:
        InvalidShape: and what may be meant.
    """
    found = shape[channel_axis(layout)]
    if found == channels:
        return
    text = f"latents of shape {tuple(shape)} have {found} channels in layout {layout}, the codebook takes {channels}"
    other = Layout.CHANNELS_FIRST if layout is Layout.CHANNELS_LAST else Layout.CHANNELS_LAST
    # Latents of two axes have their channels last.
    if len(shape) > 2 and shape[channel_axis(other)] == channels:
        raise InvalidShape(
            f"{text}: should it be {{suggestion}}?",
            array="latents",
            option="layout",
            suggestion={"layout": str(other)},
        )
    if len(shape) in (3, 4) and shape[0] == channels:
        text += ": without a batch axis? latents[None] has one"
    raise InvalidShape(text, array="latents")


def check_indices_shape(
    shape: Sequence[int], layout: str | None, *, info: CodebookInfo, num_quantizers: object = None
) -> Layout:
    """Return the layout of the latents that indices of this shape decode to.

    Args:
        shape: of the indices: 1 to 4 axes; of a residual codebook the 2 to 5 of their latents, with the indices of a
            token in the place of the channels.
        layout: as in `check_latents_shape`.
        info: the codebook.
        num_quantizers: how many of each token's indices are to be decoded, the first ones; None: all that the codebook
            has. There may be more, up to those.

    Raises:
        InvalidOption: `layout` is not the name of one, or num_quantizers is no integer in [1, info.num_quantizers].
        InvalidShape: the indices have too few or too many axes, the layout needs more, a token has too few or too
            many indices, or a size overflows.
    """
    wanted = check_num_quantizers(num_quantizers, available=info.num_quantizers)
    check_indices_rank(len(shape), LATENT_RANKS if info.has_stages else INDEX_RANKS)
    if math.prod([length or 1 for length in shape]) * max(info.output_dim, info.code_dim) > _MAX_ELEMENTS:
        raise InvalidShape(f"indices of shape {tuple(shape)} decode to more than can be held", array="indices")
    resolved = resolve_layout(len(shape) + (not info.has_stages), parse_layout(layout), info.layout)
    if info.has_stages:
        check_stages(shape, resolved, wanted=wanted, available=info.num_quantizers)
    return resolved


def check_indices_rank(rank: int, ranks: Sequence[int] = INDEX_RANKS) -> None:
    """Refuse indices with too few or too many axes.

    Raises:
        InvalidShape: the rank is not one of `ranks`.
    """
    if rank not in ranks:
        raise wrong_rank("indices", ranks, rank)


def check_stages(shape: Sequence[int], layout: Layout, *, wanted: int, available: int) -> None:
    """Refuse indices of a residual codebook without an axis of as many indices per token as are to be decoded.

    Args:
        shape: of the indices, which have the rank of their latents.
        layout: where the latents' channels are, and the indices of a token.
        wanted: indices per token that decode is to read, the first ones.
        available: that the codebook has.

    Raises:
        InvalidShape: that axis is shorter than `wanted` or longer than `available`.
    """
    found = shape[channel_axis(layout)]
    if wanted <= found <= available:
        return
    which = str(available) if wanted == available else f"{wanted} to {available}"
    text = f"indices of shape {tuple(shape)} have {found} for a token in layout {layout}, expected {which}"
    if layout is Layout.CHANNELS_FIRST and wanted <= shape[0] <= available:
        text += ": are they (n_q, b, ...)? swapaxes(0, 1) first"
    elif 0 < found < wanted == available:
        raise InvalidShape(
            f"{text}: say {{suggestion}} to decode as few",
            array="indices",
            option="num_quantizers",
            suggestion={"num_quantizers": found},
        )
    raise InvalidShape(text, array="indices")


# What whoever looks at an array's elements says of them.


def not_an_array(array: str, value: object) -> NotAnArray:
    """Return the error of a value that is neither a numpy array nor a torch tensor.

    Args:
        array: "latents" or "indices".
        value: what was given.
    """
    if isinstance(value, np.ma.MaskedArray):
        found = "a masked array, whose mask would be lost"
    elif isinstance(value, Number | np.generic):
        found = "a scalar"
    elif isinstance(value, list | tuple):
        found = f"{type(value).__name__}: numpy.asarray(...) first"
    else:
        found = type(value).__name__
    return NotAnArray(f"{array} must be a numpy array or a torch tensor, not {found}", array=array)


def not_dense(array: str, *, dtype: object, layout: object, device: object) -> NotAnArray:
    """Return the error of a torch tensor without plain values: sparse, quantized, or on the device "meta"."""
    return NotAnArray(
        f"{array} must be a dense torch tensor with values, not {dtype} {layout} on {device}", array=array
    )


def not_several(verb: str) -> NotAnArray:
    """Return the error of one array where many are due, whose first axis would be taken apart."""
    return NotAnArray(f"{verb}_many takes an iterable of arrays, not one: {verb}(x), or {verb}_many([x])")


def not_latents(dtype: object) -> InvalidDtype:
    """Return the error of an array whose elements, numpy's or torch's, are not those of latents."""
    name = str(dtype).removeprefix("torch.")
    hint = "indices? that is decode" if "int" in name else "see .astype(numpy.float32)"
    *names, last = (known.name for known in sorted(LATENTS, key=lambda known: known.storage.itemsize))
    return InvalidDtype(f"latents must be {', '.join(names)} or {last}, not {name}: {hint}", array="latents")


def not_indices(dtype: object) -> InvalidDtype:
    """Return the error of an array whose elements, numpy's or torch's, are not those of indices."""
    name = str(dtype).removeprefix("torch.")
    hint = "latents? that is encode" if "float" in name else "see .astype(numpy.int64)"
    return InvalidDtype(f"indices must be integers, not {name}: {hint}", array="indices")


def not_finite(position: Sequence[int], value: float, *, as_float32: bool = False) -> NonFiniteLatents:
    """Return the error of latents with NaN or infinity.

    Args:
        position: of the first one.
        value: of it.
        as_float32: it is finite, and becomes infinite in float32.
    """
    beyond = ", beyond float32's range" if as_float32 else ""
    return NonFiniteLatents(f"{{where}} is {value}{beyond}", array="latents", position=position)


def not_an_index(position: Sequence[int] | None, value: int, decodable: int) -> IndexOutOfRange:
    """Return the error of an index that is not in [0, decodable)."""
    return IndexOutOfRange(f"{{where}} is {value}, not in [0, {decodable})", array="indices", position=position)


def beyond_dtype(row: int, dtype: str, *, has_stages: bool) -> InvalidOption:
    """Return the error of a token that decodes to a value beyond the range of the element type that is asked for.

    Args:
        row: of the token.
        dtype: name of the type.
        has_stages: whether a token has an axis of indices.
    """
    return InvalidOption(
        f"{{where}} decodes to a value beyond the range of {dtype}: take a wider {{option}}",
        array="tokens" if has_stages else "indices",
        row=row,
        option="dtype",
        suggestion={"dtype": "float32" if BY_NAME[dtype].storage.itemsize < 4 else "float64"},
    )
