"""`vqserved serve` as a process: what it prints, what it exits with, how it stops."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from conftest import daemon_environment
from support.waiting import eventually, read_until
from vqserve import __version__
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1 import tokenizer_pb2_grpc
from vqserve_client import Client
from vqserve_server import app, event_log, extra
from vqserve_server.codebooks import save_codebook
from vqserve_server.config import RpcConfig
from vqserve_server.errors import StartError
from vqserve_server.network import is_loopback
from vqserve_server.quantizers import ResidualQuantizer, VectorQuantizer
from vqserve_server.tokenizer import Tokenizer
from vqserve_tools.cli import main

TORCH_IS_MISSING = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "safetensors", "scipy", "faiss", "einops", "grpc_reflection"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from vqserve_tools.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two codebooks, `large` and `small`."""
    folder = tmp_path_factory.mktemp("codebooks")
    torch.manual_seed(0)
    save_codebook(VectorQuantizer(300, 8), folder / "large.safetensors")
    save_codebook(VectorQuantizer(16, 4), folder / "small.safetensors")
    return folder


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run `vqserved ARGUMENTS` in this process, which has torch already."""
    on_hangup = signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(event_log, "set_up", lambda level, **more: None)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, captured.out, captured.err)

    yield run
    signal.signal(signal.SIGHUP, on_hangup)


def assert_fails(result: subprocess.CompletedProcess[str], text: str) -> None:
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("vqserved: error: ")
    assert text in line


def test_a_folder_is_served_until_sigterm(vqserved: Callable[..., Any], folder: Path) -> None:
    daemon = vqserved(folder)
    assert daemon.ready_line == f"vqserved: ready on {daemon.target}, 2 codebooks, cpu\n"
    with grpc.insecure_channel(daemon.target) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        assert [book.name for book in stub.ListCodebooks(pb.ListCodebooksRequest()).codebooks] == ["large", "small"]
        latents = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
        request = pb.EncodeRequest(
            codebook="large", dtype=pb.DTYPE_FLOAT32, shape=latents.shape, latents=latents.tobytes()
        )
        indices = np.frombuffer(stub.Encode(request).indices, "<u2")
        np.testing.assert_array_equal(
            indices, Tokenizer.load(folder / "large.safetensors", device="cpu").encode(latents)
        )
        # A watcher does not hold up the end.
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    assert "stopping signal=SIGTERM" in log
    assert "served requests=1 rows=50 batches=1 " in log
    assert "Traceback" not in log


def test_the_log_says_what_is_served(vqserved: Callable[..., Any], folder: Path) -> None:
    books = {name: Tokenizer.load(folder / f"{name}.safetensors", device="cpu") for name in ("large", "small")}
    _, log = vqserved(folder, "--device", "cpu").stop(signal.SIGTERM)
    events = [line.partition(" INFO ")[2] for line in log.splitlines() if "codebook_" in line]
    assert events == [
        f'codebook_loaded name=large kind=vq size="300 x 8" search={books["large"].search} device=cpu '
        f"digest={books['large'].digest[:12]}",
        f'codebook_loaded name=small kind=vq size="16 x 4" search={books["small"].search} device=cpu '
        f"digest={books['small'].digest[:12]}",
    ]


def test_a_value_in_the_log_cannot_pass_for_another_field() -> None:
    assert event_log.event("rejected", name='a" status=OK x') == r'rejected name="a\" status=OK x"'
    assert event_log.event("rejected", name='a\\" status=OK x') == r'rejected name="a\\\" status=OK x"'


def test_every_package_of_the_extra_is_known_to_be_of_it() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for name, packages in extra.EXTRAS.items():
        needs = {re.match(r"[\w-]+", need).group() for need in project["optional-dependencies"][name]}
        found = {need.replace("grpcio", "grpc").replace("-", "_") for need in needs}
        assert {"opentelemetry" if need.startswith("opentelemetry") else need for need in found} == packages


def test_as_a_module_it_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "vqserve_tools", "--version"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"vqserved {__version__}\n")


@pytest.mark.parametrize("numbers", [[1], [2], [0, 1, 2]])
def test_started_with_its_standard_files_closed(folder: Path, tmp_path: Path, numbers: list[int]) -> None:
    closed = " ".join(f"{number}>&-" for number in numbers)
    path = tmp_path / "socket"
    command = f'exec "$0" -m vqserve_server serve "$1" --port 0 --unix-socket "$2" {closed}'
    process = subprocess.Popen(["bash", "-c", command, sys.executable, str(folder), str(path)])
    try:
        with Client(f"unix:{path}") as client:
            eventually(lambda: path.exists() or process.poll() is not None)
            assert process.poll() is None
            assert [book.name for book in client.codebooks()] == ["large", "small"]
        # Native code that writes to them writes to /dev/null, not to a connection with that number.
        assert {Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in numbers} == {Path(os.devnull)}
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()


def test_one_codebook_under_a_name_until_interrupted(vqserved: Callable[..., Any], folder: Path) -> None:
    daemon = vqserved(f"mine={folder / 'small.safetensors'}", VQSERVE_DEVICE="cpu", VQSERVE_TARGET="elsewhere:1")
    assert daemon.ready_line == f"vqserved: ready on {daemon.target}, 1 codebook, cpu\n"
    with grpc.insecure_channel(daemon.target) as channel:
        (book,) = tokenizer_pb2_grpc.TokenizerServiceStub(channel).ListCodebooks(pb.ListCodebooksRequest()).codebooks
    assert book.name == "mine"
    assert daemon.stop(signal.SIGINT)[0] == 0


def test_a_codebook_with_stages_is_served(vqserved: Callable[..., Any], tmp_path: Path) -> None:
    save_codebook(ResidualQuantizer(2, 4, 3), tmp_path / "audio.safetensors")
    daemon = vqserved(tmp_path, "--device", "cpu")
    latents = np.random.default_rng(0).standard_normal((2, 3, 5), np.float32)
    local = Tokenizer.load(tmp_path / "audio.safetensors", device="cpu")
    with Client(daemon.target) as client:
        np.testing.assert_array_equal(client.encode(latents), local.encode(latents))


def test_two_servers_on_one_port(serving: Callable[..., Any], run_vqserved: Callable[..., Any], folder: Path) -> None:
    target = serving(Tokenizer.load(folder / "small.safetensors", device="cpu")).target
    port = target.rpartition(":")[2]
    assert_fails(run_vqserved("serve", folder, "--port", port), f"cannot listen on {target}: the port is in use")
    health = run_vqserved("serve", folder, "--port", 0, "--health-port", port)
    assert_fails(health, f"cannot listen on {target}: the port is in use")
    assert health.stderr.endswith("choose another with --health-port\n")


def test_a_socket_file_beside_the_port(vqserved: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "vqserve.sock"
    # What a server that was killed has left there.
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    daemon = vqserved(folder / "small.safetensors", "--device", "cpu", "--unix-socket", path)
    latents = np.random.default_rng(0).standard_normal((7, 4), np.float32)
    with Client(daemon.target) as by_port, Client(f"unix:{path}") as by_file:
        np.testing.assert_array_equal(by_file.encode(latents), by_port.encode(latents))
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_socket_files_that_cannot_be(
    vqserved: Callable[..., Any], run_vqserved: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken.sock"
    vqserved(folder / "small.safetensors", "--device", "cpu", "--unix-socket", taken)
    plain = tmp_path / "plain"
    plain.write_text("precious")
    nowhere = tmp_path / "link"
    nowhere.symlink_to(tmp_path / "nothing")
    for path, reason in (
        (taken, "another process listens on it"),
        (nowhere, f"cannot listen on {nowhere}: Address already in use"),
        ("/proc/x.sock", "cannot listen on /proc/x.sock: "),
        (f"{tmp_path}/x/", f"cannot listen on {tmp_path}/x/: "),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "%41.sock", "cannot contain any of % ? #"),
        (plain, "the file exists and is not a socket"),
        (tmp_path / "nowhere" / "x.sock", "there is no folder"),
        (tmp_path / ("x" * 120), "path too long"),
    ):
        assert_fails(run_vqserved("serve", folder, "--port", "0", "--unix-socket", path), reason)
    assert plain.read_text() == "precious"
    assert_fails(
        run_vqserved("serve", folder, "--port", "0", "--unix-socket", tmp_path / "x", "--workers", "2"),
        "--unix-socket needs --workers 1",
    )


def test_a_socket_file_is_not_taken_from_a_server_that_came_meanwhile(
    serving: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(folder / "small.safetensors", device="cpu")
    path = tmp_path / "vqserve.sock"
    serving(tokenizer, unix_socket=path)
    with pytest.raises(StartError, match="another process listens on it"):
        serving(tokenizer, unix_socket=path)
    with Client(f"unix:{path}") as client:
        assert len(client.codebooks()) == 1


def test_grpc_itself_rejects_a_port_in_use(serving: Callable[..., Any], folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "small.safetensors", device="cpu")
    port = int(serving(tokenizer).target.rpartition(":")[2])

    async def start() -> None:
        second = app.App([tokenizer], app.ServeConfig(rpc=RpcConfig(port=port)))
        try:
            await second.start()
        finally:
            await second.stop()

    with pytest.raises(StartError, match="cannot listen on"):
        asyncio.run(start())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["serve", "{folder}/none.safetensors"], "no such file or folder"),
        (["serve", "{empty}"], "no *.safetensors file in"),
        (["serve", "{empty}/bad.pt", "--port", "0"], "bad"),
        (["serve", "name={folder}"], "NAME=PATH needs a file"),
        (["serve", "{folder}", "{folder}/small.safetensors"], "two codebooks are named 'small'"),
        (["serve", "a b={folder}/small.safetensors"], "'a b' is not a valid name"),
        (["serve", "{folder}", "--port", "0", "--search", "magic"], "magic"),
        (["serve", "{folder}", "--port", "0", "--device", "cuda:99"], "cuda:99"),
        (["serve", "{folder}", "--host", "192.0.2.1", "--insecure"], "cannot listen on 192.0.2.1:50051"),
        (["serve", "{folder}", "--host", "::1%nowhere"], "cannot listen on [::1%nowhere]:50051"),
        (["serve", "{folder}", "--host", "..", "--insecure"], "cannot listen on ..:50051: it is no name of a host"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    run_here: Callable[..., Any], folder: Path, tmp_path: Path, arguments: list[str], text: str
) -> None:
    (tmp_path / "bad.pt").write_bytes(b"not a codebook")
    filled = [argument.format(folder=folder, empty=tmp_path) for argument in arguments]
    assert_fails(run_here(*filled), text)


def test_a_folder_that_this_user_may_not_list_is_not_called_empty(
    run_here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Raised by the test: root, which many CI systems use, may list a folder of any mode.
    def reject(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", reject)
    text = f"user {os.geteuid()} cannot read the folder {tmp_path}: Permission denied"
    assert_fails(run_here("serve", str(tmp_path)), text)


def test_an_unforeseen_error_is_one_line_too(
    run_here: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.Repository, "load", lambda self: 1 / 0)
    expected = "ZeroDivisionError: division by zero (--log-level debug shows where)"
    assert_fails(run_here("serve", str(folder), "--port", "0"), expected)


def test_a_flag_is_named_only_where_it_is(run_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqserve_tools.inspection.commands.load_codebook", lambda path: 1 / 0)
    result = run_here("inspect", "x")
    assert_fails(result, "ZeroDivisionError: division by zero")
    assert "--log-level" not in result.stderr


def test_a_mistake_in_the_environment_is_one_line(
    run_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VQSERVE_PRT", "1")
    assert_fails(run_here("serve"), "unknown environment variable VQSERVE_PRT: did you mean VQSERVE_PORT?")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["serve", "--port", "x"], ["serve", "--nonsense"]])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.endswith(" --help` lists the options\n")
    assert err.count("\n") == 1


def test_version(run_vqserved: Callable[..., Any]) -> None:
    result = run_vqserved("--version")
    assert (result.returncode, result.stdout) == (0, f"vqserved {__version__}\n")


@pytest.mark.parametrize(
    "command", [["serve"], ["import", "x", "-o", "y"], ["inspect", "x"], ["train", "x", "-o", "y.safetensors"]]
)
def test_without_the_extra_it_says_what_to_install(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", TORCH_IS_MISSING, *command], capture_output=True, text=True, check=False
    )
    assert_fails(result, "torch is not installed: pip install 'vqserve[server]'")


def test_a_tokenizer_without_the_extra_says_what_to_install() -> None:
    program = TORCH_IS_MISSING.partition("from vqserve_tools")[0] + (
        "import vqserve_server\n"
        "try:\n"
        "    from vqserve_server import Tokenizer\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error.name, error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = "ImportError torch Tokenizer cannot be imported: torch is not installed: pip install 'vqserve[server]'\n"
    assert result.stdout == expected


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", TORCH_IS_MISSING, *arguments], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_host_beyond_loopback_is_warned_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, run_here: Callable[..., Any]
) -> None:
    def reject(self: app.Repository) -> None:
        raise StartError("enough")

    monkeypatch.setattr(app.Repository, "load", reject)
    run_here("serve", str(folder), "--port", "0")
    assert "listening_openly" not in caplog.text
    monkeypatch.setattr(app, "check", lambda host, port: None)
    run_here("serve", str(folder), "--host", "192.0.2.1", "--insecure")
    assert 'listening_openly host=192.0.2.1 risk="no TLS: ' in caplog.text
    assert "no tokens: every caller is served" in caplog.text
    assert not is_loopback("0.0.0.0")  # noqa: S104
    assert not is_loopback("example.org")
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))


@pytest.mark.parametrize("flags", [(), ("--tokens", "tokens.toml"), ("--workers", "2")])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])  # noqa: S104
def test_a_host_beyond_loopback_needs_tls_or_a_word(
    folder: Path, run_here: Callable[..., Any], host: str, flags: tuple[str, ...]
) -> None:
    ended = run_here("serve", str(folder), "--host", host, *flags)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"vqserved: error: {host} can be reached by other machines, and the connections would not be encrypted: give "
        "--tls-cert and --tls-key, or --insecure if everyone on the network may read and change what is sent"
    )


def test_the_port_is_free_until_the_codebooks_are_loaded(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    seen: list[int] = []

    def load(self: app.Repository) -> None:
        with socket.socket() as probe:
            seen.append(probe.connect_ex(("127.0.0.1", port)))
        raise StartError("enough")

    monkeypatch.setattr(app.Repository, "load", load)
    monkeypatch.setattr(event_log, "set_up", lambda level, **more: None)
    config = app.ServeConfig(rpc=RpcConfig(port=port))
    with pytest.raises(StartError, match="enough"):
        app.run([str(folder)], config)
    assert seen != [0]
    assert len(seen) == 1


# A daemon with a codebook that stops when it is asked for ones, and whose device breaks when asked for twos.
STUBBORN = """
import sys, threading, torch
from vqserve.codebook_info import CodebookInfo
from vqserve_server import app

class Stubborn:
    device = torch.device("cpu")
    search = "none"
    probe = native_batch = None
    info = CodebookInfo(
        name="stubborn", digest="", kind="vq", num_codes=2, vocab_size=2, input_dim=1, code_dim=1, output_dim=1
    )

    def encode_rows(self, rows, **_):
        sys.stdout.write("computing\\n")
        sys.stdout.flush()
        if rows[0, 0] == 2:
            raise torch.AcceleratorError("an illegal memory access was encountered")
        threading.Event().wait()

app.Repository.load = lambda self: None
app.Repository.tokenizers = [Stubborn()]
from vqserve_tools.cli import main
sys.exit(main(["serve", "--port", "0", "--metrics-port", "0", *sys.argv[1:]]))
"""


@pytest.fixture
def stubborn() -> Iterator[Callable[..., Any]]:
    """A daemon whose device is at work on a row of `value`s: stubborn(value, "--drain-seconds", "9")."""
    with ExitStack() as stack:

        def start(value: float, *arguments: str) -> tuple[subprocess.Popen[str], Any]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", STUBBORN, *arguments],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=daemon_environment(),
                )
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            target = process.stdout.readline().removeprefix("vqserved: ready on ").partition(",")[0]
            channel = stack.enter_context(grpc.insecure_channel(target))
            request = pb.EncodeRequest(
                dtype=pb.DTYPE_FLOAT32, shape=[1, 1], latents=np.array([value], np.float32).tobytes()
            )
            call = tokenizer_pb2_grpc.TokenizerServiceStub(channel).Encode.future(request)
            assert process.stdout.readline() == "computing\n"
            return process, call

        yield start


def test_a_lost_device_ends_the_daemon(stubborn: Callable[..., Any]) -> None:
    process, call = stubborn(2)
    assert call.exception().code() is grpc.StatusCode.UNAVAILABLE
    assert call.exception().details().startswith("the device failed: try again")
    _, log = process.communicate()
    assert process.returncode == 1
    assert "an illegal memory access" in log
    assert log.splitlines()[-1] == "vqserved: error: the device failed; the log has the reason"


def test_a_device_that_never_answers_does_not_hold_up_the_end(stubborn: Callable[..., Any]) -> None:
    process, call = stubborn(1, "--drain-seconds", "0.2")
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate()
    assert process.returncode == 0
    assert call.exception() is not None
    assert "drain_expired drain_seconds=0.2" in log


def test_an_idle_daemon_needs_no_time_to_stop(vqserved: Callable[..., Any], folder: Path) -> None:
    daemon = vqserved(folder, "--device", "cpu", "--drain-seconds", "0")
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    assert "drain_expired" not in log


def test_sighup_while_it_stops_changes_nothing(stubborn: Callable[..., Any]) -> None:
    process, _ = stubborn(1, "--drain-seconds", "1")
    process.send_signal(signal.SIGTERM)
    read_until(process.stderr, "stopping signal=SIGTERM")
    process.send_signal(signal.SIGHUP)
    _, log = process.communicate()
    assert process.returncode == 0
    assert "reload_done" not in log


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_to_the_very_end_changes_nothing(vqserved: Callable[..., Any], folder: Path, workers: int) -> None:
    process = vqserved(folder, "--workers", workers).process
    process.send_signal(signal.SIGTERM)
    read_until(process.stderr, " served requests=0 ")
    while process.poll() is None:
        process.send_signal(signal.SIGHUP)
        threading.Event().wait(0.002)
    assert (process.returncode, process.stderr.read()) == (0, ANY)


def test_a_second_signal_ends_it_at_once(stubborn: Callable[..., Any]) -> None:
    process, _ = stubborn(1, "--drain-seconds", "86400")
    process.send_signal(signal.SIGTERM)
    read_until(process.stderr, "stopping signal=SIGTERM")
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM


def test_a_caller_that_disconnects_while_the_server_stops_does_not_abort_it(
    vqserved: Callable[..., Any], folder: Path
) -> None:
    """A thread that looks at a large request has its answer when gRPC's queue is shut already."""
    latents = np.zeros((1_800_000, 8), np.float32)
    latents[-1, -1] = np.nan
    request = pb.EncodeRequest(codebook="large", dtype=pb.DTYPE_FLOAT32, shape=latents.shape, latents=latents.tobytes())
    for wait_s in (0.0, 0.02, 0.05):
        daemon = vqserved(folder, "--device", "cpu", "--drain-seconds", "5")
        with grpc.insecure_channel(daemon.target, options=[("grpc.max_send_message_length", -1)]) as channel:
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
            stub.ListCodebooks(pb.ListCodebooksRequest())
            calls = [stub.Encode.future(request) for _ in range(3)]
            threading.Event().wait(0.15 + wait_s)
            for call in calls:
                call.cancel()
        assert daemon.stop(signal.SIGTERM)[0] == 0
