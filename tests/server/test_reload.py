"""SIGHUP to a real daemon: what it serves afterwards, what it says, and what it survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import daemon_environment
from support.waiting import eventually, read_until
from vqserve_client import Client, CodebookNotFound
from vqserve_client.channel import Connection
from vqserve_client.config import ClientConfig
from vqserve_client.health import SERVING, status

LATENTS = np.random.default_rng(0).standard_normal((64, 4), dtype=np.float32)
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")


def check(target: str, **books: Any) -> None:
    """The server has these codebooks, no others, and answers with each as it does in process."""
    with Client(target) as client:
        assert {info.name: info.digest for info in client.codebooks()} == {
            name.replace("_v", "@"): book.digest for name, book in books.items()
        }
        for name, book in books.items():
            indices = client.encode(LATENTS, codebook=name.replace("_v", "@"))
            np.testing.assert_array_equal(indices, book.encode(LATENTS))
            decoded = client.decode(indices, codebook=name.replace("_v", "@"))
            np.testing.assert_array_equal(decoded, book.decode(indices))


def lines_with(lines: list[str], text: str) -> list[str]:
    return [line.rstrip("\n") for line in lines if text in line]


def test_a_folder_is_rescanned_on_sighup(vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path) -> None:
    flat, one = put(tmp_path / "flat.safetensors"), put(tmp_path / "book" / "1.safetensors", seed=1)
    daemon = vqserved(tmp_path, "--device", "cpu")
    assert daemon.ready_line.endswith(", 2 codebooks, cpu\n")
    check(daemon.target, flat=flat, book=one, book_v1=one)

    two, flat = put(tmp_path / "book" / "2.safetensors", seed=2), put(tmp_path / "flat.safetensors", seed=3, dim=4)
    # Nothing before the signal.
    with Client(daemon.target) as client:
        assert [info.name for info in client.codebooks()] == ["book", "book@1", "flat"]
    lines = daemon.rescan()
    check(daemon.target, flat=flat, book=two, book_v1=one, book_v2=two)
    assert "loaded=2 unchanged=1 removed=0 rejected=0 skipped=0" in lines_with(lines, "reload_done ")[0]
    for name, book in (("flat", flat), ("book@2", two)):
        assert lines_with(lines, f"codebook_loaded name={name} ")[-1].endswith(
            f"search={book.search} device=cpu digest={book.digest[:12]}"
        )

    (tmp_path / "book" / "2.safetensors").unlink()
    (tmp_path / "flat.safetensors").unlink()
    lines = daemon.rescan()
    check(daemon.target, book=one, book_v1=one)
    assert len(lines_with(lines, "codebook_removed ")) == 2
    with Client(daemon.target) as client, pytest.raises(CodebookNotFound, match="'flat'"):
        client.encode(LATENTS, codebook="flat")

    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    assert "Traceback" not in log


def test_a_half_written_file_is_never_served(
    vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "book.safetensors"
    put(path, seed=1)
    content = path.read_bytes()
    old = put(path)
    daemon = vqserved(tmp_path, "--device", "cpu")
    # As `cp` does: the same file, cut to nothing, growing.
    with path.open("wb") as file:
        for start in range(0, len(content), len(content) // 3):
            lines = daemon.rescan()
            [warning] = lines_with(lines, "WARNING")
            assert f"codebook_rejected name=book path={path} kept={old.digest[:12]} error=" in warning
            check(daemon.target, book=old)
            file.write(content[start : start + len(content) // 3])
            file.flush()
    lines = daemon.rescan()
    assert not lines_with(lines, "WARNING")
    with Client(daemon.target) as client:
        assert client.codebooks()[0].digest != old.digest
    connection = Connection(ClientConfig(target=daemon.target))
    assert status(connection, timeout_s=60) == SERVING
    connection.close()


def test_a_name_out_of_the_folder_is_no_codebook(
    vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path
) -> None:
    put(tmp_path / "secret.safetensors", seed=1)
    inside = put(tmp_path / "books" / "book" / "1.safetensors")
    daemon = vqserved(tmp_path / "books", "--device", "cpu")
    check(daemon.target, book=inside, book_v1=inside)
    with Client(daemon.target) as client:
        for name in ("../secret", "book@../../secret", "book/1", "./book", str(tmp_path / "secret")):
            with pytest.raises(CodebookNotFound):
                client.encode(LATENTS, codebook=name)


def relabel(link: Path, target: str) -> None:
    """As `ln -sfn` does it: the link is never missing."""
    subprocess.run(["ln", "-sfn", target, str(link)], check=True)


def test_a_label_moves_in_one_step(vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path) -> None:
    one, two = (put(tmp_path / "book" / f"{number}.safetensors", seed=number) for number in (1, 2))
    link = tmp_path / "book" / "stable.safetensors"
    relabel(link, "1.safetensors")
    daemon = vqserved(tmp_path, "--device", "cpu")
    check(daemon.target, book=two, book_vstable=one, book_v1=one, book_v2=two)
    with Client(daemon.target) as client:
        means = {info.name: info.version for info in client.codebooks()}
    assert means == {"book": 2, "book@stable": 1, "book@1": 1, "book@2": 2}

    relabel(link, "2.safetensors")
    lines = daemon.rescan()
    check(daemon.target, book=two, book_vstable=two, book_v1=one, book_v2=two)
    assert lines_with(lines, "codebook_label ")[0].endswith("name=book@stable now=book@2 was=book@1")
    assert "loaded=0 unchanged=2 removed=0 rejected=0 skipped=0" in lines_with(lines, "reload_done ")[0]

    # A link that leads nowhere moves nothing.
    relabel(link, "3.safetensors")
    lines = daemon.rescan()
    check(daemon.target, book=two, book_vstable=two, book_v1=one, book_v2=two)
    assert f"{link} is a label" in lines_with(lines, "codebook_skipped ")[0]
    assert not lines_with(lines, "codebook_label ")

    link.unlink()
    lines = daemon.rescan()
    check(daemon.target, book=two, book_v1=one, book_v2=two)
    assert lines_with(lines, "codebook_label ")[0].endswith("name=book@stable now=nothing was=book@2")


def test_a_label_of_a_version_that_was_removed_is_removed(
    vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path
) -> None:
    two = put(tmp_path / "book" / "2.safetensors", seed=2)
    put(tmp_path / "book" / "1.safetensors")
    relabel(tmp_path / "book" / "stable.safetensors", "1.safetensors")
    daemon = vqserved(tmp_path, "--device", "cpu")
    (tmp_path / "book" / "1.safetensors").unlink()
    lines = daemon.rescan()
    check(daemon.target, book=two, book_v2=two)
    assert lines_with(lines, "codebook_label ")[0].endswith("name=book@stable now=nothing was=book@1")


@pytest.mark.parametrize("link", ["book.safetensors", "book/1.safetensors", "book"])
def test_a_link_out_of_the_folder_keeps_the_daemon_from_starting(
    run_vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path, link: str
) -> None:
    put(tmp_path / "elsewhere" / "1.safetensors")
    path = tmp_path / "books" / link
    path.parent.mkdir(parents=True)
    target = tmp_path / "elsewhere"
    path.symlink_to(target if link == "book" else target / "1.safetensors")
    done = run_vqserved("serve", tmp_path / "books", "--port", 0)
    text = f"{path} is a link to outside its folder: replace it by the file, or name the file (NAME=PATH)"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"vqserved: error: {text}\n")


def test_many_signals_at_once(vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path) -> None:
    """Whatever the number, the last state of the folder is served in the end."""
    put(tmp_path / "book.safetensors")
    daemon = vqserved(tmp_path, "--device", "cpu")
    for seed in range(1, 30):
        last = put(tmp_path / "book.safetensors", seed=seed)
        daemon.process.send_signal(signal.SIGHUP)
    with Client(daemon.target) as client:
        eventually(lambda: client.codebooks()[0].digest == last.digest)
    check(daemon.target, book=last)
    assert daemon.stop(signal.SIGTERM)[0] == 0


def keeps_sighup(pid: int) -> bool:
    """It blocks SIGHUP alone: for a moment, a thread that starts another blocks every signal."""
    fields = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    return int(fields["SigBlk"], 16) == 1 << (signal.SIGHUP - 1)


def test_nothing_that_starts_threads_is_imported_before_the_signal_is_kept() -> None:
    code = "import sys, vqserve_server.cli; print(sorted({'numpy', 'torch', 'grpc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout == "[]\n"


def test_a_signal_between_the_loop_and_the_end_is_ignored() -> None:
    code = (
        "import asyncio, signal; from vqserve_server import signals\n"
        "loop = asyncio.new_event_loop(); signals.on_sighup(loop, print); loop.close()\n"
        "signal.raise_signal(signal.SIGHUP); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert (done.stdout, done.stderr) == ("alive\n", "")


@ON_LINUX
def test_a_signal_while_it_starts_is_not_lost(put: Callable[..., Any], tmp_path: Path) -> None:
    put(tmp_path / "book.safetensors")
    process = subprocess.Popen(
        [sys.executable, "-m", "vqserve_server", "serve", str(tmp_path), "--port", "0"],
        stdout=subprocess.PIPE,
        env=daemon_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(lambda: keeps_sighup(process.pid))
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("vqserved: ready on ")
        read_until(process.stderr, " reload_done ")
    finally:
        process.terminate()
        process.communicate()
    assert process.returncode == 0


@ON_LINUX
def test_the_parent_passes_it_on_to_its_workers(
    vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path
) -> None:
    put(tmp_path / "book.safetensors")
    daemon = vqserved(tmp_path, "--device", "cpu", "--workers", 2)
    for seed in (1, 2):
        book = put(tmp_path / "book.safetensors", seed=seed)
        lines = daemon.rescan(workers=2)
        assert {line.partition(" worker=")[2][:1] for line in lines_with(lines, "reload_done ")} == {"0", "1"}
        for _ in range(8):
            check(daemon.target, book=book)
    assert daemon.stop(signal.SIGTERM)[0] == 0


@ON_LINUX
def test_a_worker_that_starts_meanwhile_reloads_when_it_is_ready(
    vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path
) -> None:
    put(tmp_path / "book.safetensors")
    daemon = vqserved(tmp_path, "--device", "cpu", "--workers", 2)

    def workers() -> set[int]:
        children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text()
        return {int(pid) for pid in children.split()}

    before = workers()
    os.kill(min(before), signal.SIGKILL)
    started = eventually(lambda: workers() - before)
    # It has just begun: the signal itself would end it.
    book = put(tmp_path / "book.safetensors", seed=1)
    lines = daemon.rescan(workers=2)
    assert {line.partition(" worker=")[2][:1] for line in lines_with(lines, "reload_done ")} == {"0", "1"}
    assert workers() & started == started
    for _ in range(8):
        check(daemon.target, book=book)
    assert daemon.stop(signal.SIGTERM)[0] == 0


@ON_LINUX
def test_a_signal_while_it_fails_to_start_does_not_swallow_the_reason(tmp_path: Path) -> None:
    (tmp_path / "book.safetensors").write_bytes(b"half")
    process = subprocess.Popen(
        [sys.executable, "-m", "vqserve_server", "serve", str(tmp_path), "--port", "0"],
        stdout=subprocess.PIPE,
        env=daemon_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(lambda: keeps_sighup(process.pid))
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.startswith(f"vqserved: error: {tmp_path / 'book.safetensors'}: the codebook cannot be used")
