"""Several processes on one port: started, stopped and restarted by a parent that does nothing else."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from support.waiting import eventually, read_until
from support.workers import children
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_client import Client
from vqserve_client.channel import Connection
from vqserve_client.config import ClientConfig
from vqserve_client.health import SERVING, status
from vqserve_server import workers as workers_module
from vqserve_server.codebooks import save_codebook
from vqserve_server.config import ServeConfig, resolve
from vqserve_server.errors import StartError
from vqserve_server.process import WORKER_VARIABLE
from vqserve_server.quantizers import VectorQuantizer
from vqserve_server.tokenizer import Tokenizer
from vqserve_server.workers import BackOff, Workers, worker_environment

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")


@pytest.fixture(scope="module")
def codebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codebooks") / "book.safetensors"
    torch.manual_seed(0)
    save_codebook(VectorQuantizer(300, 8), path)
    return path


def all_gone(pids: Iterable[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def answers(target: str, codebook: Path, calls: int = 20) -> None:
    """Every connection gets the right answer, whichever worker has it."""
    tokenizer = Tokenizer.load(codebook, device="cpu")
    latents = np.random.default_rng(0).standard_normal((50, 8), dtype=np.float32)
    expected = tokenizer.encode(latents)
    for _ in range(calls):
        with Client(target) as client:
            np.testing.assert_array_equal(client.encode(latents), expected)
            assert client.codebooks()[0].digest == tokenizer.digest


def test_workers_share_a_port_and_stop_together(vqserved: Callable[..., Any], codebook: Path) -> None:
    daemon = vqserved(codebook, "--workers", 3)
    assert daemon.ready_line.endswith(", 1 codebook, cpu, 3 workers\n")
    workers = children(daemon.process.pid)
    assert sorted(workers) == [0, 1, 2]
    answers(daemon.target, codebook)
    connection = Connection(ClientConfig(target=daemon.target))
    assert status(connection, timeout_s=60) == SERVING
    connection.close()
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    served = [line for line in log.splitlines() if " served " in line]
    assert sum(line.endswith(" worker=1") for line in served) == 1
    # The kernel spread the connections: no worker had them all.
    assert len(served) == 3
    assert sum("served requests=0 " not in line for line in served) > 1
    eventually(lambda: all_gone(workers.values()))


def test_a_worker_that_dies_is_started_again_and_the_others_serve_on(
    vqserved: Callable[..., Any], codebook: Path
) -> None:
    daemon = vqserved(codebook, "--workers", 2)
    before = children(daemon.process.pid)
    os.kill(before[0], signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{before[0]}").exists())
    answers(daemon.target, codebook, calls=5)
    eventually(lambda: children(daemon.process.pid).get(0, before[0]) != before[0])
    assert children(daemon.process.pid)[1] == before[1]
    code, log = daemon.stop(signal.SIGINT)
    assert code == 0
    assert "worker_ended number=0 code=-9 restart_s=0.5" in log


def test_what_is_the_same_in_all_workers_is_logged_once(
    vqserved: Callable[..., Any], codebook: Path, tmp_path: Path
) -> None:
    (tmp_path / "book.safetensors").write_bytes(codebook.read_bytes())
    (tmp_path / "foreign.npy").touch()
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'[tokens.me]\nsha256 = "{"0" * 64}"\n')
    tokens.chmod(0o604)
    daemon = vqserved(tmp_path, "--workers", 3, "--tokens", tokens)
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    for name in ("file_open_to_all", "codebook_skipped"):
        lines = [line for line in log.splitlines() if f" {name} " in line]
        assert [line.endswith(" worker=0") for line in lines] == [True], name
    assert log.count(" codebook_loaded ") == 3


def test_workers_end_with_their_parent_however_it_ends(vqserved: Callable[..., Any], codebook: Path) -> None:
    daemon = vqserved(codebook, "--workers", 2)
    workers = children(daemon.process.pid)
    daemon.process.kill()
    daemon.process.wait()
    eventually(lambda: all_gone(workers.values()))


def test_a_worker_that_cannot_start_is_the_parents_error(
    run_vqserved: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no codebook")
    done = run_vqserved("serve", damaged, "--workers", 2, "--port", 0)
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"vqserved: error: {damaged}: it is a text file" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("vqserved: error: a worker did not start")


def test_a_worker_for_which_nothing_is_left_is_the_parents_error_too(codebook: Path) -> None:
    # bash and not preexec_fn, which may not be used beside threads.
    command = 'ulimit -n 14; exec "$0" -m vqserve_server serve "$1" --workers 4 --port 0'
    environ = {**os.environ, "VQSERVE_METRICS_PORT": "0"}
    words = ["bash", "-c", command, sys.executable, str(codebook)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200, env=environ)
    assert done.returncode == 1
    assert done.stdout == ""
    assert 'error="Too many open files"' in done.stderr
    assert done.stderr.splitlines()[-1].startswith("vqserved: error: a worker did not start")


def test_a_worker_for_which_no_thread_is_left_is_the_parents_error_too(
    codebook: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def no_thread(*_: object, **__: object) -> None:
        # asyncio waits for a process on a thread, once it is there.
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_thread)
    with pytest.raises(StartError, match="a worker did not start"):
        asyncio.run(Workers([str(codebook)], ServeConfig(workers=2), 0).start())
    assert 'worker_not_started number=1 error="can\'t start new thread"' in caplog.text


def test_a_worker_that_takes_long_to_start_is_named(
    codebook: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers_module, "_LONG_START_S", 0.05)

    async def start_and_stop() -> None:
        workers = Workers([str(codebook)], ServeConfig(workers=1), 0)
        await workers.start()
        assert await workers.stop()

    asyncio.run(start_and_stop())
    assert "worker_not_ready number=0 pid=" in caplog.text


def test_a_worker_for_which_nothing_is_left_is_started_when_there_is(
    vqserved: Callable[..., Any], codebook: Path
) -> None:
    daemon = vqserved(codebook, "--workers", 2)
    parent = daemon.process.pid
    limits = resource.prlimit(parent, resource.RLIMIT_NOFILE)
    lost = children(parent)[0]
    resource.prlimit(parent, resource.RLIMIT_NOFILE, (3, limits[1]))
    os.kill(lost, signal.SIGKILL)
    read_until(daemon.process.stderr, 'worker_not_started number=0 error="Too many open files"')
    resource.prlimit(parent, resource.RLIMIT_NOFILE, limits)
    eventually(lambda: 0 in children(parent))
    read_until(daemon.process.stderr, "worker_ready number=0")
    answers(daemon.target, codebook)
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_what_the_parent_can_check_is_reported_once(
    run_vqserved: Callable[..., subprocess.CompletedProcess[str]], serving: Callable[..., Any], codebook: Path
) -> None:
    missing = run_vqserved("serve", "nowhere", "--workers", 2, "--port", 0)
    assert (missing.returncode, missing.stderr) == (1, "vqserved: error: no such file or folder: nowhere\n")
    port = serving(Tokenizer.load(codebook, device="cpu")).target.rpartition(":")[2]
    taken = run_vqserved("serve", codebook, "--workers", 2, "--port", port)
    assert (taken.returncode, taken.stderr) == (
        1,
        f"vqserved: error: cannot listen on 127.0.0.1:{port}: the port is in use: is another vqserved running? "
        "Stop it, or choose another with --port\n",
    )


def test_two_parents_do_not_share_a_port(
    vqserved: Callable[..., Any], run_vqserved: Callable[..., subprocess.CompletedProcess[str]], codebook: Path
) -> None:
    daemon = vqserved(codebook, "--workers", 2)
    port = daemon.target.rpartition(":")[2]
    for workers in (1, 2):
        done = run_vqserved("serve", codebook, "--workers", workers, "--port", port)
        assert done.returncode == 1
        assert "the port is in use" in done.stderr


def test_the_back_off_grows_and_is_forgotten() -> None:
    back_off = BackOff(first_s=1.0, most_s=5.0, steady_s=60.0)
    assert [back_off.delay_s(0.1) for _ in range(4)] == [1.0, 2.0, 4.0, 5.0]
    assert back_off.delay_s(61.0) == 1.0
    assert back_off.delay_s(59.0) == 2.0


def test_a_workers_environment_is_its_share_of_the_parents_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQSERVE_MAX_WAIT_US", "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = resolve(
        {"workers": 4, "devices": "cuda:0,cuda:1", "max_batch_rows": 99, "drain_seconds": 2.5, "host": "127.0.0.2"}, {}
    )
    for number, device in enumerate(["cuda:0", "cuda:1", "cuda:0", "cuda:1"]):
        environment = worker_environment(config, number, 1234)
        own = resolve({}, {name: value for name, value in environment.items() if name.startswith("VQSERVE_")})
        assert (own.device, own.workers, own.rpc.port, own.rpc.host) == (device, 1, 1234, "127.0.0.2")
        assert (own.engine.max_batch_rows, own.engine.max_wait_us, own.drain_seconds) == (99, 0, 2.5)
        assert environment[WORKER_VARIABLE] == str(number)
        assert int(environment["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 4)


@pytest.mark.parametrize("devices", ["cuda:0,", "gpu", "cpu,,cpu", "cuda:x"])
def test_devices_that_are_none(run_vqserved: Callable[..., Any], devices: str) -> None:
    done = run_vqserved("serve", "--devices", devices)
    assert done.returncode == 2
    assert "must be auto, cpu, cuda or cuda:N" in done.stderr


def test_a_signal_while_workers_start(codebook: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "vqserve_server", "serve", str(codebook), "--workers", "2", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(lambda: len(children(process.pid)) == 2)
    workers = children(process.pid)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=200)
    assert out == ""
    assert process.returncode == 0
    eventually(lambda: all_gone(workers.values()))


def test_a_stop_while_a_worker_waits_to_be_started_again(vqserved: Callable[..., Any], codebook: Path) -> None:
    daemon = vqserved(codebook, "--workers", 2)
    os.kill(children(daemon.process.pid)[0], signal.SIGKILL)
    read_until(daemon.process.stderr, "worker_ended number=0 code=-9 restart_s=0.5")
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_a_worker_that_hangs_does_not_hold_up_a_stop_for_ever(vqserved: Callable[..., Any], codebook: Path) -> None:
    daemon = vqserved(codebook, "--workers", 2, "--drain-seconds", 0)
    workers = children(daemon.process.pid)
    os.kill(workers[0], signal.SIGSTOP)
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 1
    assert "workers_killed count=1" in log
    eventually(lambda: all_gone(workers.values()))


# A worker whose device never answers.
STUCK = """
import sys, threading, torch
from vqserve.codebook_info import CodebookInfo
from vqserve_server import app

class Stuck:
    device = torch.device("cpu")
    search = "none"
    probe = native_batch = None
    info = CodebookInfo(
        name="stuck", digest="", kind="vq", num_codes=2, vocab_size=2, input_dim=1, code_dim=1, output_dim=1
    )

    def encode_rows(self, rows, **_):
        print("computing", flush=True)
        threading.Event().wait()

app.Repository.load = lambda self: None
app.Repository.tokenizers = [Stuck()]
from vqserve_tools.cli import main
sys.exit(main(["serve", "--port", "0", "--drain-seconds", "4"]))
"""


def test_a_worker_whose_parent_is_gone_drains_without_a_spin() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, WORKER_VARIABLE: "0"},
    )
    with process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            target = process.stdout.readline().removeprefix("vqserved: ready on ").partition(",")[0]
            with grpc.insecure_channel(target) as channel:
                request = pb.EncodeRequest(dtype=pb.DTYPE_FLOAT32, shape=[1, 1], latents=bytes(4))
                call = channel.unary_unary("/vqserve.v1.TokenizerService/Encode").future(request.SerializeToString())
                assert process.stdout.readline() == "computing\n"
                before = cpu_seconds(process.pid)
                process.stdin.close()
                threading.Event().wait(1.5)
                assert cpu_seconds(process.pid) - before < 0.3
                assert call.exception() is not None
            assert process.wait() == 0
        finally:
            process.kill()


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
