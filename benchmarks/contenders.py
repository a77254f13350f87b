"""Servers of one cell, each started once and measured in turn: floors, ours, peers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Self

from cells import Cell
from http_load import measure_http

from vqserve_bench import ClosedLoop, Request, Schedule, measure
from vqserve_client import Client, VqserveError

HERE = Path(__file__).parent
BEFORE = "vqserve, before"
PEERS = HERE / "peers"
WARMUP_S = 0.3
# A peer with the plain search still computes for seconds after its callers have disconnected.
_MOST_LEFT_S = 30.0


class PeerFailed(RuntimeError):
    """Another project's server did not answer as it should."""


class Contender(ABC):
    """A server that answers one cell's requests."""

    name: str

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        # The peer's stderr is shown only if the peer does not start.
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def first_line(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"{self.name} did not start")
        # Whatever else it prints must not fill the pipe.
        threading.Thread(target=self._process.stdout.read, daemon=True).start()
        return line

    @abstractmethod
    def rate(self, cell: Cell, concurrency: int, seconds: float) -> float:
        """Requests a second."""

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def wait_for_idle() -> None:
    """Wait until the machine is idle, though not for ever: what one contender has left to do is not the next one's."""
    ends = time.monotonic() + _MOST_LEFT_S
    before = _idle_ticks()
    while time.monotonic() < ends:
        time.sleep(0.1)
        idle = _idle_ticks()
        if (idle - before) / os.sysconf("SC_CLK_TCK") > 0.08 * (os.cpu_count() or 1):
            return
        before = idle


def _idle_ticks() -> int:
    return int(Path("/proc/stat").read_text().split()[4])


def grpc_rate(target: str, method: str, request: bytes, concurrency: int, seconds: float, *, streams: int = 0) -> float:
    schedule = Schedule(warmup_s=WARMUP_S, window_s=seconds, max_windows=1)
    measured = measure(
        target,
        method,
        [Request(request)],
        ClosedLoop(concurrency),
        schedule=schedule,
        streams=streams,
        max_message_bytes=(1 << 31) - 1,
    )
    if measured.errors:
        raise RuntimeError(f"{method} failed: {measured.errors} {measured.error_texts}")
    return measured.requests_per_s


class Echo(Contender):
    """The floor: the same bytes there, as many back as a reply has."""

    def __init__(self, kind: str, reply_bytes: int) -> None:
        self.name = f"echo {kind}"
        super().__init__([sys.executable, str(HERE / "echo.py"), kind, str(reply_bytes)])
        self.target = f"127.0.0.1:{self.first_line().strip()}"

    def rate(self, cell: Cell, concurrency: int, seconds: float) -> float:
        return grpc_rate(self.target, "/bench.Echo/Echo", cell.request, concurrency, seconds)

    def stream_rate(self, cell: Cell, concurrency: int, seconds: float, streams: int) -> float:
        return grpc_rate(self.target, "/bench.Echo/Stream", cell.request, concurrency, seconds, streams=streams)


class Ours(Contender):
    """`vqserved serve`, for all cells: of this checkout, or of `checkout`, where `make install` has run."""

    def __init__(self, folder: Path, *flags: str, name: str = "vqserve", checkout: Path | None = None) -> None:
        self.name = name
        program = [sys.executable, "-m", "vqserve_tools"]
        if checkout is not None:
            program = [str(checkout / ".venv" / "bin" / "vqserved")]
        super().__init__([*program, "serve", str(folder), "--port", "0", *flags], {"VQSERVE_LOG_LEVEL": "error"})
        self.target = self.first_line().removeprefix("vqserved: ready on ").partition(",")[0]

    def rate(self, cell: Cell, concurrency: int, seconds: float) -> float:
        return grpc_rate(self.target, cell.method, cell.request, concurrency, seconds)

    def stream_rate(self, cell: Cell, concurrency: int, seconds: float, streams: int) -> float:
        return grpc_rate(self.target, cell.method + "Stream", cell.request, concurrency, seconds, streams=streams)

    def many_rate(self, cell: Cell, seconds: float) -> float:
        """Arrays a second of one `encode_many` or `decode_many`, as a job over a dataset has them."""
        with Client(self.target, codebook=cell.book) as client:
            arrays = repeat(cell.array)
            if cell.operation == "encode":
                answers = client.encode_many(arrays)
            else:
                answers = client.decode_many(arrays, dtype={"fp32": "float32", "bf16": "bfloat16"}[cell.dtype])
            with closing(answers):
                starts = time.perf_counter() + WARMUP_S
                while time.perf_counter() < starts:
                    next(answers)
                count, starts = 0, time.perf_counter()
                while time.perf_counter() < starts + seconds:
                    next(answers)
                    count += 1
                return count / (time.perf_counter() - starts)


class Peer(Contender):
    """A server of another project, in an environment of its own, for one cell and one kernel."""

    kind: str

    def __init__(self, folder: Path, cell: Cell, kernel: str) -> None:
        self.name = f"{self.kind}, {'our search' if kernel == 'ours' else 'plain'}"
        self.port = free_ports()
        super().__init__(
            [str(environment_of(self.kind)), str(PEERS / self.kind / "server.py")],
            {
                "PEER_KERNEL": kernel,
                "PEER_CODES": str(folder / f"{cell.book}.npy"),
                "PEER_SHAPE": ",".join(map(str, cell.shape)),
                "PEER_OPERATION": cell.operation,
                "PEER_PORT": str(self.port),
            },
        )
        self._wait(cell)

    def _wait(self, cell: Cell) -> None:
        ends = time.monotonic() + 120
        while True:
            try:
                self.rate(cell, 1, 0.1)
            except PeerFailed:
                if time.monotonic() > ends or self._process.poll() is not None:
                    self.close()
                    raise
                time.sleep(0.5)
            else:
                return


class Mosec(Peer):
    kind = "mosec"

    def rate(self, cell: Cell, concurrency: int, seconds: float) -> float:
        try:
            return measure_http(self.port, bytes(cell.given), concurrency, seconds)
        except (RuntimeError, OSError, EOFError) as error:
            raise PeerFailed(str(error)) from None


class PyTriton(Peer):
    kind = "pytriton"

    def rate(self, cell: Cell, concurrency: int, seconds: float) -> float:
        method = "/inference.GRPCInferenceService/ModelInfer"
        try:
            return grpc_rate(f"127.0.0.1:{self.port}", method, self._request(cell), concurrency, seconds)
        except (RuntimeError, VqserveError) as error:
            raise PeerFailed(str(error)) from None

    def _request(self, cell: Cell) -> bytes:
        """Triton's ModelInferRequest, made by its own client once."""
        script = (
            "import sys\nfrom tritonclient.grpc import service_pb2 as pb\n"
            "name, dtype, shape = sys.argv[1:]\n"
            "request = pb.ModelInferRequest(model_name='tokenize')\n"
            "given = request.inputs.add(name=name, datatype=dtype, shape=[int(n) for n in shape.split(',')])\n"
            "request.raw_input_contents.append(sys.stdin.buffer.read())\n"
            "sys.stdout.buffer.write(request.SerializeToString())\n"
        )
        if not hasattr(self, "_made"):
            array = cell.latents if cell.operation == "encode" else cell.indices
            name = {"encode": "latents", "decode": "indices"}[cell.operation]
            dtype = {"float32": "FP32", "uint8": "UINT8", "uint16": "UINT16"}[array.dtype.name]
            command = [str(environment_of(self.kind)), "-c", script, name, dtype, ",".join(map(str, array.shape))]
            self._made = subprocess.run(command, input=array.tobytes(), capture_output=True, check=True).stdout
        return self._made


PEER_KINDS: tuple[type[Peer], ...] = (Mosec, PyTriton)


def environment_of(kind: str) -> Path:
    """The interpreter of a peer's environment, which `make bench` makes."""
    return PEERS / kind / ".venv" / "bin" / "python"


def free_ports() -> int:
    """A port that is free, and two behind it."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
        try:
            for other in (port + 1, port + 2):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", other))
        except (OSError, OverflowError):
            continue
        return port
