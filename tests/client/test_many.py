"""encode_many and decode_many: lazy, in order, bounded, and over when they are over."""

from __future__ import annotations

import asyncio
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from vqserve_client import AsyncClient, Closed, DigestChanged, InvalidArgument, Overloaded


def test_answers_come_in_order(tiny, connect, latents):
    items = [latents(5, 4, seed=seed) for seed in range(40)]
    client = connect(tiny.target)
    indices = list(client.encode_many(items))
    assert len(indices) == 40
    for item, answer in zip(items, indices, strict=True):
        assert (answer == tiny.codes["small"].encode(item)).all()
    decoded = list(client.decode_many(iter(indices), dtype="float64", output="code_rows"))
    assert all((rows == tiny.codes["small"].rows[answer]).all() for rows, answer in zip(decoded, indices, strict=True))
    assert tiny.lists == 1


def test_order_is_kept_when_replies_overtake(tiny, connect, latents):
    second_done = threading.Event()

    def wait_for_second(request, context, honest):
        second_done.wait()
        return honest()

    def be_second(request, context, honest):
        second_done.set()
        return honest()

    items = [latents(3, 4, seed=seed) for seed in range(2)]
    # Whichever arrives first waits for the other.
    tiny.script.extend([wait_for_second, be_second])
    answers = list(connect(tiny.target).encode_many(items))
    for item, answer in zip(items, answers, strict=True):
        assert (answer == tiny.codes["small"].encode(item)).all()


def test_items_of_any_size_and_kind_share_the_window(tiny, connect, latents):
    tiny.gate.clear()
    items = [latents(300, 4), torch.from_numpy(latents(2, 4, 9, 9)), latents(0, 4), latents(1, 4), latents(200, 4)]
    client = connect(tiny.target, max_message_bytes=1024, window=3)
    answers: list = []
    thread = threading.Thread(target=lambda: answers.extend(client.encode_many(iter(items))))
    thread.start()
    for _ in range(3):
        tiny.arrived.acquire()
    tiny.gate.set()
    thread.join()
    assert tiny.peak == 3
    assert [type(answer) for answer in answers] == [np.ndarray, torch.Tensor, np.ndarray, np.ndarray, np.ndarray]
    assert [tuple(answer.shape) for answer in answers] == [(300,), (2, 9, 9), (0,), (1,), (200,)]


def test_no_more_items_are_read_than_fit_the_window(tiny, connect, latents):
    taken = []

    def source():
        for number in itertools.count():
            taken.append(number)
            yield latents(9000, 4)

    generator = connect(tiny.target, window=3).encode_many(source())
    assert taken == []
    for done in range(1, 6):
        next(generator)
        assert len(taken) < done + 3
    generator.close()


def test_a_source_that_waits_for_answers_gets_them(tiny, latents):
    """An async source may make an item from the answer to the one before."""

    async def run() -> int:
        answers: asyncio.Queue = asyncio.Queue()

        async def source():
            yield latents(2, 4)
            for _ in range(3):
                previous = await answers.get()
                yield latents(len(previous) + 1, 4)

        async with AsyncClient(tiny.target) as client:
            lengths = []
            async for answer in client.encode_many(source()):
                lengths.append(len(answer))
                answers.put_nowait(answer)
            return lengths

    assert asyncio.run(run()) == [2, 3, 4, 5]


def test_a_failed_item_raises_after_earlier_results_and_cancels_the_rest(tiny, connect, latents):
    good, bad = latents(3, 4), latents(3, 5)
    generator = connect(tiny.target).encode_many([good, good, bad, good, good])
    assert next(generator).shape == (3,)
    assert next(generator).shape == (3,)
    with pytest.raises(InvalidArgument, match="5 channels"):
        next(generator)
    with pytest.raises(StopIteration):
        next(generator)


def test_an_item_that_is_no_array_raises_after_earlier_results(tiny, connect, latents):
    generator = connect(tiny.target).encode_many([latents(3, 4), [1, 2]])
    assert next(generator).shape == (3,)
    with pytest.raises(TypeError):
        next(generator)


def test_a_source_that_fails_raises_after_the_answers_before_it(tiny, connect, latents):
    def source():
        yield latents(3, 4)
        yield latents(2, 4)
        raise OSError("disk")

    generator = connect(tiny.target).encode_many(source())
    assert [len(next(generator)), len(next(generator))] == [3, 2]
    with pytest.raises(OSError, match="disk"):
        next(generator)


def test_what_cannot_be_iterated_is_rejected_at_once(tiny, connect):
    with pytest.raises(TypeError, match="iter"):
        next(connect(tiny.target).encode_many(3))


def test_closing_early_cancels_requests_in_flight(tiny, connect, latents):
    hanging = threading.Event()
    cancelled = threading.Semaphore(0)

    def behave(request, context, honest):
        if request.shape[0] == 1:
            hanging.wait()
        else:
            gone = threading.Event()
            if not context.add_callback(gone.set):
                # It was cancelled before it came here.
                gone.set()
            hanging.set()
            gone.wait()
            cancelled.release()
        return honest()

    tiny.script.extend([behave] * 9)
    generator = connect(tiny.target, window=3).encode_many(latents(1 + (n > 0), 4) for n in itertools.count())
    assert next(generator).shape == (1,)
    generator.close()
    assert cancelled.acquire(timeout=60)


def test_one_codebook_for_all_items(tiny, connect, latents):
    other = "e" * 64

    def replaced(request, context, honest):
        tiny.replace("small", digest=other)
        tiny.script.clear()
        return honest()

    client = connect(tiny.target, window=1)
    tiny.script.extend([lambda request, context, honest: honest(), replaced])
    generator = client.encode_many([latents(2, 4)] * 3)
    next(generator)
    with pytest.raises(DigestChanged):
        next(generator)
    # A new call follows the new codebook.
    assert client.encode(latents(2, 4)).shape == (2,)


def test_retries_and_a_list_out_of_date_inside_a_window(tiny, connect, failing, latents):
    client = connect(tiny.target, window=4)
    client.encode(latents(1, 4))
    tiny.replace("small", digest="d" * 64)
    tiny.script.extend([failing("UNAVAILABLE")] * 3)
    items = [latents(n, 4, seed=n) for n in range(1, 12)]
    for item, answer in zip(items, client.encode_many(items), strict=True):
        assert (answer == tiny.codes["small"].encode(item)).all()


@pytest.mark.usefixtures("apart")
def test_retries_end_in_their_turn(tiny, connect, failing, latents):
    client = connect(tiny.target, retries=0, window=2)
    full = failing("RESOURCE_EXHAUSTED")

    def full_for_the_long(request, context, honest):
        return honest() if request.shape[0] == 2 else full(request, context, honest)

    # Two requests in flight may arrive in any order.
    tiny.script.extend([full_for_the_long] * 9)
    generator = client.encode_many([latents(2, 4)] * 2 + [latents(3, 4)] * 7)
    next(generator)
    next(generator)
    with pytest.raises(Overloaded):
        next(generator)


@pytest.mark.long
def test_a_slow_consumer_gets_all_results(tiny, connect, latents):
    """The clock of an item stands still while its caller does something else: here longer than the timeout."""
    client = connect(tiny.target, max_message_bytes=1024, window=2)
    client.encode(latents(1, 4))
    generator = client.encode_many([latents(1, 4), latents(400, 4), latents(1, 4)], timeout=2)
    next(generator)
    threading.Event().wait(2.2)
    assert [len(answer) for answer in generator] == [400, 1]


def test_many_generators_of_one_client(tiny, connect, latents, request):
    if "async" in request.node.name:
        pytest.skip("an event loop has one thread")
    client = connect(tiny.target)
    items = [latents(5, 4, seed=seed) for seed in range(10)]
    expected = [tiny.codes["small"].encode(item).tolist() for item in items]
    with ThreadPoolExecutor(8) as pool:
        runs = pool.map(lambda _: [answer.tolist() for answer in client.encode_many(items)], range(8))
        assert all(run == expected for run in runs)


def test_async_sources_and_tasks(tiny, latents):
    async def source():
        for seed in range(6):
            await asyncio.sleep(0)
            yield latents(3, 4, seed=seed)

    async def run():
        async with AsyncClient(tiny.target) as client:
            many = [answer async for answer in client.encode_many(source())]
            tasks = [client.encode(latents(3, 4, seed=seed)) for seed in range(6)]
            single = await asyncio.gather(*tasks)
            assert all((a == b).all() for a, b in zip(many, single, strict=True))

    asyncio.run(run())


def test_a_cancelled_task_cancels_its_request(tiny, latents):
    async def run():
        async with AsyncClient(tiny.target) as client:
            await client.codebooks()
            task = asyncio.ensure_future(client.encode(latents(2, 4)))
            await asyncio.to_thread(tiny.arrived.acquire)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    tiny.gate.clear()
    asyncio.run(run())
    assert tiny.cancelled.acquire(timeout=60)


def test_a_slow_async_source_is_cancelled_with_the_generator(tiny, latents):
    async def run():
        ended = asyncio.Event()

        async def source():
            yield latents(2, 4)
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        async with AsyncClient(tiny.target) as client:
            generator = client.encode_many(source())
            assert (await anext(generator)).shape == (2,)
            await generator.aclose()
            # The source was waiting in a task of the generator's, if it had been asked for more at all.
            assert ended.is_set() or not asyncio.all_tasks() - {asyncio.current_task()}

    asyncio.run(run())


def test_closed_under_a_generator(tiny, connect, latents):
    client = connect(tiny.target)
    generator = client.encode_many(itertools.repeat(latents(2, 4)))
    next(generator)
    client.close()
    with pytest.raises(Closed):
        list(generator)
