"""`encode_many` with keys, and with errors in the place of results: nothing that was taken is lost."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref

import numpy as np
import pytest

from vqserve_client import (
    AsyncClient,
    Closed,
    CodebookNotFound,
    DeadlineExceeded,
    DigestChanged,
    DigestMismatch,
    InvalidArgument,
    InvalidOption,
    ServerError,
    Unauthenticated,
    Unavailable,
    VqserveError,
)
from vqserve_server import Tokenizer
from vqserve_server.quantizers import VectorQuantizer


@pytest.fixture
def tokenizer():
    return Tokenizer(VectorQuantizer(300, 4), name="book", device="cpu")


@pytest.fixture
def book(request, tokenizer, serving, connect):
    return tokenizer if request.param == "local" else connect(serving(tokenizer).target)


everywhere = pytest.mark.parametrize(
    ("connect", "book"), [("sync", "local"), ("sync", "remote"), ("async", "remote")], indirect=True
)


def until_it_fails(results):
    """Return what was yielded and the error that was raised in the end."""
    yielded = []
    try:
        yielded.extend(results)
    except VqserveError as error:
        return yielded, error
    raise AssertionError("the call did not fail")


@everywhere
def test_keys_are_any_objects_and_come_back_with_their_results(book, latents):
    keys = ["a", 7, None, ("x", 1), object(), ["list"], np.zeros(3)]
    arrays = [latents(n, 4, seed=n) for n in range(len(keys))]
    indices = list(book.encode_many(zip(keys, arrays, strict=True)))
    for key, array, (got, result) in zip(keys, arrays, indices, strict=True):
        assert got is key
        assert (result == book.encode(array)).all()
    decoded = list(book.decode_many(indices))
    assert all(got is key for key, (got, _) in zip(keys, decoded, strict=True))


@everywhere
def test_errors_take_the_place_of_results(book, latents):
    good, nan = latents(3, 4), np.full((2, 4), np.nan, np.float32)
    items = [good, nan, good, [1.0], latents(3, 5), good, np.zeros(2, np.int32), nan, good]
    expected = book.encode(good)
    results = list(book.encode_many(items, on_error="return"))
    assert len(results) == len(items)
    assert [number for number, result in enumerate(results) if isinstance(result, VqserveError)] == [1, 3, 4, 6, 7]
    assert all((results[number] == expected).all() for number in (0, 2, 5, 8))
    assert [results[number].item for number in (1, 3, 4, 6, 7)] == [1, 3, 4, 6, 7]
    assert results[1].message == results[7].message == "latents[0, 0] is nan"
    assert isinstance(results[3], TypeError)
    pairs = list(book.encode_many(zip("abcdefghi", items, strict=True), on_error="return"))
    assert [key for key, _ in pairs] == list("abcdefghi")
    assert [str(result) for _, result in pairs if isinstance(result, VqserveError)] != []
    assert [type(result) for _, result in pairs] == [type(result) for result in results]


@everywhere
def test_wrong_indices_among_many_small_ones(book):
    items = [np.full(2, 300 if number % 10 == 3 else number % 300) for number in range(200)]
    for number, result in enumerate(book.decode_many(items, on_error="return")):
        if number % 10 == 3:
            assert (result.message, result.item) == ("indices[0] is 300, not in [0, 300)", number)
        else:
            assert (result == book.decode(items[number])).all()


@everywhere
def test_an_option_that_fits_no_array_ends_the_call(book, latents):
    taken = []

    def source():
        for number in itertools.count():
            taken.append(number)
            yield number, latents(3, 4)

    if isinstance(book, Tokenizer):
        with pytest.raises(InvalidOption, match="num_quantizers"):
            book.encode_many(source(), num_quantizers=2, on_error="return")
        return
    yielded, error = until_it_fails(book.encode_many(source(), num_quantizers=2, on_error="return"))
    assert isinstance(error, InvalidOption)
    assert [key for key, _ in yielded] == taken


@everywhere
@pytest.mark.parametrize(
    ("options", "kind"), [({"codebook": "none"}, CodebookNotFound), ({"digest": "0" * 64}, DigestMismatch)]
)
def test_an_error_of_the_call_stands_for_all_that_was_taken(book, latents, options, kind):
    taken = []

    def source():
        for number in range(100):
            taken.append(number)
            yield number, latents(3, 4)

    yielded, error = until_it_fails(book.encode_many(source(), on_error="return", **options))
    assert isinstance(error, kind)
    assert error.item is None
    assert taken
    assert [key for key, _ in yielded] == taken
    assert all(type(result) is kind and result.item == key for key, result in yielded)


@everywhere
def test_closed_between_two_results(book, latents):
    taken = []

    def source():
        for number in range(1000):
            taken.append(number)
            yield number, latents(3, 4)

    results = book.encode_many(source(), on_error="return")
    yielded = [next(results) for _ in range(3)]
    book.close()
    rest, error = until_it_fails(results)
    yielded += rest
    assert isinstance(error, Closed)
    assert [key for key, _ in yielded] == taken
    assert all(isinstance(result, np.ndarray) for _, result in yielded[:3])
    assert isinstance(yielded[-1][1], Closed)


@everywhere
@pytest.mark.parametrize("method", ["encode_many", "decode_many"])
def test_what_on_error_may_be(book, method):
    with pytest.raises(InvalidOption, match="on_error must be one of 'raise', 'return', not 'skip'"):
        getattr(book, method)([], on_error="skip")


def test_without_it_the_first_error_ends_the_call(tiny, connect, latents):
    results = connect(tiny.target).encode_many([("a", latents(3, 4)), ("b", latents(3, 5)), ("c", latents(3, 4))])
    assert next(results)[0] == "a"
    with pytest.raises(InvalidArgument) as caught:
        next(results)
    assert caught.value.item == 1


@pytest.mark.parametrize(("code", "kind"), [("INTERNAL", ServerError), ("DEADLINE_EXCEEDED", DeadlineExceeded)])
def test_a_failure_of_the_server_for_one_array(tiny, connect, failing, latents, apart, code, kind):
    client = connect(tiny.target)

    def source():
        for number in range(8):
            if number == 4:
                tiny.script.append(failing(code))
            yield number, latents(30, 4)

    results = list(client.encode_many(source(), on_error="return"))
    assert [key for key, _ in results] == list(range(8))
    assert [type(result) for _, result in results if isinstance(result, VqserveError)] == [kind]


def test_a_failure_of_a_request_that_several_arrays_share(tiny, connect, failing, latents):
    """Each is sent again alone: the others have results."""
    client = connect(tiny.target, window=16)
    # A failure before the first reply would be one of the whole call.
    has_a_result = threading.Event()
    failed_requests = []

    def fail_the_joined(request, context, honest):
        if request.shape[0] == 1 or not has_a_result.is_set():
            return honest()
        failed_requests.append(request.shape[0])
        return failing("INTERNAL")(request, context, honest)

    tiny.script.extend([fail_the_joined] * 4000)
    # More than are taken ahead.
    results = client.encode_many((latents(1, 4, seed=n) for n in range(2000)), on_error="return")
    every = [next(results)]
    has_a_result.set()
    every += results
    assert failed_requests
    assert len(every) == 2000
    assert [result for result in every if isinstance(result, VqserveError)] == []


def test_before_the_first_reply_a_failure_of_the_server_ends_the_call(tiny, connect, failing, latents, apart):
    tiny.script.extend([failing("INTERNAL")] * 10)
    yielded, error = until_it_fails(
        connect(tiny.target).encode_many(((n, latents(30, 4)) for n in range(100)), on_error="return")
    )
    assert isinstance(error, ServerError)
    assert len(yielded) < 20
    assert [key for key, _ in yielded] == list(range(len(yielded)))


@pytest.mark.parametrize(("code", "kind"), [("UNAVAILABLE", Unavailable), ("UNAUTHENTICATED", Unauthenticated)])
def test_results_that_came_are_not_lost_to_an_error_of_the_call(tiny, connect, failing, latents, apart, code, kind):
    client = connect(tiny.target, retries=1, window=3)
    taken = []

    def source():
        for number in itertools.count():
            taken.append(number)
            if number == 20:
                tiny.script.extend([failing(code)] * 1000)
            yield number, latents(30, 4)

    yielded, error = until_it_fails(client.encode_many(source(), on_error="return"))
    assert isinstance(error, kind)
    assert [key for key, _ in yielded] == taken
    failed = [key for key, result in yielded if isinstance(result, VqserveError)]
    assert failed == list(range(failed[0], len(taken)))
    assert len(failed) <= 6


def test_a_swap_ends_the_call(tiny, codes, connect, latents, apart):
    client = connect(tiny.target)
    taken = []

    def source():
        for number in itertools.count():
            taken.append(number)
            if number == 20:
                tiny.codes["small"] = codes("small", seed=1)
            yield number, latents(30, 4)

    yielded, error = until_it_fails(client.encode_many(source(), on_error="return"))
    assert isinstance(error, DigestChanged)
    assert [key for key, _ in yielded] == taken
    assert isinstance(yielded[-1][1], DigestChanged)


def test_a_source_that_fails_raises_after_the_results_before_it(tiny, connect, latents):
    def source():
        yield "a", latents(3, 4)
        yield "b", latents(3, 5)
        raise OSError("disk")

    results = connect(tiny.target).encode_many(source(), on_error="return")
    assert [next(results)[0], next(results)[0]] == ["a", "b"]
    with pytest.raises(OSError, match="disk"):
        next(results)


def test_what_an_async_source_gives_while_the_call_fails_is_not_lost(tiny, failing, latents):
    async def run() -> None:
        taken = []

        async def source():
            for number in itertools.count():
                if number > 5:
                    await asyncio.sleep(0.05)
                taken.append(number)
                yield number, latents(30, 4)

        async with AsyncClient(tiny.target, retries=0) as client:
            yielded = []
            results = client.encode_many(source(), on_error="return")
            try:
                async for key, _ in results:
                    yielded.append(key)
                    if key == 4:
                        tiny.script.extend([failing("UNAVAILABLE")] * 1000)
            except Unavailable:
                assert yielded == taken
            else:
                raise AssertionError("the call did not fail")

    asyncio.run(run())


def test_a_returned_error_does_not_hold_the_array(tiny, connect, latents):
    array = latents(3, 5)
    gone = weakref.ref(array)
    (error,) = connect(tiny.target).encode_many(iter([array]), on_error="return")
    del array
    gc.collect()
    assert gone() is None
    assert error.__traceback__ is error.__cause__ is error.__context__ is None
