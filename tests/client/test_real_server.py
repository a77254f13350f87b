"""Both clients against the real server, and against the same codebook in process."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import torch

from vqserve_client import Client, CodebookNotFound, DigestMismatch, InvalidArgument, MessageTooLarge, Unavailable
from vqserve_client.cli import main
from vqserve_server.quantizers import VectorQuantizer, VectorQuantizerWithInputProjection
from vqserve_server.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return Tokenizer(VectorQuantizer(500, 8), name="plain", device="cpu")


@pytest.fixture(scope="module")
def projected():
    torch.manual_seed(1)
    quantizer = VectorQuantizerWithInputProjection(input_dim=6, n_codes=70, codebook_dim=4, output_dim=10, beta=1.0)
    return Tokenizer(quantizer, name="projected", device="cpu")


@pytest.mark.parametrize("shape", [(9, 8), (2, 5, 8), (2, 8, 5, 7), (1, 8, 2, 3, 4), (0, 8, 2, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_remote_is_local_for_numpy(serving, tokenizer, connect, latents, shape, dtype):
    client = connect(serving(tokenizer).target)
    array = latents(*shape, dtype=dtype)
    remote, local = client.encode(array), tokenizer.encode(array)
    assert remote.dtype == local.dtype == np.uint16
    np.testing.assert_array_equal(remote, local)
    for options in ({}, {"dtype": "float16"}, {"dtype": "float64"}, {"output": "code_rows"}):
        remote_latents, local_latents = client.decode(remote, **options), tokenizer.decode(local, **options)
        assert remote_latents.dtype == local_latents.dtype
        np.testing.assert_array_equal(remote_latents, local_latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_remote_is_local_for_torch(serving, tokenizer, connect, latents, dtype):
    client = connect(serving(tokenizer).target)
    tensor = torch.from_numpy(latents(2, 8, 5, 7)).to(dtype)
    indices = client.encode(tensor)
    assert torch.equal(indices, tokenizer.encode(tensor))
    assert torch.equal(client.decode(indices, dtype="bfloat16"), tokenizer.decode(indices, dtype="bfloat16"))


def test_widths_that_differ_and_several_codebooks(serving, tokenizer, projected, connect, latents):
    client = connect(serving(tokenizer, projected).target, codebook="projected", max_message_bytes=2048)
    assert client.codebooks() == [tokenizer.info, projected.info]
    array = latents(3, 6, 11, 13)
    indices = client.encode(array)
    np.testing.assert_array_equal(indices, projected.encode(array))
    assert indices.dtype == np.uint8
    np.testing.assert_array_equal(client.decode(indices), projected.decode(indices))
    rows = client.decode(indices, output="code_rows")
    np.testing.assert_array_equal(rows, projected.decode(indices, output="code_rows"))
    with pytest.raises(CodebookNotFound, match="plain, projected"):
        client.encode(array, codebook="nothing")


def test_chunks_are_the_whole(serving, tokenizer, connect, latents):
    target = serving(tokenizer).target
    array = latents(3, 8, 20, 20)
    whole, chunked = connect(target), connect(target, max_message_bytes=1024, window=8)
    np.testing.assert_array_equal(chunked.encode(array), whole.encode(array))
    indices = whole.encode(array)
    assert chunked.decode(indices).tobytes() == whole.decode(indices).tobytes()


def test_what_the_server_rejects(serving, tokenizer, connect, latents):
    client = connect(serving(tokenizer).target)
    array = latents(2, 8, 3, 3)
    array[1, 2, 0, 1] = np.nan
    with pytest.raises(InvalidArgument, match=r"latents\[1, 2, 0, 1\] is nan") as caught:
        client.encode(array)
    assert caught.value.request_id
    with pytest.raises(InvalidArgument, match=r"indices\[1\] is 500, not in \[0, 500\)"):
        client.decode(np.array([1, 500]))
    with pytest.raises(InvalidArgument, match=r"indices\[0\] is -1"):
        client.decode(torch.tensor([-1, 5]))
    with pytest.raises(DigestMismatch):
        client.encode(latents(2, 8), digest="0" * 64)


def test_a_client_that_allows_more_than_the_server(serving, tokenizer, connect, latents):
    target = serving(tokenizer, max_message_bytes=1 << 20).target
    with pytest.raises((MessageTooLarge, InvalidArgument)):
        connect(target).encode(latents(1 << 16, 8))


def test_an_overloaded_server_is_asked_again(serving, tokenizer, connect, latents):
    target = serving(tokenizer, max_queue_rows=64, max_batch_rows=16).target
    client = connect(target, max_message_bytes=2048, window=16, retries=50)
    array = latents(800, 8)
    np.testing.assert_array_equal(client.encode(array), tokenizer.encode(array))


def test_many_threads_and_generators(serving, tokenizer, connect, latents, request):
    if "async" in request.node.name:
        pytest.skip("an event loop has one thread")
    client = connect(serving(tokenizer).target)
    items = [latents(seed + 1, 8, seed=seed) for seed in range(12)]
    expected = [tokenizer.encode(item).tolist() for item in items]
    with ThreadPoolExecutor(16) as pool:
        runs = pool.map(lambda _: [answer.tolist() for answer in client.encode_many(items)], range(16))
        assert all(run == expected for run in runs)


CLIENTS = 32


class HeldServer:
    """A server of some tokenizers; its device waits in `together` until all the calls are queued."""

    def __init__(self, serving, tokenizers, monkeypatch):
        self._gate, self._entered = threading.Event(), threading.Event()
        self._submitted = threading.Semaphore(0)
        for tokenizer in tokenizers:
            for name in ("encode_rows", "decode_rows"):
                monkeypatch.setattr(tokenizer, name, partial(self._compute, getattr(tokenizer, name)))
            native = tokenizer.native_batch
            for name in ("encode", "decode") if native else ():
                monkeypatch.setattr(native, name, partial(self._compute, getattr(native, name)))
        # While it waits the device seems to be slow: that must not make batches small.
        self.server = serving(*tokenizers, max_batch_ms=0)
        scheduler = self.server.app.engine.scheduler
        monkeypatch.setattr(scheduler, "put", partial(self._put, scheduler.put))

    def together(self, first, calls):
        """Return the answers of calls that all wait while the device is at work on the first one."""
        self._gate.clear()
        self._entered.clear()
        with ThreadPoolExecutor(len(calls) + 1) as pool:
            try:
                ahead = pool.submit(first)
                assert self._entered.wait(60)
                answers = [pool.submit(call) for call in calls]
                assert all(self._submitted.acquire(timeout=60) for _ in (ahead, *answers))
            finally:
                self._gate.set()
            ahead.result()
            return [answer.result() for answer in answers]

    def _compute(self, plain, *args, **options):
        self._entered.set()
        self._gate.wait()
        return plain(*args, **options)

    def _put(self, plain, job, *_):
        # The thread that receives the calls must not wait: no job is one that it may compute.
        plain(job)
        self._submitted.release()


def mixed_latents(seed, channels):
    """Latents of any rank, layout and type, and the layout's name."""
    rng = np.random.default_rng(seed)
    layout = ["channels_first", "channels_last"][seed // 2 % 2]
    grid = rng.integers(1, 7, size=rng.integers(2, 5))
    axis = 1 if layout == "channels_first" else len(grid)
    array = rng.standard_normal((*grid[:axis], channels, *grid[axis:]))
    kinds = [np.float16, np.float32, np.float64, torch.bfloat16, torch.float32, torch.float64]
    kind = kinds[seed // 4 % len(kinds)]
    return (torch.from_numpy(array).to(kind) if isinstance(kind, torch.dtype) else array.astype(kind)), layout


def assert_same(remote, local):
    assert type(remote) is type(local)
    assert remote.dtype == local.dtype
    assert torch.equal(torch.as_tensor(remote), torch.as_tensor(local))


def test_32_clients_are_answered_in_shared_batches_as_if_alone(serving, tokenizer, projected, latents, monkeypatch):
    books = [(tokenizer, projected)[seed % 2] for seed in range(CLIENTS)]
    held = HeldServer(serving, (tokenizer, projected), monkeypatch)
    given = [mixed_latents(seed, book.info.input_dim) for seed, book in enumerate(books)]
    asked = [
        {
            "layout": [None, "channels_first", "channels_last"][seed % 3],
            "dtype": ["float32", "float16", "bfloat16", "float64"][seed // 2 % 4],
            "output": ["latents", "code_rows"][seed // 8 % 2],
        }
        for seed in range(CLIENTS)
    ]
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(held.server.target, codebook=book.name)) for book in books]
        first = partial(clients[0].encode, latents(1, 8))
        indices = held.together(
            first,
            [
                partial(client.encode, array, layout=layout)
                for client, (array, layout) in zip(clients, given, strict=True)
            ],
        )
        decoded = held.together(
            first,
            [
                partial(client.decode, array, **options)
                for client, array, options in zip(clients, indices, asked, strict=True)
            ],
        )
    for book, (array, layout), got, options, out in zip(books, given, indices, asked, decoded, strict=True):
        assert_same(got, book.encode(array, layout=layout))
        assert_same(out, book.decode(got, **options))
    # The counters are complete once the device thread has ended.
    assert held.server.stop()
    stats = held.server.app.engine.stats
    assert stats.requests == 2 * (CLIENTS + 1)
    # A batch for each of the two codebooks and two row types, or two outputs and four reply types, and one for each
    # first call.
    assert stats.batches == (2 * 2 + 1) + (2 * 2 * 4 + 1)
    assert stats.largest_batch_requests >= CLIENTS / 4


def test_many(serving, tokenizer, connect, latents):
    client = connect(serving(tokenizer).target)
    items = [latents(seed + 1, 8, seed=seed) for seed in range(20)]
    for item, indices in zip(items, client.encode_many(items), strict=True):
        np.testing.assert_array_equal(indices, tokenizer.encode(item))


def test_a_server_that_stopped(serving, tokenizer, connect, latents):
    server = serving(tokenizer)
    client = connect(server.target, retries=1)
    client.encode(latents(2, 8))
    server.stop()
    with pytest.raises(Unavailable):
        client.encode(latents(2, 8))


def test_the_command_line_and_the_daemon(vqserved, tmp_path, latents, monkeypatch, capsys):
    daemon = vqserved("--device", "cpu")
    monkeypatch.setenv("VQSERVE_TARGET", daemon.target)
    assert main(["status", "--wait", "60"]) == 0
    assert main(["codebooks"]) == 0
    assert "demo" in capsys.readouterr().out
    demo = Tokenizer.load(os.fspath(_demo()), device="cpu")
    array = latents(2, demo.info.input_dim, 8, 8)
    np.save(tmp_path / "latents.npy", array)
    assert main(["encode", str(tmp_path / "latents.npy"), "-o", str(tmp_path / "indices.npy")]) == 0
    assert main(["decode", str(tmp_path / "indices.npy"), "-o", str(tmp_path / "out.npy")]) == 0
    indices = np.load(tmp_path / "indices.npy")
    np.testing.assert_array_equal(indices, demo.encode(array))
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), demo.decode(indices))
    assert daemon.stop(signal.SIGTERM)[0] == 0
    assert main(["status"]) == 1


def _demo():
    from importlib.resources import files  # noqa: PLC0415

    return files("vqserve_server") / "assets" / "demo.safetensors"
