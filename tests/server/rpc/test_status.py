"""Every domain error has a status, and nothing of the server reaches the caller."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from vqserve import errors
from vqserve_server.rpc.status import STATUS_CODES, status_of


def subclasses(kind: type) -> Iterator[type]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


# Raised before there are callers, or only in process, or by the SDK; their subclasses too.
EXEMPT = (
    errors.StartError,
    errors.Closed,
    errors.DigestChanged,
    errors.ProtocolError,
    errors.ServerError,
)
REACHING_CALLERS = sorted(
    {kind for kind in subclasses(errors.VqserveError) if not issubclass(kind, EXEMPT)}, key=lambda kind: kind.__name__
)


@pytest.mark.parametrize("kind", REACHING_CALLERS)
def test_every_domain_error_is_mapped(kind: type) -> None:
    assert any(base in STATUS_CODES for base in kind.__mro__)


@pytest.mark.parametrize("error", [RuntimeError("/secret/path"), errors.CodebookFileError("/secret/path"), KeyError()])
def test_the_unexpected_has_a_fixed_text(error: Exception) -> None:
    status = status_of(error, request_id="abc")
    assert status.code is grpc.StatusCode.INTERNAL
    assert status.details == "internal error; the server's log has it under request abc"
    assert not status.metadata


def test_overload_says_when_to_try_again() -> None:
    status = status_of(errors.Overloaded("full", retry_after_s=0.1234), request_id="abc")
    assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(status.metadata)["grpc-retry-pushback-ms"] == "124"


def test_details_fit_a_header() -> None:
    status = status_of(errors.InvalidShape("é" * 5000), request_id="abc")
    assert len(status.details) == 1024
    assert status.details.isascii()


def test_an_error_that_cannot_be_written_is_an_internal_one() -> None:
    odd = errors.InvalidShape("x", suggestion={"layout": object()})  # type: ignore[dict-item]
    status = status_of(odd, request_id="abc")
    assert status.code is grpc.StatusCode.INTERNAL
    assert status.details.endswith("under request abc")


def test_a_position_of_numpy_s_integers_is_written() -> None:
    error = errors.NonFiniteLatents("{where}", array="latents", position=(np.int64(1), np.int64(2)))
    entry = dict(status_of(error.shifted((np.int64(1), 1)), request_id="abc").metadata)["vqserve-error"]
    assert json.loads(entry)["position"] == [2, 3]
    assert error.shifted((np.int64(1), 1)).message == "latents[2, 3]"


def test_each_refusal_has_its_own_text_and_delay() -> None:
    for text, hint, delay in (("a", "b", 0.5), ("a", "b", 0.6), ("a", "c", 0.5), ("d", "b", 0.5), ("a", "b", None)):
        for _ in range(2):
            status = status_of(errors.Overloaded(text, hint=hint, retry_after_s=delay), request_id="1")
            assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert status.details == f"{text}: {hint}"
            assert dict(status.metadata).get("grpc-retry-pushback-ms") == (
                None if delay is None else f"{delay * 1e3:g}"
            )
