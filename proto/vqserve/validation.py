"""Checks of a caller's arrays and options, and their error texts, for client and server.

The SDK checks before it sends, the server checks because other clients send too, and `Tokenizer` checks in process. Of
these checks only `check_indices` reads the data of an array; other code that does makes its errors with the functions
at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, takewhile
from numbers import Integral, Number
from typing import Any

import numpy as np
import numpy.typing as npt

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
    TokenBeyondRange,
    escape,
    quoted,
)
from vqserve.layout import LATENT_RANKS, Layout, channel_axis, parse_layout, resolve_layout, wrong_rank
from vqserve.stages import beyond_stages

# Numbers of axes that indices without stages can have.
INDEX_RANKS = (1, 2, 3, 4)
# The number of values of uint32, the widest index type of replies.
LARGEST_VOCABULARY = 1 << 32
OUTPUTS = ("latents", "code_rows")
ON_ERROR = ("raise", "return")
# Positions and byte counts are signed 64-bit numbers everywhere.
_MAX_ELEMENTS = (1 << 63) // 8
# An error text quotes at most this much of a name or a digest that a caller sent.
_QUOTED_CHARACTERS = 80
# Characters of a list of names in an error text; status details hold 1024.
_LONGEST_LIST = 700
_DIGEST_CHARACTERS = 64
# Digits of a digest that are enough to name a codebook among those of one server.
_PREFIX_CHARACTERS = 8


# Options.


def check_output(output: object) -> None:
    """Check the output of decode.

    Raises:
        InvalidOption: it is neither "latents" nor "code_rows".
    """
    _check_one_of("output", output, OUTPUTS)


def check_on_error(on_error: object) -> None:
    """Check what `encode_many` and `decode_many` do with an error.

    Raises:
        InvalidOption: it is neither "raise" nor "return".
    """
    _check_one_of("on_error", on_error, ON_ERROR)


def _check_one_of(option: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise InvalidOption(f"{{option}} must be one of {names}, not {quoted(value)}", option=option)


def check_count(num_quantizers: object) -> None:
    """Check a number of quantizers that no codebook is known for yet.

    Raises:
        InvalidOption: it is neither None, which means all, nor an integer of 1 or more.
    """
    if num_quantizers is None:
        return
    if not isinstance(num_quantizers, Integral) or isinstance(num_quantizers, bool) or int(num_quantizers) < 1:
        raise InvalidOption(
            f"{{option}} must be an integer of 1 or more, not {quoted(num_quantizers)}",
            option="num_quantizers",
        )


def check_num_quantizers(asked: object, *, available: int) -> int:
    """Return the number of indices of a token to encode or decode.

    Args:
        asked: number that the caller gave; None: all.
        available: `CodebookInfo.num_quantizers`.

    Raises:
        InvalidOption: the number is not an integer in [1, available].
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
    """Check that a codebook has an output of decode: a residual codebook has no code rows.

    Raises:
        InvalidOption: the output is "code_rows" and a token of the codebook has several codes.
    """
    if output == "code_rows" and info.has_stages:
        raise InvalidOption(
            f"codebook {quoted(info.name, 200)} has stages: its tokens have latents, but no code rows",
            option="output",
            suggestion={"output": "latents"},
        )


def check_call(
    *, codebook: object = None, digest: object = None, timeout: object = None, num_quantizers: object = None
) -> None:
    """Check the options of a call for which no codebook is known yet; None stands for an option that is not given.

    Raises:
        InvalidOption: an option has a value that is not allowed.
        TypeError: codebook, digest or timeout is of another type.
    """
    if codebook is not None:
        check_name("codebook", codebook)
    if digest is not None:
        check_digest_form(digest)
    if timeout is not None:
        check_timeout(timeout)
    if num_quantizers is not None:
        check_count(num_quantizers)


def check_name(option: str, name: object) -> None:
    """Check an optional name.

    Raises:
        TypeError: it is not a string.
        InvalidOption: it is empty.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{option} must be a string, not {type(name).__name__}")
    if name == "":
        raise InvalidOption("{option} must not be empty", option=option)


def check_timeout(timeout_s: object) -> float:
    """Return a timeout, checked.

    Raises:
        TypeError: it is not a number.
        InvalidOption: it is not above 0; infinity is.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise TypeError(f"timeout must be a number of seconds, not {repr(timeout_s)[:_QUOTED_CHARACTERS]}")
    if math.isnan(timeout_s) or timeout_s <= 0:
        raise InvalidOption(f"{{option}} must be above 0 seconds, not {timeout_s}", option="timeout")
    return float(timeout_s)


def check_digest_form(digest: object) -> None:
    """Check that an optional text has the form of a digest, or of the beginning of one.

    Raises:
        TypeError: it is not a string.
        InvalidOption: it is not 64 lower-case hexadecimal digits, or 8 or more.
    """
    check_name("digest", digest)
    if isinstance(digest, str) and not _begins_digest(digest):
        raise InvalidOption(
            f"{{option}} must be the codebook's 64 lower-case hexadecimal digits, or the first {_PREFIX_CHARACTERS} or "
            f"more of them, not {quoted(digest, 80)}",
            option="digest",
        )


def is_digest(text: str) -> bool:
    """Return whether a text has the form of a digest."""
    return len(text) == _DIGEST_CHARACTERS and _begins_digest(text)


def _begins_digest(text: str) -> bool:
    return _PREFIX_CHARACTERS <= len(text) <= _DIGEST_CHARACTERS and set(text) <= set("0123456789abcdef")


def check_digest(expected: str, *, info: CodebookInfo) -> None:
    """Check that a codebook has the digest that the caller pinned.

    Raises:
        DigestMismatch: it has another; the error names both.
    """
    if expected != info.digest:
        raise wrong_digest(expected, info=info)


def wrong_digest(expected: str, *, info: CodebookInfo, holder: CodebookInfo | None = None) -> DigestMismatch:
    """Return the error for a pinned digest that is not the codebook's.

    Args:
        expected: the pinned digest, or its beginning.
        info: the codebook.
        holder: a codebook that has this digest; None: none is known.
    """
    text = (
        f"codebook {quoted(info.name, 200)} has digest {info.digest}, not {quoted(expected[:_DIGEST_CHARACTERS], 80)}"
    )
    if holder is None:
        return DigestMismatch(text, codebook=info.name, digest=info.digest)
    return DigestMismatch(
        f"{text}, which is that of codebook {quoted(holder.name, 200)}",
        codebook=info.name,
        digest=info.digest,
        option="codebook",
        suggestion={"codebook": holder.name},
        hint="pass {suggestion}",
    )


def no_codebook(
    name: str | None, served: Sequence[str], *, num_codebooks: int, holder: CodebookInfo | None = None
) -> CodebookNotFound:
    """Return the error for a codebook that is not served.

    Args:
        name: name in the request; None or "" if it has none.
        served: names of all served codebooks.
        num_codebooks: number of served codebooks; versions of one count once.
        holder: a codebook that has the digest in the request; None: none is known.
    """
    names = _listed(served)
    if not served:
        return CodebookNotFound("no codebook is served", codebook=name)
    if not name:
        return CodebookNotFound(f"{num_codebooks} codebooks are served, choose one with {{codebook=}}: {names}")
    shown = name[:_QUOTED_CHARACTERS]
    error = CodebookNotFound(f"no codebook {escape(repr(shown))} is served, only: {names}", codebook=shown)
    if holder is None:
        return error
    return error.with_fields(
        option="codebook", suggestion={"codebook": holder.name}, hint="{suggestion} has the digest that was asked for"
    )


def no_digest(expected: str, infos: Sequence[CodebookInfo]) -> CodebookNotFound:
    """Return the error for a digest that none of several codebooks has.

    Args:
        expected: the digest, or its beginning.
        infos: the served codebooks.
    """
    shown = quoted(expected[:_DIGEST_CHARACTERS], 80)
    return CodebookNotFound(f"no codebook with digest {shown} is served, only: {_with_digests(infos)}")


def ambiguous_digest(expected: str, infos: Sequence[CodebookInfo]) -> InvalidOption:
    """Return the error for the beginning of a digest that several digests have.

    Args:
        expected: the beginning.
        infos: the codebooks that have these digests.
    """
    shown = quoted(expected[:_DIGEST_CHARACTERS], 80)
    return InvalidOption(
        f"{{option}} {shown} is the beginning of several digests, use more digits: {_with_digests(infos)}",
        option="digest",
    )


def _with_digests(infos: Sequence[CodebookInfo]) -> str:
    return _listed([f"{info.name} {info.digest}" for info in infos])


def _listed(names: Sequence[str]) -> str:
    """Return names for a template, only the first ones if there are many."""
    ends = accumulate(len(name) + 2 for name in names)
    count = max(1, sum(1 for _ in takewhile(lambda end: end <= _LONGEST_LIST, ends)))
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return escape(", ".join(names[:count])) + more


# Shapes.


def check_batched(batched: object) -> bool:
    """Return whether arrays have a batch axis, checked.

    Raises:
        TypeError: it is neither True nor False.
    """
    if not isinstance(batched, bool):
        raise TypeError(f"batched must be True or False, not {repr(batched)[:_QUOTED_CHARACTERS]}")
    return batched


def check_latents_shape(
    shape: Sequence[int], layout: str | None, *, info: CodebookInfo, batched: bool = True
) -> Layout:
    """Check the shape of latents for a codebook, and return their layout.

    Args:
        shape: shape of the latents.
        layout: "channels_first", "channels_last" or None, the codebook's default.
        info: the codebook.
        batched: False: the first axis was added to the caller's array, and is not in errors.

    Raises:
        InvalidOption: there is no such layout.
        InvalidShape: the rank is not 2 to 5, the channel count is not the codebook's, or a size overflows.
    """
    resolved = resolve_layout(len(shape), parse_layout(layout), info.layout, batched=batched)
    check_channels(shape, resolved, info.input_dim, batched=batched)
    # Empty axes count as 1: otherwise the other axes could have any length, and the reply could not be addressed.
    if math.prod([length or 1 for length in shape]) > _MAX_ELEMENTS:
        raise InvalidShape(f"latents of shape {_shape_of_caller(shape, batched)} are too large", array="latents")
    return resolved


def _shape_of_caller(shape: Sequence[int], batched: bool | None) -> tuple[int, ...]:
    """Return the shape of the caller's array, which may have no batch axis."""
    return tuple(shape) if batched is not False else tuple(shape)[1:]


def check_channels(shape: Sequence[int], layout: Layout, channels: int, *, batched: bool | None = None) -> None:
    """Check the number of channels of latents.

    Args:
        shape: shape of the latents, of a rank that the layout allows.
        layout: layout of the latents.
        channels: number of channels that the codebook takes.
        batched: as in `check_latents_shape`; None: the caller has no such option.

    Raises:
        InvalidShape: the number is another; the error suggests a layout or a batch axis if that would fit.
    """
    found = shape[channel_axis(layout)]
    if found == channels:
        return
    shown = _shape_of_caller(shape, batched)
    text = f"latents of shape {shown} have {found} channels in layout {layout}, the codebook takes {channels}"
    other = Layout.CHANNELS_FIRST if layout is Layout.CHANNELS_LAST else Layout.CHANNELS_LAST
    # Latents of two axes have their channels last.
    if len(shape) > 2 and shape[channel_axis(other)] == channels:
        raise InvalidShape(
            f"{text}: should it be {{suggestion}}?",
            array="latents",
            option="layout",
            suggestion={"layout": str(other)},
        )
    if batched is False:
        # An axis was added: with a batch axis of the caller's own, the channels are the third axis.
        question = "is there a batch axis?" if shape[2:3] == (channels,) and layout is Layout.CHANNELS_FIRST else None
    else:
        question = "is the batch axis missing?" if len(shape) in (3, 4) and shape[0] == channels else None
    if question is None:
        raise InvalidShape(text, array="latents")
    if batched is None:
        raise InvalidShape(f"{text}: {question} pass latents[None]", array="latents")
    raise InvalidShape(
        f"{text}: {question} pass {{suggestion}}",
        array="latents",
        option="batched",
        suggestion={"batched": not batched},
    )


def check_indices_shape(
    shape: Sequence[int],
    layout: str | None,
    *,
    info: CodebookInfo,
    num_quantizers: object = None,
    batched: bool = True,
) -> Layout:
    """Check the shape of indices for a codebook, and return the layout of the latents that they decode to.

    Args:
        shape: shape of the indices: 1 to 4 axes; for a residual codebook the 2 to 5 axes of the latents, with the
            indices of a token in place of the channels.
        layout: as in `check_latents_shape`.
        info: the codebook.
        num_quantizers: number of indices of each token to decode, the first ones; None: all. The array may have more
            than are decoded, up to the number that the codebook has.
        batched: as in `check_latents_shape`.

    Raises:
        InvalidOption: there is no such layout, or num_quantizers is not an integer in [1, info.num_quantizers].
        InvalidShape: the indices have too few or too many axes, the layout needs more, a token has too few or too
            many indices, or a size overflows.
    """
    wanted = check_num_quantizers(num_quantizers, available=info.num_quantizers)
    has_stages = info.has_stages
    check_indices_rank(len(shape), LATENT_RANKS if has_stages else INDEX_RANKS, batched=batched)
    if math.prod([length or 1 for length in shape]) * max(info.output_dim, info.code_dim) > _MAX_ELEMENTS:
        shown = _shape_of_caller(shape, batched)
        raise InvalidShape(f"indices of shape {shown} decode to more than can be held", array="indices")
    resolved = resolve_layout(len(shape) + (not has_stages), parse_layout(layout), info.layout, batched=batched)
    if has_stages:
        check_stages(shape, resolved, wanted=wanted, available=info.num_quantizers, batched=batched)
    return resolved


def check_indices_rank(rank: int, ranks: Sequence[int] = INDEX_RANKS, *, batched: bool = True) -> None:
    """Check the number of axes of indices; see `wrong_rank`.

    Raises:
        InvalidShape: the rank is not one of `ranks`.
    """
    if rank not in ranks:
        raise wrong_rank("indices", ranks, rank, batched=batched)


def check_stages(shape: Sequence[int], layout: Layout, *, wanted: int, available: int, batched: bool = True) -> None:
    """Check the number of indices of a token in indices of a residual codebook.

    Args:
        shape: shape of the indices, which have the rank of their latents.
        layout: layout of the latents; the indices of a token take the place of the channels.
        wanted: number of indices of a token to decode, the first ones.
        available: number of indices of a token that the codebook has.
        batched: False: the first axis was added to the caller's array, and is not in errors.

    Raises:
        InvalidShape: the array has fewer than `wanted` or more than `available`.
    """
    found = shape[channel_axis(layout)]
    if wanted <= found <= available:
        return
    which = str(available) if wanted == available else f"{wanted} to {available}"
    shown = _shape_of_caller(shape, batched)
    text = f"indices of shape {shown} have {found} for a token in layout {layout}, expected {which}"
    if batched and layout is Layout.CHANNELS_FIRST and wanted <= shape[0] <= available:
        text += ": are they (n_q, b, ...)? swapaxes(0, 1) first"
    elif 0 < found < wanted == available:
        raise InvalidShape(
            f"{text}: pass {{suggestion}} to decode that many",
            array="indices",
            option="num_quantizers",
            suggestion={"num_quantizers": found},
        )
    raise InvalidShape(text, array="indices")


# Elements of arrays.

# Of each signed type the unsigned one of its size, and the least value there that is negative here.
_AS_UNSIGNED = {np.dtype(f"i{size}"): (np.dtype(f"u{size}"), 1 << (8 * size - 1)) for size in (1, 2, 4, 8)}


def check_indices(
    array: npt.NDArray[np.integer[Any]], *, decodable: int, stage_sizes: Sequence[int] = (), axis: int = -1
) -> None:
    """Check that indices lie in [0, decodable), or in the vocabularies of their stages.

    Args:
        array: indices of any integer type and shape; they are compared without conversion, so none wraps.
        decodable: exclusive upper bound; of several stages, the largest.
        stage_sizes: exclusive upper bound of each stage, where these differ.
        axis: axis of a token's indices, with as many elements as there are stages or fewer.

    Raises:
        InvalidDtype: the array does not hold integers (bool does not count).
        IndexOutOfRange: an index is outside; the error names the position and value of the first, and the range.
    """
    if array.dtype.kind not in "iu":
        raise not_indices(array.dtype)
    if array.size == 0:
        return
    bound = min(stage_sizes, default=decodable)
    as_unsigned = _AS_UNSIGNED.get(array.dtype)
    if as_unsigned is not None:
        unsigned, limit = as_unsigned
        # Read so, negative values are the greatest: one pass instead of two.
        if int(array.view(unsigned).max()) < min(bound, limit):
            return
    low, high = int(array.min()), int(array.max())
    if low >= 0 and high < bound:
        return
    outside = array < 0
    if stage_sizes:
        outside |= beyond_stages(array, stage_sizes, axis)
        if not outside.any():
            return
    elif high >= decodable:
        # If `decodable` does not fit the array's type, no element can exceed it.
        outside |= array >= np.asarray(decodable).astype(array.dtype)
    position = tuple(int(i) for i in np.unravel_index(int(outside.argmax()), array.shape))
    value = int(array[position])
    if not stage_sizes:
        raise not_an_index(position, value, decodable)
    raise not_an_index(position, value, stage_sizes[position[axis]], stage=position[axis])


def not_an_array(array: str, value: object) -> NotAnArray:
    """Return the error for a value that is not a numpy array or a torch tensor with plain values.

    Args:
        array: "latents" or "indices".
        value: the value.
    """
    if isinstance(value, np.ma.MaskedArray):
        found = "a masked array, whose mask would be lost"
    elif isinstance(value, Number | np.generic):
        found = "a scalar"
    elif isinstance(value, list | tuple):
        found = f"{type(value).__name__}: convert it with numpy.asarray"
    else:
        found = type(value).__name__
    return NotAnArray(f"{array} must be a numpy array or a torch tensor, not {found}", array=array)


def not_dense(array: str, *, dtype: object, layout: object, device: object) -> NotAnArray:
    """Return the error for a torch tensor without plain values: sparse, quantized, or on the device "meta"."""
    return NotAnArray(
        f"{array} must be a dense torch tensor with values, not {dtype} {layout} on {device}", array=array
    )


def not_several(verb: str) -> NotAnArray:
    """Return the error for one array in place of an iterable of arrays."""
    return NotAnArray(f"{verb}_many takes an iterable of arrays, not one: {verb}(x), or {verb}_many([x])")


def not_latents(dtype: object) -> InvalidDtype:
    """Return the error for latents whose type, numpy's or torch's, is not a type of latents."""
    name = str(dtype).removeprefix("torch.")
    hint = "are they indices? use decode" if "int" in name else "convert them with .astype(numpy.float32)"
    *names, last = (known.name for known in sorted(LATENTS, key=lambda known: known.storage.itemsize))
    return InvalidDtype(f"latents must be {', '.join(names)} or {last}, not {name}: {hint}", array="latents")


def not_indices(dtype: object) -> InvalidDtype:
    """Return the error for indices whose type, numpy's or torch's, is not a type of indices."""
    name = str(dtype).removeprefix("torch.")
    hint = "are they latents? use encode" if "float" in name else "convert them with .astype(numpy.int64)"
    return InvalidDtype(f"indices must be integers, not {name}: {hint}", array="indices")


def not_finite(position: Sequence[int], value: float, *, as_float32: bool = False) -> NonFiniteLatents:
    """Return the error for latents with NaN or infinity.

    Args:
        position: position of the first such value.
        value: the value.
        as_float32: whether the value is finite but becomes infinite in float32.
    """
    if as_float32:
        text, hint = f"{{where}} is {value}, beyond float32's range", TokenBeyondRange.hint
        return NonFiniteLatents(text, array="latents", position=position, hint=hint)
    return NonFiniteLatents(f"{{where}} is {value}", array="latents", position=position)


def not_an_index(
    position: Sequence[int] | None, value: int, decodable: int, *, stage: int | None = None
) -> IndexOutOfRange:
    """Return the error for an index that is not in [0, decodable).

    Args:
        position: position of the index.
        value: the index.
        decodable: exclusive upper bound.
        stage: stage of the index, counted from 0; None: all indices have the same bound.
    """
    of_stage = "" if stage is None else f", the vocabulary of stage {stage}"
    text = f"{{where}} is {value}, not in [0, {decodable}){of_stage}"
    return IndexOutOfRange(text, array="indices", position=position, hint="are the indices from this codebook?")


def beyond_dtype(row: int, dtype: str, *, has_stages: bool) -> InvalidOption:
    """Return the error for a token that decodes to a value beyond the range of the requested element type.

    Args:
        row: row of the token.
        dtype: name of the type.
        has_stages: whether a token has an axis of indices.
    """
    return InvalidOption(
        f"{{where}} decodes to a value beyond the range of {dtype}: use a wider {{option}}",
        array="tokens" if has_stages else "indices",
        row=row,
        option="dtype",
        suggestion={"dtype": "float32" if BY_NAME[dtype].storage.itemsize < 4 else "float64"},
    )
