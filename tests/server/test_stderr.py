"""Standard error that nobody reads, or that is read late: nothing waits for it, and what was dropped is counted."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.http2 import END_STREAM, HEADERS, Peer
from support.waiting import eventually
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1 import tokenizer_pb2_grpc
from vqserve_server import event_log
from vqserve_server.stderr import BoundedStream

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe: its end to read and its end to write."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def waiting_bytes(fd: int) -> int:
    """The bytes of a pipe that were not read yet."""
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0])


def headers_frame(stream: int, fields: bytes) -> bytes:
    return struct.pack(">I", len(fields))[1:] + b"\x01\x04" + struct.pack(">I", stream) + fields


def provoke_lines(target: str, connections: int) -> None:
    """Send a status that is no number, in many calls: gRPC writes a line of its own for each connection at least."""
    host, _, port = target.rpartition(":")
    calls = b"".join(headers_frame(2 * number + 1, b"\x08\x03abc") for number in range(20))
    for _ in range(connections):
        with socket.create_connection((host, int(port))) as connection:
            connection.settimeout(5)
            connection.sendall(PREFACE + SETTINGS + calls)
            # Its answer: settings at least, before or after it has read the calls.
            connection.recv(1 << 16)


def reject_many(target: str, count: int) -> None:
    """Make requests that are not valid; at the level debug each is a line of the log."""
    with grpc.insecure_channel(target) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        for _ in range(count):
            with pytest.raises(grpc.RpcError):
                stub.Encode(pb.EncodeRequest())


@dataclass
class Server:
    """A server at the level debug, whose queue holds 16 KiB."""

    process: subprocess.Popen[str]
    target: str


@pytest.fixture
def server() -> Iterator[Server]:
    code = (
        "import sys; from vqserve_server import cli, stderr\n"
        "stderr.BoundedStream.__init__.__kwdefaults__['most_bytes'] = 1 << 14\n"
        "sys.exit(cli.main(['serve', '--port', '0', '--device', 'cpu', '--log-level', 'debug']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield Server(process, line.removeprefix("vqserved: ready on ").partition(",")[0])
    finally:
        process.kill()
        process.communicate()


def lists(target: str) -> bool:
    with grpc.insecure_channel(target) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        return len(stub.ListCodebooks(pb.ListCodebooksRequest(), timeout=60).codebooks) == 1


def test_nobody_reads(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    stream = BoundedStream(writer, "dropped {}\n".format, most_bytes=1 << 16)
    lines = [f"{number:07d} {'x' * 90}\n" for number in range(5000)]
    for line in lines:
        stream.write(line)
    assert not stream.drain(0.01)
    # Read late: in place of the missing lines there is their number. How many gaps there are depends on the threads.
    text, position, dropped = "", 0, 0
    while position < len(lines):
        text += os.read(reader, 1 << 16).decode()
        *whole, text = text.split("\n")
        for line in whole:
            if line.startswith("dropped "):
                position += int(line.removeprefix("dropped "))
                dropped += 1
            else:
                assert f"{line}\n" == lines[position]
                position += 1
    assert (position, text) == (len(lines), "")
    assert dropped
    stream.write("and on\n")
    assert stream.drain(60)
    assert os.read(reader, 1 << 16) == b"and on\n"


def test_the_notice_stands_where_lines_are_missing(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, bytes(1 << 16))
    stream = BoundedStream(writer, "dropped {}\n".format, most_bytes=20)
    for text in ("one\n", "long, and too long\n", "two\nlines, too long\n", "three\n"):
        stream.write(text)
    assert os.read(reader, 1 << 16) == bytes(1 << 16)
    assert stream.drain(60)
    assert os.read(reader, 1 << 16) == b"one\ndropped 3\nthree\n"


def test_a_text_larger_than_the_queue_is_written_whole(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    stream = BoundedStream(writer, str, most_bytes=10)
    stream.write("x" * 200_000)
    read = bytearray()
    while len(read) < 200_000:
        read += os.read(reader, 1 << 16)
    assert read == b"x" * 200_000


def test_a_reader_that_is_gone_is_no_error(pipe: tuple[int, int]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = BoundedStream(writer, str)
    stream.write("nobody\n")
    assert stream.drain(60)
    os.close(writer)


def test_lines_of_the_log_name_other_packages_only() -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        event_log.write_to(stream, "info", worker=1)
        logging.getLogger("vqserve_server.repository").info(event_log.event("codebook", of=1.5, name="a \x1b[2J=b"))
        logging.getLogger("asyncio").warning("slow")
    finally:
        root.handlers, root.level = before
    ours, others = stream.getvalue().splitlines()
    line = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO codebook of=1\.5 name="a \\x1b\[2J=b" worker=1'
    assert re.fullmatch(line, ours)
    assert others.endswith(" WARNING asyncio: slow worker=1")


def test_a_log_that_nobody_reads_stops_nothing(server: Server) -> None:
    assert server.process.stderr is not None
    # More than the pipe and the queue hold.
    reject_many(server.target, 1000)
    assert waiting_bytes(server.process.stderr.fileno()) > 60_000
    assert lists(server.target)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0


def test_what_was_dropped_is_counted_in_the_log(server: Server) -> None:
    assert server.process.stderr is not None
    reject_many(server.target, 1000)
    rejected = dropped = 0
    while rejected + dropped < 1000 or not dropped:
        line = server.process.stderr.readline()
        assert line, "the server has ended"
        rejected += " request_rejected " in line
        if found := re.fullmatch(r"\S+ \S+ WARNING log_lines_dropped count=(\d+)\n", line):
            dropped += int(found[1])
    assert rejected + dropped == 1000
    server.process.send_signal(signal.SIGTERM)
    _, log = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert " served requests=" in log


def events(log: str) -> list[list[str]]:
    """Level and name of each event, without times and numbers."""
    return [line.split()[2:4] for line in log.splitlines()]


@pytest.fixture
def undisturbed(vqserved: Callable[..., Any]) -> list[list[str]]:
    """The events of a daemon that nobody calls."""
    code, log = vqserved().stop(signal.SIGTERM)
    assert code == 0
    return events(log)


def test_a_stranger_writes_no_line(vqserved: Callable[..., Any], undisturbed: list[list[str]]) -> None:
    daemon = vqserved()
    provoke_lines(daemon.target, 50)
    assert lists(daemon.target)
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    assert events(log) == undisturbed


def test_metadata_that_is_no_text_writes_no_line(vqserved: Callable[..., Any], undisturbed: list[list[str]]) -> None:
    # grpcio would log the value, which may be somebody's access token.
    daemon = vqserved()
    peer = Peer(daemon.target)
    for number in range(20):
        peer.begin("/no.Such/Method", stream=2 * number + 1, metadata={"authorization": b"Bearer vqs_secret\xff"})
    ended = 0
    for kind, flags, _ in peer.frames():
        ended += kind == HEADERS and bool(flags & END_STREAM)
        if ended == 20:
            break
    peer.close()
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    assert events(log) == undisturbed


def test_lines_of_grpc_that_nobody_reads_stop_nothing(vqserved: Callable[..., Any]) -> None:
    daemon = vqserved(GRPC_VERBOSITY="DEBUG", GRPC_TRACE="http")
    fd = daemon.process.stderr.fileno()

    def is_full() -> bool:
        provoke_lines(daemon.target, 20)
        return waiting_bytes(fd) > 60_000

    eventually(is_full)
    provoke_lines(daemon.target, 50)
    assert lists(daemon.target)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(timeout=60) == 0


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_leaves_a_traceback(vqserved: Callable[..., Any], number: signal.Signals) -> None:
    code, log = vqserved().stop(number)
    assert code == -number
    assert "Fatal Python error: " in log
    assert "most recent call first" in log


def test_a_crash_needs_no_reader(server: Server) -> None:
    reject_many(server.target, 1000)
    server.process.send_signal(signal.SIGSEGV)
    assert server.process.wait(timeout=60) == -signal.SIGSEGV


def test_an_error_at_the_start_is_read_to_its_end(run_vqserved: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "book.safetensors"
    path.write_bytes(b"half")
    done = run_vqserved("serve", path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"vqserved: error: {path}: ")
    assert done.stderr.count("\n") == 1


def test_the_pipe_of_the_parent_still_waits(pipe: tuple[int, int]) -> None:
    """The flag is one of an open file, and other processes may have it open too."""
    _, writer = pipe
    code = (
        "import os, sys\n"
        "from vqserve_server import event_log\n"
        "event_log.set_up('info')\n"
        "print(os.get_blocking(2), os.isatty(2), sys.stderr.fileno())"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writer, text=True, check=True)
    assert done.stdout == "False False 2\n"
    assert os.get_blocking(writer)


def test_a_file_and_a_socket_do(tmp_path: Path) -> None:
    code = (
        "import logging, os, sys, warnings\n"
        "from vqserve_server import event_log\n"
        "event_log.set_up('info')\n"
        "logging.warning('logged'); os.write(2, b'native\\n'); warnings.warn('warned'); sys.stderr.write('last\\n')\n"
    )
    path = tmp_path / "log"
    path.write_text("before\n")
    with path.open("a") as file:
        subprocess.run([sys.executable, "-c", code], stderr=file, check=True)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
        theirs.close()
        received = b"".join(iter(lambda: ours.recv(1 << 16), b"")).decode()
    for text in (path.read_text().removeprefix("before\n"), received):
        lines = text.splitlines()
        # Native code does not wait for the queue.
        lines.remove("native")
        assert lines[0].endswith(" WARNING root: logged")
        assert lines[1].endswith(" UserWarning: warned")
        assert lines[-1] == "last"
    assert path.read_text().startswith("before\n")


def test_a_terminal_gets_the_log(vqserved: Callable[..., Any]) -> None:
    import pty  # noqa: PLC0415

    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vqserve_server", "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=child,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.terminate()
        assert process.wait(timeout=60) == 0
        assert b" served requests=0 " in os.read(parent, 1 << 16)
        assert os.get_blocking(child)
    finally:
        process.kill()
        process.wait()
        os.close(parent)
        os.close(child)


def test_a_signal_handler_may_log_while_its_thread_logs() -> None:
    path = Path(os.devnull)
    with path.open("w") as file:
        stream = BoundedStream(file.fileno(), str)
        handled: list[int] = []

        def handle(number: int, _: object) -> None:
            stream.write("from the handler\n")
            handled.append(number)

        before = signal.signal(signal.SIGUSR1, handle)
        ended = threading.Event()

        def interrupt() -> None:
            while not ended.wait(0.0005):
                os.kill(os.getpid(), signal.SIGUSR1)

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            while len(handled) < 100:
                stream.write("from the thread\n")
        finally:
            ended.set()
            thread.join()
            signal.signal(signal.SIGUSR1, before)
        assert stream.drain(60)
