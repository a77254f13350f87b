"""Tokens on a real port: who may call, for which codebooks, how much, and what becomes of a token that is revoked."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from support.certificates import Authority, Folder, connect, free_port, replace
from support.waiting import eventually
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from vqserve_server.access.token_file import hash_of, new_secret

TEXT = "the server needs a valid access token: call with a valid token="
S = grpc.StatusCode


def request(codebook: str = "", rows: int = 3, **fields: Any) -> pb.EncodeRequest:
    latents = np.zeros((rows, 4), np.float32)
    return pb.EncodeRequest(
        dtype=pb.DTYPE_FLOAT32, shape=latents.shape, latents=latents.tobytes(), codebook=codebook, **fields
    )


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


def status(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


class Names:
    """A file of tokens, and the secrets in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.secrets: dict[str, str] = {}

    def put(self, **tokens: str) -> None:
        """Replace the file by one with these tokens: what each may do, as TOML. A name keeps its secret."""
        text = ""
        for name, lines in tokens.items():
            secret = self.secrets.setdefault(name, new_secret())
            text += f'[tokens.{name}]\nsha256 = "{hash_of(secret)}"\n{lines}\n'
        replace(self.path, text.encode())


@pytest.fixture
def names(tmp_path: Path) -> Names:
    made = Names(tmp_path / "tokens.toml")
    made.put(all="", faces='codebooks = ["faces"]', both='codebooks = ["faces", "audi?"]')
    return made


@pytest.fixture
def server(serving: Callable[..., Any], fake: Callable[..., Any], names: Names) -> Any:
    return serving(fake(name="faces"), fake(8, 4, name="audio"), tokens=names.path)


@pytest.fixture
def stub(server: Any) -> Iterator[TokenizerServiceStub]:
    with grpc.insecure_channel(server.target) as channel:
        yield TokenizerServiceStub(channel)


def encode(stub: TokenizerServiceStub, message: Message, secret: str) -> list[int]:
    return list(stub.Encode(message, metadata=bearer(secret), timeout=30).shape)


def test_a_valid_token_is_let_in_and_nothing_else(stub: TokenizerServiceStub, names: Names) -> None:
    assert encode(stub, request("faces"), names.secrets["all"]) == [3]
    for metadata in (
        (),
        bearer(new_secret()),
        bearer(""),
        (("authorization", names.secrets["all"]),),
        bearer(names.secrets["all"]) * 2,
    ):
        for call in (
            lambda: stub.Encode(request("faces"), metadata=metadata, timeout=30),  # noqa: B023
            lambda: list(stub.EncodeStream(iter([request("faces")]), metadata=metadata, timeout=30)),  # noqa: B023
            lambda: stub.ListCodebooks(pb.ListCodebooksRequest(), metadata=metadata, timeout=30),  # noqa: B023
        ):
            code, details = status(call)
            assert code is S.UNAUTHENTICATED
            assert details.startswith(TEXT)


def test_nothing_is_received_from_strangers(server: Any, fake: Callable[..., Any]) -> None:
    # A stream that sends for ever is answered before its first message: nobody reads them.
    with grpc.insecure_channel(server.target) as channel:
        requests: queue.Queue[Any] = queue.Queue()
        call = TokenizerServiceStub(channel).EncodeStream(iter(requests.get, None))
        assert status(lambda: next(call))[0] is S.UNAUTHENTICATED
        requests.put(None)
        # What methods there are is nobody's business either.
        assert status(lambda: channel.unary_unary("/no.Such/Method")(b"", timeout=30))[0] is S.UNAUTHENTICATED


def test_health_needs_no_token_and_reflection_does(server: Any, names: Names) -> None:
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for metadata in ((), bearer("wrong"), bearer(names.secrets["all"])):
            answer = health.Check(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        code, _ = status(lambda: list(reflection.ServerReflectionInfo(iter([question]), timeout=30)))
        assert code is S.UNAUTHENTICATED
        metadata = bearer(names.secrets["faces"])
        [answer] = reflection.ServerReflectionInfo(iter([question]), metadata=metadata, timeout=30)
        assert answer.list_services_response.service


def test_a_token_sees_its_codebooks_only(stub: TokenizerServiceStub, names: Names) -> None:
    def listed(name: str) -> list[str]:
        metadata = bearer(names.secrets[name])
        reply = stub.ListCodebooks(pb.ListCodebooksRequest(), metadata=metadata, timeout=30)
        return [one.name for one in reply.codebooks]

    assert listed("all") == listed("both") == ["audio", "faces"]
    assert listed("faces") == ["faces"]


@pytest.mark.parametrize("warm", [False, True])
def test_a_codebook_that_the_token_may_not_use(stub: TokenizerServiceStub, names: Names, warm: bool) -> None:
    if warm:
        # The headers of others are known: they are no way in.
        assert encode(stub, request("audio"), names.secrets["all"]) == [3]
        assert encode(stub, request("audio"), names.secrets["both"]) == [3]
    code, details = status(lambda: encode(stub, request("audio"), names.secrets["faces"]))
    assert code is S.PERMISSION_DENIED
    assert details.startswith("the access token may not use codebook 'audio'")
    # Nothing tells whether there is such a codebook, or what it is.
    for wrong in (request("nosuch"), request("audio", expected_digest="0" * 64), request("audio", rows=0)):
        code, details = status(lambda: encode(stub, wrong, names.secrets["faces"]))  # noqa: B023
        assert code is S.PERMISSION_DENIED
        assert details.replace("nosuch", "audio").startswith("the access token may not use codebook 'audio'")
        assert "faces" not in details
    assert encode(stub, request("faces"), names.secrets["faces"]) == [3]


def test_a_name_that_is_allowed_and_not_served(stub: TokenizerServiceStub, names: Names) -> None:
    code, details = status(lambda: encode(stub, request("audix"), names.secrets["both"]))
    assert (code, details) == (S.NOT_FOUND, "no codebook 'audix' is served, only: audio, faces")


def test_without_a_name_the_only_codebook_of_the_token_is_meant(stub: TokenizerServiceStub, names: Names) -> None:
    for _ in range(2):
        assert encode(stub, request(), names.secrets["faces"]) == [3]
        code, details = status(lambda: encode(stub, request(), names.secrets["all"]))
        assert (code, details) == (
            S.NOT_FOUND,
            "2 codebooks are served, choose one with codebook=: audio, faces",
        )


def test_the_header_of_an_only_codebook_is_not_another_token_s(
    serving: Callable[..., Any], fake: Callable[..., Any], names: Names
) -> None:
    names.put(all="", audio='codebooks = ["audio"]')
    with grpc.insecure_channel(serving(fake(name="faces"), tokens=names.path).target) as channel:
        stub = TokenizerServiceStub(channel)
        for _ in range(2):
            assert encode(stub, request(), names.secrets["all"]) == [3]
            code, details = status(lambda: encode(stub, request(), names.secrets["audio"]))
            assert (code, details) == (S.NOT_FOUND, "no codebook is served")


def test_versions(serving: Callable[..., Any], fake: Callable[..., Any], names: Names) -> None:
    names.put(one='codebooks = ["book@1"]', every='codebooks = ["book"]')
    books = [fake(8, 4, name="book@1"), fake(9, 4, name="book@2")]
    with grpc.insecure_channel(serving(*books, tokens=names.path).target) as channel:
        stub = TokenizerServiceStub(channel)
        assert encode(stub, request("book@1"), names.secrets["one"]) == [3]
        for name in ("book@2", "book"):
            assert status(lambda: encode(stub, request(name), names.secrets["one"]))[0] is S.PERMISSION_DENIED  # noqa: B023
        assert encode(stub, request(), names.secrets["one"]) == [3]
        for name in ("book", "book@1", "book@2", ""):
            assert encode(stub, request(name), names.secrets["every"]) == [3]


class Stream:
    """An open EncodeStream, one message after the other."""

    def __init__(self, stub: TokenizerServiceStub, secret: str) -> None:
        self._requests: queue.Queue[Any] = queue.Queue()
        self._call = stub.EncodeStream(iter(self._requests.get, None), metadata=bearer(secret))

    def ask(self, message: Message) -> list[int]:
        self._requests.put(message)
        return list(next(self._call).shape)

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()


@pytest.fixture
def stream(stub: TokenizerServiceStub) -> Iterator[Callable[[str], Stream]]:
    opened: list[Stream] = []

    def make(secret: str) -> Stream:
        opened.append(Stream(stub, secret))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def test_each_message_of_a_stream_is_checked(stream: Callable[[str], Stream], names: Names) -> None:
    one = stream(names.secrets["faces"])
    assert one.ask(request("faces")) == [3]
    assert one.ask(request("faces")) == [3]
    assert status(lambda: one.ask(request("audio")))[0] is S.PERMISSION_DENIED


def test_a_stream_of_a_token_that_is_revoked_ends(
    server: Any, stub: TokenizerServiceStub, stream: Callable[[str], Stream], names: Names
) -> None:
    one, other = stream(names.secrets["faces"]), stream(names.secrets["all"])
    assert one.ask(request("faces")) == other.ask(request("faces")) == [3]
    names.put(all="")
    server.app.refresh_access()
    assert status(lambda: one.ask(request("faces")))[0] is S.UNAUTHENTICATED
    assert status(lambda: encode(stub, request("faces"), names.secrets["faces"]))[0] is S.UNAUTHENTICATED
    assert other.ask(request("faces")) == [3]


def test_a_stream_notices_by_itself_that_the_file_has_changed(stream: Callable[[str], Stream], names: Names) -> None:
    one = stream(names.secrets["faces"])
    assert one.ask(request("faces")) == [3]
    names.put(all="", faces='codebooks = ["audio"]')

    def is_denied() -> bool:
        try:
            one.ask(request("faces"))
        except grpc.RpcError as error:
            return error.code() is S.PERMISSION_DENIED
        return False

    eventually(is_denied)


def test_the_rate_of_a_token(stub: TokenizerServiceStub, server: Any, names: Names) -> None:
    names.put(slow="rows_per_second = 0.001", fast="")
    server.app.refresh_access()
    # The first may be of any size.
    assert encode(stub, request("faces", 1000), names.secrets["slow"]) == [1000]
    with pytest.raises(grpc.RpcError) as caught:
        encode(stub, request("faces", 1), names.secrets["slow"])
    assert caught.value.code() is S.RESOURCE_EXHAUSTED
    assert caught.value.details().startswith("the access token may send 0.001 rows per second")
    metadata = dict(caught.value.trailing_metadata() or ())
    assert 990_000_000 < int(metadata["grpc-retry-pushback-ms"]) < 1_002_000_000
    for _ in range(5):
        assert encode(stub, request("faces", 1000), names.secrets["fast"]) == [1000]


def test_what_the_server_refuses_costs_a_token_no_rows(
    serving: Callable[..., Any], fake: Callable[..., Any], names: Names
) -> None:
    names.put(slow="rows_per_second = 100000", other="")
    book = fake(name="faces")
    server = serving(book, tokens=names.path, max_queue_requests=1)
    with grpc.insecure_channel(server.target) as channel:
        stub = TokenizerServiceStub(channel)
        book.hold()
        held = stub.Encode.future(request("faces"), metadata=bearer(names.secrets["other"]), timeout=60)
        book.wait_entered()
        for _ in range(3):
            code, details = status(lambda: encode(stub, request("faces", 100_000), names.secrets["slow"]))
            assert (code, details.partition(":")[0]) == (S.RESOURCE_EXHAUSTED, "too many requests in the server")
        book.release()
        assert list(held.result().shape) == [3]
        eventually(lambda: server.app.engine.admission.requests == 0)
        assert encode(stub, request("faces", 100_000), names.secrets["slow"]) == [100_000]


def test_a_caller_is_its_token(server: Any, stream: Callable[[str], Stream], names: Names) -> None:
    callers = server.app._rpc._transport._callers
    opened = [stream(names.secrets[name]) for name in ("all", "all", "faces")]
    for one in opened:
        one.ask(request("faces"))
    assert sorted(caller.name for caller in callers._callers.values()) == ["all", "faces"]
    for one in opened:
        one.close()
    eventually(lambda: not callers._callers)


def test_no_secret_is_logged(
    server: Any, stub: TokenizerServiceStub, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    wrong = new_secret()
    for secret in (names.secrets["faces"], wrong):
        _, details = status(lambda: encode(stub, request("audio"), secret))  # noqa: B023
        assert secret not in details
    assert "request_rejected" in caplog.text
    assert "caller_refused" in caplog.text
    for secret in (names.secrets["faces"], wrong):
        assert secret not in caplog.text
        assert hash_of(secret) not in caplog.text


def test_tokens_change_under_load_and_no_call_fails(
    server: Any, stub: TokenizerServiceStub, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    names.put(steady="", old="")
    server.app.refresh_access()
    done = threading.Event()

    def calls(name: str) -> int:
        count = 0
        while not done.is_set():
            assert encode(stub, request("faces"), names.secrets[name]) == [3]
            count += 1
        return count

    def messages() -> int:
        one, count = Stream(stub, names.secrets["steady"]), 0
        while not done.is_set():
            assert one.ask(request("faces")) == [3]
            count += 1
        one.close()
        return count

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(calls, "steady"), pool.submit(calls, "steady"), pool.submit(messages)]
        try:
            for number in range(10):
                # A caller goes from one token to the next: both are valid for a while.
                old, new = f"t{number}", f"t{number + 1}"
                names.put(steady="rows_per_second = 1e12", **{old: "", new: ""})
                server.app.refresh_access()
                for name in (old, new):
                    assert encode(stub, request("faces"), names.secrets[name]) == [3]
                names.put(steady="", **{new: ""})
                server.app.refresh_access()
                assert status(lambda: encode(stub, request("faces"), names.secrets[old]))[0] is S.UNAUTHENTICATED  # noqa: B023
                # What is broken changes nothing.
                replace(names.path, b"[tok")
                server.app.refresh_access()
                assert encode(stub, request("faces"), names.secrets[new]) == [3]
        finally:
            done.set()
        assert all(call.result() for call in running)
    assert "access_rejected what=tokens" in caplog.text


def test_tokens_within_tls(serving: Callable[..., Any], fake: Callable[..., Any], names: Names, tmp_path: Path) -> None:
    authority, folder = Authority(), Folder(tmp_path)
    folder.put(authority.issue())
    target = serving(fake(name="faces"), tokens=names.path, **folder.settings()).target
    with connect(target, authority.pem, token=names.secrets["faces"]) as channel:
        assert list(TokenizerServiceStub(channel).Encode(request("faces"), timeout=30).shape) == [3]
    with connect(target, authority.pem, token="wrong") as channel:  # noqa: S106
        code, _ = status(lambda: TokenizerServiceStub(channel).Encode(request("faces"), timeout=30))
        assert code is S.UNAUTHENTICATED


@pytest.mark.parametrize(("limit", "what"), [("max_requests = 2", "requests"), ("max_bytes = 200", "bytes")])
def test_what_a_token_may_have_in_the_server(
    serving: Callable[..., Any], fake: Callable[..., Any], names: Names, limit: str, what: str
) -> None:
    names.put(small=limit, other="")
    book = fake(name="faces")
    server = serving(book, tokens=names.path)
    admission, held = server.app.engine.admission, []
    with grpc.insecure_channel(server.target) as channel:
        stub = TokenizerServiceStub(channel)

        def send(name: str) -> Any:
            call = stub.Encode.future(request("faces"), metadata=bearer(names.secrets[name]), timeout=60)
            eventually(lambda: call.done() or admission.requests > len(held))
            return call

        book.hold()
        while not (call := send("small")).done():
            held.append(call)
        assert call.code() is S.RESOURCE_EXHAUSTED
        assert call.details().startswith(f"too many {what} of the caller small in the server")
        # A request of three rows and its reply have more than 48 bytes, and less than 100.
        assert len(held) == 2 or (what == "bytes" and len(held) in {3, 4})
        held.append(send("other"))
        # More is allowed at once to callers that have calls open.
        names.put(small="", other="")
        server.app.refresh_access()
        held.append(send("small"))
        assert not held[-1].done()
        book.release()
        assert all(list(call.result().shape) == [3] for call in held)


def test_the_socket_file_needs_a_token_too_and_no_certificate(
    serving: Callable[..., Any], fake: Callable[..., Any], names: Names, tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    folder.put(Authority().issue())
    serving(fake(name="faces"), tokens=names.path, unix_socket=tmp_path / "vqserve.sock", **folder.settings())
    with grpc.insecure_channel(f"unix:{tmp_path}/vqserve.sock") as channel:
        stub = TokenizerServiceStub(channel)
        assert encode(stub, request("faces"), names.secrets["faces"]) == [3]
        assert status(lambda: encode(stub, request("faces"), "wrong"))[0] is S.UNAUTHENTICATED


def test_workers_have_the_same_certificates_and_tokens(
    vqserved: Callable[..., Any], put: Callable[..., Any], names: Names, tmp_path: Path
) -> None:
    put(tmp_path / "books" / "faces.safetensors")
    authority, folder, health_port = Authority(), Folder(tmp_path), free_port()
    folder.put(authority.issue())
    flags = ("--tls-cert", folder.cert, "--tls-key", folder.key, "--tokens", names.path, "--health-port", health_port)
    daemon = vqserved(tmp_path / "books", "--device", "cpu", "--workers", "2", *flags)

    def code(secret: str) -> grpc.StatusCode:
        with connect(daemon.target, authority.pem, token=secret) as channel:
            try:
                TokenizerServiceStub(channel).Encode(request("faces"), timeout=30)
            except grpc.RpcError as error:
                found: grpc.StatusCode = error.code()
                return found
        return S.OK

    # The kernel gives each connection to one of the workers.
    for _ in range(4):
        assert code(names.secrets["faces"]) is S.OK
        assert code("wrong") is S.UNAUTHENTICATED
        with grpc.insecure_channel(f"127.0.0.1:{health_port}") as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    names.put(all="")
    folder.put(authority.issue())
    lines = daemon.rescan(workers=2)
    assert sum(" access_reloaded what=tokens" in line for line in lines) == 2
    assert {code(names.secrets["faces"]) for _ in range(4)} == {S.UNAUTHENTICATED}
