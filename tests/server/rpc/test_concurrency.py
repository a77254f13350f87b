"""Concurrent callers get the same results as alone; rejected, late or disconnected callers do not affect the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from support.waiting import eventually
from vqserve.dtypes import BFLOAT16
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_server.quantizers import GumbelQuantizer, VectorQuantizer
from vqserve_server.tokenizer import Tokenizer

CALLERS = 32
CALLS = 6
LAYOUTS = {"channels_first": pb.LAYOUT_CHANNELS_FIRST, "channels_last": pb.LAYOUT_CHANNELS_LAST}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    torch.manual_seed(0)
    return {
        "vq": Tokenizer(VectorQuantizer(300, 8), name="vq", device="cpu"),
        "gumbel": Tokenizer(GumbelQuantizer(6, 10, 70), name="gumbel", device="cpu"),
    }


@pytest.fixture
def held(fake: Callable[..., Any], serving: Callable[..., Any], connect: Callable[..., Any]) -> Iterator[Any]:
    """A server whose device is at work on a request until `tokenizer.release`; `first` is that request's call."""

    tokenizer = fake()

    class Held:
        def __init__(self, **settings: object) -> None:
            self.tokenizer = tokenizer
            self.server = serving(self.tokenizer, **settings)
            self.client = connect(self.server.target)
            self.tokenizer.hold()
            self.first = self.send(1)
            self.tokenizer.wait_entered()

        def send(self, rows: int, *, value: float = 0.0, timeout: float | None = None) -> Any:
            latents = np.full((rows, 4), value, np.float32)
            return self.client.stub.Encode.future(self.client.encode_request(latents), timeout=timeout)

        def after(self, method: str) -> threading.Event:
            """An event that is set when the method of the engine or its scheduler has returned for the next time."""
            engine, done = self.server.app.engine, threading.Event()
            owner = engine if hasattr(engine, method) else engine.scheduler
            plain = getattr(owner, method)

            def wrapped(*args: Any) -> Any:
                result = plain(*args)
                done.set()
                return result

            setattr(owner, method, wrapped)
            return done

        def only_first_is_inside(self) -> None:
            """Wait until the server has let go of all the others: a caller sees the end of a call before it does."""
            eventually(lambda: self.server.app.engine.admission.requests == 1)

        def none_is_inside(self) -> None:
            eventually(lambda: self.server.app.engine.admission.requests == 0)

        def computed(self) -> set[float]:
            return {float(value) for batch in self.tokenizer.batches for value in batch[:, 0]}

    yield Held
    tokenizer.release()


def one_call(client: Any, tokenizer: Tokenizer, rng: np.random.Generator) -> None:
    """Encode and decode something random."""
    layout = str(rng.choice(list(LAYOUTS)))
    grid = [int(n) for n in rng.integers(1, 7, size=int(rng.integers(2, 5)))]
    axis = 1 if layout == "channels_first" else len(grid)
    latents = rng.standard_normal([*grid[:axis], tokenizer.info.input_dim, *grid[axis:]])
    dtype = int(rng.choice([pb.DTYPE_FLOAT16, pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT64, pb.DTYPE_BFLOAT16]))
    if dtype == pb.DTYPE_BFLOAT16:
        sent = BFLOAT16.narrow(latents.astype(np.float32))
        meant = BFLOAT16.widen(sent)
    else:
        sent = meant = latents.astype({pb.DTYPE_FLOAT16: "f2", pb.DTYPE_FLOAT32: "f4", pb.DTYPE_FLOAT64: "f8"}[dtype])
    name = tokenizer.info.name
    reply = client.stub.Encode(client.encode_request(sent, dtype, codebook=name, layout=LAYOUTS[layout]))
    indices = np.frombuffer(reply.indices, np.uint8 if name == "gumbel" else "<u2").reshape(tuple(reply.shape))
    np.testing.assert_array_equal(indices, tokenizer.encode(meant, layout=layout))
    decoded = client.decode(indices, codebook=name, layout=LAYOUTS[layout])
    np.testing.assert_array_equal(decoded, tokenizer.decode(indices, layout=layout))


def test_mixed_callers_get_the_same_results_as_alone(
    tokenizers: dict[str, Tokenizer], serving: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    server = serving(*tokenizers.values(), max_batch_rows=500)

    def caller(seed: int) -> None:
        rng = np.random.default_rng(seed)
        client = connect(server.target)
        for _ in range(CALLS):
            one_call(client, tokenizers[str(rng.choice(["vq", "gumbel"]))], rng)

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(caller, range(CALLERS)))
    # Whether they met in batches is a matter of timing here; tests/client/test_real_server.py holds the device.
    assert server.app.engine.stats.requests == 2 * CALLERS * CALLS


def test_a_bad_request_never_fails_its_mates(held: Any) -> None:
    server = held()
    good = [server.send(2, value=n) for n in range(4)]
    bad = server.send(2, value=float("nan"))
    assert bad.exception().code() is grpc.StatusCode.INVALID_ARGUMENT
    server.tokenizer.release()
    assert [tuple(call.result().shape) for call in (server.first, *good)] == [(1,)] + [(2,)] * 4


def test_an_expired_request_is_dropped_before_it_is_computed(held: Any) -> None:
    server = held()
    late = server.send(2, value=7.0, timeout=0.05)
    assert late.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
    server.only_first_is_inside()
    server.tokenizer.release()
    server.first.result()
    server.send(1, value=3.0).result()
    assert server.computed() == {0.0, 3.0}


def test_a_cancelled_request_is_dropped_before_it_is_computed(held: Any) -> None:
    server = held()
    submitted, forgotten = server.after("put"), server.after("cancel")
    gone = server.send(2, value=7.0)
    submitted.wait()
    gone.cancel()
    forgotten.wait()
    server.tokenizer.release()
    server.first.result()
    server.send(1, value=3.0).result()
    assert server.computed() == {0.0, 3.0}


def test_overload_is_rejected_at_once_with_a_hint(held: Any) -> None:
    # A caller alone may have seven eighths.
    server = held(max_queue_requests=8)
    others = []
    for _ in range(6):
        submitted = server.after("put")
        others.append(server.send(1))
        submitted.wait()
    error = server.send(1).exception()
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    text = "too many requests of the caller 127.0.0.1 in the server: try again later, or with fewer requests at once"
    assert error.details() == text
    metadata = dict(error.trailing_metadata())
    assert 50 <= int(metadata["grpc-retry-pushback-ms"]) <= 10_000
    # Of clients from before the standard key.
    assert metadata["vqserve-retry-after-ms"] == metadata["grpc-retry-pushback-ms"]
    server.tokenizer.release()
    server.first.result()
    for call in others:
        call.result()
    server.none_is_inside()
    server.send(1).result()


def test_bytes_are_bounded_too(held: Any) -> None:
    # A caller alone may have three quarters.
    server = held(max_message_bytes=4096, max_queue_bytes=32768)
    large = []
    for _ in range(7):  # 200 rows of 16 bytes and an index each: 3400 bytes
        submitted = server.after("put")
        large.append(server.send(200))
        submitted.wait()
    error = server.send(200).exception()
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    text = "too many bytes of the caller 127.0.0.1 in the server: try again later, or with fewer requests at once"
    assert error.details() == text
    server.tokenizer.release()
    assert [len(call.result().indices) for call in large] == [200] * 7


def test_an_internal_error_has_a_fixed_text(held: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = held()
    server.tokenizer.error = ValueError("/secret/path")
    server.tokenizer.release()
    error = server.first.exception()
    assert error.code() is grpc.StatusCode.INTERNAL
    request_id = dict(error.trailing_metadata())["vqserve-request-id"]
    assert error.details() == f"internal error; the server's log has it under request {request_id}"
    assert "/secret/path" in caplog.text
    assert request_id in caplog.text
    server.send(1).result()


def test_a_lost_device_is_unavailable_and_not_serving(held: Any) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    server = held()
    watch = health_pb2_grpc.HealthStub(server.client.channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    waiting = [server.send(1) for _ in range(3)]
    server.tokenizer.error = torch.AcceleratorError("an illegal memory access was encountered")
    server.tokenizer.release()
    for call in (server.first, *waiting):
        assert call.exception().code() is grpc.StatusCode.UNAVAILABLE
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert server.send(1).exception().code() is grpc.StatusCode.UNAVAILABLE
    watch.cancel()


def test_stopping_answers_accepted_requests_and_rejects_others(held: Any) -> None:
    server = held()
    submitted = server.after("put")
    inside = server.send(3)
    submitted.wait()
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(server.server.stop)
        eventually(lambda: server.server.app._rpc._transport._is_closed)
        # CANCELLED if the client did not know yet.
        assert server.send(1).exception().code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        server.tokenizer.release()
        assert tuple(server.first.result().shape) == (1,)
        assert tuple(inside.result().shape) == (3,)
        assert stopping.result()
    assert server.send(1).exception().code() is grpc.StatusCode.UNAVAILABLE


def test_stopping_gives_up_after_drain_seconds(held: Any) -> None:
    server = held(drain_seconds=0.1)
    assert not server.server.stop()
    assert server.first.exception().code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
