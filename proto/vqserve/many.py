"""What `encode_many` and `decode_many` are given and yield, in the SDK and in process: arrays, or pairs with keys."""

from __future__ import annotations

from typing import Any

from vqserve.errors import DeadlineExceeded, InvalidArgument, InvalidOption, ServerError, VqserveError

NO_KEY: object = object()
"""Stands for the key of an array that was given alone."""


def keyed(item: object) -> tuple[object, object]:
    """Return the key and the array of an item, which is one array or a pair."""
    if isinstance(item, tuple) and len(item) == 2:
        return item
    return NO_KEY, item


def with_key(key: object, result: Any) -> Any:
    """Return a result as its array was given: alone or in a pair."""
    return result if key is NO_KEY else (key, result)


def concerns_one_array(error: VqserveError, *, answered: bool) -> bool:
    """Return whether an error is about one array, so that the arrays after it may have results.

    Args:
        error: the error.
        answered: whether the server has answered this call before: only then its failure, or its silence, may be due
            to the array.
    """
    if isinstance(error, InvalidArgument):
        # An option that no array can change, such as too many quantizers, is about all arrays.
        return not isinstance(error, InvalidOption) or error.array is not None
    return answered and isinstance(error, ServerError | DeadlineExceeded)
