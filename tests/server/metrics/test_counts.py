"""What is counted, and as what: a server in this process, and a caller of each kind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from support.certificates import free_port
from support.scraping import Scrape
from support.waiting import eventually
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1 import tokenizer_pb2_grpc
from vqserve_server.access import Access
from vqserve_server.config import resolve
from vqserve_server.metrics.memory import private_part
from vqserve_server.metrics.port import MetricsPort
from vqserve_server.metrics.present import Processes
from vqserve_server.metrics.recorder import Metrics
from vqserve_server.metrics.store import NBYTES
from vqserve_server.monitoring.instruments import Instruments

ROWS = 3
REQUEST = pb.EncodeRequest(codebook="book", dtype=pb.DTYPE_FLOAT32, shape=[ROWS, 4], latents=bytes(16 * ROWS))


@pytest.fixture
def tokenizer(fake: Callable[..., Any]) -> Any:
    return fake(name="book")


class Served:
    """A server, and the metrics of it."""

    def __init__(self, server: Any, metrics_port: int) -> None:
        self.server = server
        self._port = metrics_port
        self.channel = grpc.insecure_channel(server.target)
        self.stub = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)

    def scrape(self) -> Scrape:
        return Scrape(self._port)

    def has(self, count: float, name: str, **labels: str) -> bool:
        return self.scrape()(name, **labels) == count

    def close(self) -> None:
        self.channel.close()


@pytest.fixture
def serve(
    tokenizer: Any, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Served]]:
    """Start a server with one codebook, "book": serve(max_queue_requests=1) -> Served."""
    made: list[Any] = []

    def start(**settings: object) -> Served:
        memory, port = private_part(NBYTES), free_port()
        config = resolve({"metrics_port": str(port)}, {})
        shown = MetricsPort(config, Access(config.access), Processes(), [memory])
        shown.__enter__()
        made.append(shown.__exit__)
        served = Served(serving(tokenizer, instruments=Instruments(Metrics(memory)), **settings), port)
        made.append(served.close)
        return served

    yield start
    for close in reversed(made):
        close()


def code(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


def test_a_request_is_counted_before_its_reply_arrives(serve: Callable[..., Served]) -> None:
    served = serve()
    # As it is on the wire: some of its numbers are written longer than they must be.
    reply = served.channel.unary_unary("/vqserve.v1.TokenizerService/Encode")(REQUEST.SerializeToString())
    found = served.scrape()
    encode = {"codebook": "book", "operation": "encode"}
    assert found("requests_total", **encode, status="OK") == 1
    assert found("requests_total") == 1
    assert found("tokens_total", **encode) == found("rows_total", **encode) == ROWS
    assert found("request_bytes_total", **encode) == REQUEST.ByteSize()
    assert found("reply_bytes_total", **encode) == len(reply)
    for name in ("request_seconds", "queue_seconds", "compute_seconds", "batch_rows", "batch_requests"):
        assert found(f"{name}_count", **encode) == found(f"{name}_bucket", **encode, le="+Inf") == 1
    assert found("batch_rows_sum") == ROWS
    assert found("batch_rows_bucket", le="1.0") == 0
    assert found("batch_rows_bucket", le="4.0") == 1
    assert found("batch_requests_bucket", le="1.0") == 1
    assert found("request_seconds_sum") >= found("queue_seconds_sum") + found("compute_seconds_sum")
    indices = pb.DecodeRequest(dtype=pb.DTYPE_UINT8, shape=[2], indices=bytes(2))
    for count in (1, 2):
        served.stub.Decode(indices)
        assert served.scrape()("requests_total", codebook="book", operation="decode") == count


def test_every_codebook_has_counters_from_the_start(serve: Callable[..., Served], tokenizer: Any) -> None:
    found = serve().scrape()
    for operation in ("encode", "decode"):
        assert f'vqserve_requests_total{{codebook="book",operation="{operation}",status="OK"}} 0.0\n' in found.text
    assert found("codebook_info", codebook="book", digest=tokenizer.info.digest, kind="vq", num_codes="16") == 1


def test_a_request_without_tokens_is_counted_and_no_batch(serve: Callable[..., Served]) -> None:
    served = serve()
    served.stub.Encode(pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=[0, 4]))
    found = served.scrape()
    assert found("requests_total", status="OK", codebook="book") == found("request_seconds_count") == 1
    assert found("tokens_total") == found("batch_rows_count") == 0


@pytest.mark.parametrize(
    ("fields", "status", "codebook"),
    [
        ({"codebook": "somebody's secret"}, "NOT_FOUND", ""),
        ({"expected_digest": "0" * 64}, "FAILED_PRECONDITION", "book"),
        ({"shape": [7, 7]}, "INVALID_ARGUMENT", "book"),
        ({"latents": np.full(4 * ROWS, np.nan, np.float32).tobytes()}, "INVALID_ARGUMENT", "book"),
        ({"latents": b""}, "INVALID_ARGUMENT", "book"),
    ],
)
def test_an_invalid_request_has_the_codebook_if_that_is_known(
    serve: Callable[..., Served], fields: dict[str, Any], status: str, codebook: str
) -> None:
    served = serve()
    request = pb.EncodeRequest()
    request.MergeFrom(REQUEST)
    for name, value in fields.items():
        request.ClearField(name)
        request.MergeFrom(pb.EncodeRequest(**{name: value}))
    assert code(lambda: served.stub.Encode(request)).name == status
    assert code(lambda: list(served.stub.EncodeStream(iter([request])))).name == status
    found = served.scrape()
    assert found("requests_total", codebook=codebook, operation="encode", status=status) == 2
    assert found("requests_total") == 2
    # What strangers send is never a label.
    assert found.labels("requests_total", "codebook") == {codebook, "book"}
    assert found("request_bytes_total") == 2 * request.ByteSize()


def test_each_message_of_a_stream_is_a_request(serve: Callable[..., Served]) -> None:
    served = serve()
    assert len(list(served.stub.EncodeStream(iter([REQUEST] * 5)))) == 5
    assert served.scrape()("requests_total", status="OK") == 5
    bad = pb.EncodeRequest(codebook="none")
    assert code(lambda: list(served.stub.EncodeStream(iter([REQUEST, REQUEST, bad, REQUEST])))).name == "NOT_FOUND"
    found = served.scrape()
    assert found("requests_total", status="NOT_FOUND") == 1
    assert found("requests_total", status="OK") == 7


def test_other_calls_are_no_requests(serve: Callable[..., Served]) -> None:
    served = serve()
    served.stub.ListCodebooks(pb.ListCodebooksRequest())
    assert served.scrape()("requests_total") == 0


def test_a_caller_that_leaves_has_cancelled(serve: Callable[..., Served], tokenizer: Any) -> None:
    served = serve()
    tokenizer.hold()
    calls = [served.stub.Encode.future(REQUEST) for _ in range(2)]
    stream = served.stub.EncodeStream(iter([REQUEST] * 3))
    tokenizer.wait_entered()
    eventually(lambda: served.server.app.engine.admission.requests == 5)
    assert served.scrape()("requests_total") == 0
    eventually(lambda: served.has(5, "queue_requests", worker="0") and served.has(5 * ROWS, "queue_rows"))
    eventually(lambda: served.has(3, "open_calls", worker="0"))
    for call in (*calls, stream):
        call.cancel()
    eventually(lambda: served.has(5, "requests_total", status="CANCELLED"))
    tokenizer.release()
    eventually(lambda: served.has(0, "queue_requests"))
    assert served.scrape()("requests_total") == 5


def test_a_deadline_that_passes_is_counted_where_it_does(serve: Callable[..., Served], tokenizer: Any) -> None:
    served = serve(max_queue_ms=0)
    tokenizer.hold()
    blocked = served.stub.Encode.future(REQUEST)
    tokenizer.wait_entered()
    late = served.stub.Encode.future(REQUEST, timeout=0.2)
    assert code(late.result).name == "DEADLINE_EXCEEDED"
    eventually(lambda: served.has(1, "requests_total", status="DEADLINE_EXCEEDED"))
    tokenizer.release()
    blocked.result()
    found = served.scrape()
    assert found("requests_total", status="OK") == 1
    assert found("requests_total") == 2


def test_refusals_are_counted_by_reason(serve: Callable[..., Served], tokenizer: Any) -> None:
    served = serve(max_queue_requests=1, max_concurrent_rpcs=2)
    tokenizer.hold()
    inside = served.stub.Encode.future(REQUEST)
    tokenizer.wait_entered()
    assert code(lambda: served.stub.Encode(REQUEST)).name == "RESOURCE_EXHAUSTED"
    eventually(lambda: served.server.app._rpc.open_calls == 1)
    waiting = served.stub.EncodeStream(iter(threading.Event().wait, True))
    eventually(lambda: served.server.app._rpc.open_calls == 2)
    assert code(lambda: served.stub.Decode(pb.DecodeRequest())).name == "RESOURCE_EXHAUSTED"
    found = served.scrape()
    assert found("refused_total", reason="requests") == 1
    assert found("refused_total", reason="calls") == 1
    assert found("refused_total") == 2
    assert found("requests_total", codebook="book", operation="encode", status="RESOURCE_EXHAUSTED") == 1
    assert found("requests_total", codebook="", operation="decode", status="RESOURCE_EXHAUSTED") == 1
    assert found("queue_requests_limit", worker="0") == 1024
    waiting.cancel()
    tokenizer.release()
    inside.result()


def test_a_failed_computation_is_counted(serve: Callable[..., Served], tokenizer: Any) -> None:
    served = serve()
    # The alert asks for an increase: the series is there before the first failure.
    assert 'vqserve_requests_total{codebook="book",operation="encode",status="INTERNAL"} 0.0' in served.scrape().text
    tokenizer.error = ValueError("no")
    assert code(lambda: served.stub.Encode(REQUEST)).name == "INTERNAL"
    found = served.scrape()
    assert found("requests_total", codebook="book", status="INTERNAL") == 1
    assert found("rows_total") == 0


def test_a_full_and_a_stopping_server_shows_its_metrics(serve: Callable[..., Served], tokenizer: Any) -> None:
    served = serve(max_queue_requests=4)
    tokenizer.hold()
    calls = [served.stub.Encode.future(REQUEST) for _ in range(8)]
    eventually(lambda: served.has(1, "serving") and served.scrape()("refused_total") >= 4)
    stopped = threading.Thread(target=served.server.stop)
    stopped.start()
    eventually(lambda: served.has(0, "serving", worker="0"))
    tokenizer.release()
    stopped.join()
    answered = sum(call.exception() is None for call in calls)
    assert served.has(answered, "requests_total", status="OK")


def test_a_codebook_that_is_replaced_is_shown_once(serve: Callable[..., Served], fake: Callable[..., Any]) -> None:
    served = serve()
    served.stub.Encode(REQUEST)
    other = fake(num_codes=20, name="book")
    served.server.loop.call_soon_threadsafe(served.server.app.swap, [other, fake(name="more@2")])
    eventually(lambda: served.scrape().labels("codebook_info", "codebook") == {"book", "more@2"})
    served.stub.Encode(REQUEST)
    found = served.scrape()
    assert found.labels("codebook_info", "digest") == {f"{20:064x}", f"{16:064x}"}
    assert found("codebook_info", codebook="book", num_codes="20") == found("codebook_info", codebook="book") == 1
    assert found("requests_total", codebook="book", status="OK") == 2
    served.stub.Encode(pb.EncodeRequest(codebook="more", dtype=pb.DTYPE_FLOAT32, shape=[1, 4], latents=bytes(16)))
    assert served.scrape()("requests_total", codebook="more@2", status="OK") == 1
