"""The start of `vqserved serve`: signals at any moment, also to process 1 of a container, and what the log says."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import daemon_environment
from support.waiting import eventually
from vqserve_server.codebooks import save_codebook
from vqserve_server.quantizers import VectorQuantizer
from vqserve_server.repository import Repository
from vqserve_server.search import why_slower
from vqserve_server.search.native import library

SERVE = ("-m", "vqserve_tools", "serve", "--port", "0", "--device", "cpu")
# Process 1 of a new process namespace: the kernel discards signals that it does not handle.
AS_PROCESS_1 = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")


def can_unshare() -> bool:
    try:
        return subprocess.run([*AS_PROCESS_1, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


IN_NAMESPACE = pytest.mark.skipif(not can_unshare(), reason="this user may not make process namespaces")


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a command, and end it after the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(*command: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=daemon_environment()
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def handles(pid: int, number: int) -> bool:
    fields = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    return bool(int(fields["SigCgt"], 16) >> (number - 1) & 1)


def end_at(
    start: Callable[..., subprocess.Popen[bytes]], seconds: float, *arguments: str, as_process_1: bool, number: int
) -> int:
    """Start a server, send it a signal after some seconds, and return its exit code."""
    if not as_process_1:
        process = start(sys.executable, *SERVE, *arguments)
        threading.Event().wait(seconds)
        process.send_signal(number)
        return process.wait(timeout=60)
    process = start(*AS_PROCESS_1, sys.executable, *SERVE, *arguments)
    [server] = eventually(lambda: children(process.pid))
    # The interpreter takes a moment before its first line of Python: the handler of SIGTERM is the first that it sets.
    eventually(lambda: handles(server, signal.SIGTERM))
    threading.Event().wait(seconds)
    os.kill(server, number)
    return process.wait(timeout=60)


@IN_NAMESPACE
@pytest.mark.parametrize("workers", ["1", "2"])
def test_process_1_ends_at_a_sigterm_that_comes_as_soon_as_it_can(start: Any, workers: str) -> None:
    assert end_at(start, 0, "--workers", workers, as_process_1=True, number=signal.SIGTERM) == 128 + signal.SIGTERM


@pytest.mark.parametrize("package", ["vqserve_server", "vqserve_tools"])
def test_the_handler_of_process_1_is_there_before_anything_large(package: str) -> None:
    code = (
        "import os, runpy, signal, sys\n"
        "os.getpid = lambda: 1\n"
        "def report(*_):\n"
        "    large = {'asyncio', 'logging', 'argparse', 'numpy', 'torch', 'grpc'}\n"
        "    print(sorted(large & set(sys.modules))); sys.stdout.flush(); os._exit(0)\n"
        "signal.signal = report\n"
        f"runpy.run_module('{package}', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_an_interrupt_is_not_lost_where_exceptions_are() -> None:
    code = (
        "import os, signal\n"
        "from vqserve_server import signals\n"
        "signals.end_at_signals()\n"
        "class Last:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "Last()\n"
        "print('lost', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("number", "as_process_1"),
    [
        (signal.SIGTERM, False),
        pytest.param(signal.SIGTERM, True, marks=IN_NAMESPACE),
        pytest.param(signal.SIGINT, True, marks=IN_NAMESPACE),
    ],
)
def test_a_signal_at_any_moment_of_the_start_ends_it(
    start: Any, workers: str, number: signal.Signals, *, as_process_1: bool
) -> None:
    for tenths in range(0, 31, 2):
        code = end_at(start, tenths / 10, "--workers", workers, as_process_1=as_process_1, number=number)
        # Before it serves, the signal is the reason of its end; later it is asked to stop.
        assert code in {0, 128 + number, -number}, f"after {tenths / 10} s"


def test_it_is_said_why_auto_chose_the_cpu(vqserved: Callable[..., Any], tmp_path: Path) -> None:
    save_codebook(VectorQuantizer(16, 4), tmp_path / "book.safetensors")
    _, log = vqserved(tmp_path, CUDA_VISIBLE_DEVICES="").stop(signal.SIGTERM)
    [line] = [line for line in log.splitlines() if "device_chosen" in line]
    assert ' INFO device_chosen device=cpu reason="' in line
    _, log = vqserved(tmp_path, "--device", "cpu").stop(signal.SIGTERM)
    assert "device_chosen" not in log


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """Look for the compiled search again, in the test and after it."""
    found = library.why_unusable, library.levels, library.load
    for each in found:
        each.cache_clear()
    yield
    for each in found:
        each.cache_clear()


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_a_search_that_is_not_compiled_is_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fresh_library: None,
    content: bytes | None,
) -> None:
    caplog.set_level(logging.INFO)
    for name in ("one", "two"):
        save_codebook(VectorQuantizer(16, 4), tmp_path / f"{name}.safetensors")
    path = tmp_path / "libsearch.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(library, "_PATH", path)
    Repository([str(tmp_path)], device="cpu").load()
    texts = [record.getMessage() for record in caplog.records]
    reason = "this installation has no compiled search" if content is None else "the compiled search cannot be loaded: "
    [warning] = [text for text in texts if text.startswith("search_not_compiled ")]
    assert f'reason="{reason}' in warning
    loaded = [text for text in texts if text.startswith("codebook_loaded ")]
    assert len(loaded) == 2
    assert all(" search=torch " in text and f'slower_because="{reason}' in text for text in loaded)


def test_a_codebook_that_the_faster_search_does_not_take_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    save_codebook(VectorQuantizer(16, 4).double(), tmp_path / "wide.safetensors")
    save_codebook(VectorQuantizer(16, 4), tmp_path / "usual.safetensors")
    Repository([str(tmp_path)], device="cpu").load()
    usual, wide = (text for text in map(logging.LogRecord.getMessage, caplog.records) if "codebook_loaded" in text)
    assert "slower_because" not in usual
    assert 'slower_because="the compiled search takes float32 codebooks' in wide
    caplog.clear()
    # Whoever asks for a search has it.
    Repository([str(tmp_path)], device="cpu", search="reference").load()
    assert "slower_because" not in caplog.text


def test_a_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    none = "this installation has no compiled kernels"
    monkeypatch.setattr("vqserve_server.search.cuda.cubins.FOLDER", Path("no-such-folder"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_slower("torch", cuda) == f"{none}, and Triton is not installed: `pip install triton`"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert why_slower("torch", cuda) == f"{none}, and Triton finds no C compiler: install gcc or clang, or set CC"
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/cc")
    assert "float32" in str(why_slower("torch", cuda))
    assert why_slower("triton", cuda) is None
    assert why_slower("none", cuda) is None
