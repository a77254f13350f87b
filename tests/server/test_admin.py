"""AdminService of real servers, by the Python client and the command line: who may, and what it does."""

from __future__ import annotations

import json
import os
import queue
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from support.waiting import eventually, read_until
from vqserve import __version__
from vqserve.v1 import admin_pb2 as pb
from vqserve.v1 import admin_pb2_grpc
from vqserve_client import Client, InvalidOption, Overloaded, PermissionDenied, ProtocolError, Unauthenticated
from vqserve_client.admin import AdminClient, LiveCodebook
from vqserve_client.cli import main
from vqserve_server.access.token_file import hash_of, new_secret

LATENTS = np.random.default_rng(0).standard_normal((64, 4), dtype=np.float32)
METHODS = {
    "Status": pb.StatusRequest(),
    "Reload": pb.ReloadRequest(),
    "SetLogLevel": pb.SetLogLevelRequest(level="info"),
    "Drain": pb.DrainRequest(),
}


class Secrets:
    """Two tokens: `ops` may operate the server, `user` may not."""

    def __init__(self, folder: Path) -> None:
        self.ops, self.user = new_secret(), new_secret()
        self.file = folder / "tokens.toml"
        self.write("true")

    def write(self, admin: str) -> None:
        text = (
            f'[tokens.ops]\nsha256 = "{hash_of(self.ops)}"\nadmin = {admin}\n'
            f'[tokens.user]\nsha256 = "{hash_of(self.user)}"\n'
        )
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.chmod(0o600)
        new.replace(self.file)


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    return tmp_path / "books"


@pytest.fixture
def start(vqserved: Callable[..., Any], books: Path, secrets: Secrets) -> Callable[..., Any]:
    """Start a server of the folder with these tokens, and return it."""
    return lambda *words: vqserved(books, "--device", "cpu", "--tokens", secrets.file, *words)


def refusals(target: str, token: str | None) -> dict[str, tuple[str, str]]:
    """The status and text of each method, called with a token."""
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    found = {}
    with grpc.insecure_channel(target) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        for name, request in METHODS.items():
            with pytest.raises(grpc.RpcError) as caught:
                getattr(stub, name)(request, metadata=metadata, timeout=60)
            found[name] = caught.value.code().name, caught.value.details()
    return found


def test_only_a_token_of_an_operator_may(start: Callable[..., Any], put: Any, books: Path, secrets: Secrets) -> None:
    put(books / "book.safetensors")
    daemon = start()
    text = "the access token user may not operate the server: its entry needs admin = true"
    assert set(refusals(daemon.target, secrets.user).values()) == {("PERMISSION_DENIED", text)}
    for token in (None, "vqs_wrong"):
        assert {code for code, _ in refusals(daemon.target, token).values()} == {"UNAUTHENTICATED"}
    with AdminClient(daemon.target, token=secrets.ops) as admin:
        assert [worker.worker for worker in admin.status()] == [0]
        # An operator's token is a caller's token, too.
        with Client(daemon.target, token=secrets.ops) as client:
            assert client.encode(LATENTS).shape == (64,)
        # What the file says now counts.
        secrets.write("false")
        eventually(lambda: may_not(admin))
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    assert "admin_refused method=Status token=user" in log
    assert "admin_call method=Status token=ops peer=127.0.0.1" in log
    assert secrets.ops not in log


def may_not(admin: AdminClient) -> bool:
    try:
        admin.status()
    except PermissionDenied as error:
        assert "vqserved token NAME --admin" in str(error)  # noqa: PT017
        return True
    return False


def test_nobody_may_where_there_are_no_tokens(vqserved: Callable[..., Any]) -> None:
    daemon = vqserved("--device", "cpu")
    text = "only a server with access tokens (--tokens) can be operated by calls"
    for token in (None, new_secret()):
        assert set(refusals(daemon.target, token).values()) == {("PERMISSION_DENIED", text)}
    assert daemon.stop(signal.SIGTERM)[0] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_says_what_happened(
    start: Callable[..., Any], put: Any, books: Path, secrets: Secrets, workers: int
) -> None:
    put(books / "book" / "1.safetensors")
    put(books / "gone.safetensors", seed=1)
    daemon = start("--workers", workers)
    with AdminClient(daemon.target, token=secrets.ops) as admin:
        status = admin.status()
        assert [(worker.worker, worker.error, worker.log_level) for worker in status] == [
            (number, None, "info") for number in range(workers)
        ]
        assert len({worker.pid for worker in status}) == workers
        assert {worker.server.version for worker in status if worker.server} == {__version__}

        two = put(books / "book" / "2.safetensors", seed=2)
        (books / "book" / "3.safetensors").write_bytes(b"half")
        (books / "gone.safetensors").unlink()
        (books / "book" / "stable.safetensors").symlink_to("2.safetensors")
        for worker in admin.reload():
            counts = (worker.loaded, worker.unchanged, worker.removed, worker.rejected, worker.skipped)
            assert counts == (1, 1, 1, 1, 0)
            [problem] = worker.problems
            assert problem.startswith(f"{books / 'book' / '3.safetensors'}: the codebook cannot be used: ")
            assert [(book.name, book.version) for book in worker.codebooks] == [
                ("book", 2),
                ("book@stable", 2),
                ("book@1", 1),
                ("book@2", 2),
            ]
            assert worker.codebooks[0] == LiveCodebook(name="book", digest=two.digest, version=2)
        # All of them serve it, whichever has the connection.
        for _ in range(4 * workers):
            with Client(daemon.target, token=secrets.user) as client:
                np.testing.assert_array_equal(client.encode(LATENTS, codebook="book@stable"), two.encode(LATENTS))
        secrets.file.write_text("half")
        for worker in admin.reload():
            assert f"{secrets.file}: is not valid TOML" in worker.problems[0]
    assert daemon.stop(signal.SIGTERM)[0] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_drain_is_a_stop(start: Callable[..., Any], put: Any, books: Path, secrets: Secrets, workers: int) -> None:
    put(books / "book.safetensors")
    daemon = start("--workers", workers, "--drain-seconds", 20)
    with AdminClient(daemon.target, token=secrets.ops) as admin:
        left = admin.drain()
    assert [(worker.worker, worker.requests, worker.drain_seconds) for worker in left] == [
        (number, 0, 20.0) for number in range(workers)
    ]
    _, log = daemon.process.communicate()
    assert daemon.process.returncode == 0
    assert "admin_call method=Drain token=ops" in log
    assert 'stopping reason="an operator\'s call"' in log
    assert log.count(" served requests=") == workers


def test_the_level_of_the_log(start: Callable[..., Any], put: Any, books: Path, secrets: Secrets) -> None:
    put(books / "book.safetensors")
    daemon = start("--workers", 2, "--log-level", "warning")
    with AdminClient(daemon.target, token=secrets.ops) as admin:
        assert [worker.previous for worker in admin.set_log_level("debug")] == ["warning", "warning"]
        assert {worker.log_level for worker in admin.status()} == {"debug"}
        with pytest.raises(InvalidOption, match="level must be one of debug, info, warning, error"):
            admin.set_log_level("loud")  # type: ignore[arg-type]
        # A worker that is started later has it, too.
        before = {worker.pid for worker in admin.status()}
        os.kill(min(before), signal.SIGKILL)
        eventually(lambda: levels(daemon.target, secrets.ops, without=min(before)) == ["debug", "debug"])
    assert daemon.stop(signal.SIGTERM)[0] == 0


def levels(target: str, token: str, *, without: int) -> list[str]:
    """The levels of the workers that answer, none if one of them has that process id."""
    try:
        with AdminClient(target, token=token) as admin:
            status = admin.status()
    except Exception:
        # The connection was with the one that has died.
        return []
    return [] if without in {worker.pid for worker in status} else [worker.log_level for worker in status]


def test_a_worker_that_is_not_ready_says_so(start: Callable[..., Any], put: Any, books: Path, secrets: Secrets) -> None:
    put(books / "book.safetensors")
    daemon = start("--workers", 2)
    with AdminClient(daemon.target, token=secrets.ops) as admin:
        pids = {worker.worker: worker.pid for worker in admin.status()}
    (books / "bad.safetensors").write_bytes(b"half")
    os.kill(pids[1], signal.SIGKILL)
    read_until(daemon.process.stderr, "worker_ended number=1 ")

    def answers() -> Any:
        with AdminClient(daemon.target, token=secrets.ops) as admin:
            return admin.reload()

    zero, one = answers()
    assert (zero.error, zero.rejected) == (None, 1)
    assert one.error == "the process is not ready"
    (books / "bad.safetensors").unlink()
    eventually(lambda: [worker.error for worker in answers()] == [None, None])
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_a_stopped_worker_holds_up_no_operator(
    start: Callable[..., Any], put: Any, books: Path, secrets: Secrets
) -> None:
    put(books / "book.safetensors")
    daemon = start("--workers", 2, "--watchdog-seconds", 0, "--drain-seconds", 1)
    with AdminClient(daemon.target, token=secrets.ops) as admin:
        pids = {worker.worker: worker.pid for worker in admin.status()}
        line = read_until(daemon.process.stderr, "admin_call method=Status ")
        stopped = 1 - int(line.rpartition("worker=")[2])
        os.kill(pids[stopped], signal.SIGSTOP)
        errors = {worker.worker: worker.error for worker in admin.status()}
        assert errors == {stopped: "the process does not answer", 1 - stopped: None}
        assert {worker.worker: worker.error for worker in admin.drain()} == errors
    _, log = daemon.process.communicate()
    assert "workers_killed count=1" in log


def test_an_operator_gets_through_to_a_full_server(
    start: Callable[..., Any], put: Any, books: Path, secrets: Secrets
) -> None:
    put(books / "book.safetensors")
    daemon = start("--max-concurrent-rpcs", 1)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with grpc.insecure_channel(daemon.target) as channel, AdminClient(daemon.target, token=secrets.ops) as admin:
        stream = channel.stream_stream("/vqserve.v1.TokenizerService/EncodeStream")
        call = stream(iter(requests.get, None), metadata=[("authorization", f"Bearer {secrets.user}")])
        eventually(lambda: admin.status()[0].server.open_calls == 1)
        with Client(daemon.target, token=secrets.ops, retries=0) as client, pytest.raises(Overloaded):
            client.codebooks()
        assert admin.reload()[0].unchanged == 1
        requests.put(None)
        assert list(call) == []
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_strangers_do_not_end_the_call_of_an_operator(
    start: Callable[..., Any], put: Any, books: Path, secrets: Secrets
) -> None:
    put(books / "book.safetensors")
    daemon = start()
    status = "/vqserve.v1.AdminService/Status"
    messages: queue.Queue[bytes] = queue.Queue()
    with grpc.insecure_channel(daemon.target) as channel, grpc.insecure_channel(daemon.target) as other:
        # As long as a reload takes.
        own: Any = channel.stream_unary(status)
        reply = own.future((messages.get() for _ in range(1)), metadata=[("authorization", f"Bearer {secrets.ops}")])
        stranger: Any = other.unary_unary(status)
        for metadata in [None, [("authorization", f"Bearer {secrets.user}")]] * 10:
            calls = [stranger.future(b"", metadata=metadata, timeout=60) for _ in range(100)]
            assert all(call.exception() for call in calls)
        messages.put(b"")
        assert reply.result(timeout=60)
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_many_operators_at_once(start: Callable[..., Any], put: Any, books: Path, secrets: Secrets) -> None:
    put(books / "book.safetensors")
    daemon = start("--workers", 2)

    def reload(_: int) -> list[int]:
        with AdminClient(daemon.target, token=secrets.ops) as admin:
            return [worker.unchanged for worker in admin.reload()]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reload, range(24))) == [[1, 1]] * 24
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_the_command_line(
    start: Callable[..., Any],
    put: Any,
    books: Path,
    secrets: Secrets,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    book = put(books / "book.safetensors")
    daemon = start("--workers", 2)
    token = tmp_path / "ops.token"
    token.write_text(secrets.ops)

    def admin(*words: str) -> tuple[int, list[str]]:
        code = main(["admin", *words, "--target", daemon.target, "--token-file", str(token)])
        return code, capsys.readouterr().out.splitlines()

    code, lines = admin("reload")
    assert code == 0
    assert lines == [
        line
        for number in (0, 1)
        for line in (
            f"worker {number}: 0 loaded, 1 unchanged, 0 removed, 0 rejected, 0 skipped",
            f"  book {book.digest[:12]}",
        )
    ]
    (books / "bad.safetensors").write_bytes(b"half")
    code, lines = admin("reload")
    assert (code, len(lines)) == (1, 6)
    assert lines[1].startswith(f"  {books / 'bad.safetensors'}: the codebook cannot be used")
    (books / "bad.safetensors").unlink()
    secrets.write("half")
    code, lines = admin("reload")
    assert (code, lines[0]) == (1, "worker 0: 0 loaded, 1 unchanged, 0 removed, 0 rejected, 0 skipped")
    assert "is not valid TOML" in lines[1]
    secrets.write("true")
    # What is skipped is no mistake.
    (books / "latents.npy").touch()
    assert admin("reload")[0] == 0
    code, lines = admin("log-level", "error")
    assert (code, lines) == (0, ["worker 0: the level was info", "worker 1: the level was info"])
    code, lines = admin("status", "--json")
    assert code == 0
    assert [worker["log_level"] for worker in json.loads("\n".join(lines))] == ["error", "error"]
    code, lines = admin("status")
    assert lines[0].startswith(f"worker 0: vqserve {__version__}, up ")
    for words in (("log-level",), ("reload", "debug")):
        with pytest.raises(SystemExit) as caught:
            admin(*words)
        assert caught.value.code == 2
        assert "log-level needs one of debug, info, warning, error" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["admin"])
    assert "required: {status,reload,log-level,drain}; " in capsys.readouterr().err
    code, lines = admin("drain")
    assert code == 0
    assert lines[0].startswith("worker 0: stopping, within 30 s: ")
    assert daemon.process.wait() == 0


def test_an_older_server_has_no_such_calls() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with (
        AdminClient(f"127.0.0.1:{port}", token=new_secret()) as admin,
        pytest.raises(ProtocolError, match="the server is older than these calls"),
    ):
        admin.status()
    server.stop(None).wait()


def test_calls_without_a_token_to_a_server_that_has_some(
    start: Callable[..., Any], put: Any, books: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(books / "book.safetensors")
    daemon = start()
    with AdminClient(daemon.target) as admin, pytest.raises(Unauthenticated):
        admin.drain()
    assert main(["admin", "drain", "--target", daemon.target]) == 1
    assert "the server needs a valid access token" in capsys.readouterr().err
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_many_problems_are_counted_and_the_first_are_named(
    start: Callable[..., Any], put: Any, books: Path, secrets: Secrets
) -> None:
    put(books / "book.safetensors")
    daemon = start()
    for number in range(150):
        (books / f"array{number:03}.npy").touch()
    with AdminClient(daemon.target, token=secrets.ops) as admin:
        [worker] = admin.reload()
    assert worker.skipped == 150
    assert len(worker.problems) == 101
    assert "array099.npy is skipped" in worker.problems[-2]
    assert worker.problems[-1] == "and 50 more: the log has all"
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    assert "array149.npy" in log


def test_a_file_whose_name_is_not_utf8_does_not_hide_what_a_reload_did(
    start: Callable[..., Any], put: Any, books: Path, secrets: Secrets
) -> None:
    put(books / "book.safetensors")
    daemon = start()
    (books / os.fsdecode(b"odd\xff.safetensors")).write_bytes(b"half")
    with AdminClient(daemon.target, token=secrets.ops) as admin:
        [worker] = admin.reload()
        assert worker.rejected == 1
        assert "odd\\udcff" in worker.problems[0]
    assert daemon.stop(signal.SIGTERM)[0] == 0
