"""Codebooks swapped under load on a real daemon: no request fails, every answer is right for its digest, memory stays.

`make soak` runs it for ten minutes, with a swap a second.
"""

from __future__ import annotations

import itertools
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from support.waiting import eventually
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1 import tokenizer_pb2_grpc
from vqserve_client import Client, DigestChanged
from vqserve_server.codebooks import save_codebook
from vqserve_server.quantizers import VectorQuantizer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")

# A megabyte a file, several of them in memory: what is not given back shows.
CODES, DIM, ROWS = 4096, 64, 48
MIB = 1 << 20
LATENTS = np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)
# Between two calls of one client, so that a run of ten minutes leaves the machine usable.
REST_S = 0.005


@dataclass
class Life:
    """One codebook: what it answers, and when it can have been live.

    Attributes:
        indices: of LATENTS, by brute force in float64.
        rows: what indices 0 to ROWS - 1 decode to.
        begins: before its file was there, in time.monotonic() seconds.
        ends: when another one was seen in its place.
    """

    digest: str
    indices: np.ndarray
    rows: np.ndarray
    begins: float
    ends: float = float("inf")


@dataclass
class Journal:
    """All codebooks that ever were live, by digest, and what went wrong."""

    lives: dict[str, Life] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    answers: int = 0
    jobs: int = 0
    jobs_stopped: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._by_indices: dict[bytes, str] = {}

    def add(self, life: Life) -> None:
        """Note a codebook that is about to be live."""
        self.lives[life.digest] = life
        self._by_indices[life.indices.tobytes()] = life.digest

    def fail(self, text: str) -> None:
        self.failures.append(text)

    def check(self, digest: str, asked: float, indices: np.ndarray | None, rows: np.ndarray | None = None) -> None:
        """Hold an answer against its digest."""
        life, answered = self.lives.get(digest), time.monotonic()
        if life is None or answered < life.begins or asked > life.ends:
            self.fail(f"digest {digest[:12]} was not live between {asked:.3f} and {answered:.3f}: {life}")
        elif indices is not None and not np.array_equal(indices, life.indices):
            self.fail(f"wrong indices for digest {digest[:12]}")
        elif rows is not None and not np.array_equal(rows, life.rows):
            self.fail(f"wrong latents for digest {digest[:12]}")
        with self._lock:
            self.answers += 1

    def digest_of(self, indices: np.ndarray) -> str:
        """Return whose answer this is; the SDK keeps digests to itself."""
        return self._by_indices.get(indices.tobytes(), "none")


class Swapper:
    """Replaces codebooks and knows when."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._folder = folder
        self._journal = journal
        self._seeds = itertools.count()
        self.swaps = 0
        self._latest = 1
        self._write(folder / "flat.safetensors")
        self._write(folder / "many" / "1.safetensors")

    def serve(self, daemon: Any) -> None:
        self._daemon = daemon
        self._client = Client(daemon.target)

    def swap(self) -> None:
        """Replace `flat`, and by a new version `many`; versions beyond the last two go."""
        before = self._live()
        flat = self._write(self._folder / "flat.safetensors")
        self._latest += 1
        many = self._write(self._folder / "many" / f"{self._latest}.safetensors")
        (self._folder / "many" / f"{self._latest - 2}.safetensors").unlink(missing_ok=True)
        # Not whole: never to be seen.
        whole = (self._folder / "flat.safetensors").read_bytes()
        (self._folder / "half.safetensors").write_bytes(whole[: len(whole) // 2])
        self._daemon.process.send_signal(signal.SIGHUP)
        live = eventually(lambda: self._live_if(flat=flat, many=many))
        now = time.monotonic()
        for digest in set(before.values()) - set(live.values()):
            self._journal.lives[digest].ends = now
        if "half" in live:
            self._journal.fail("a half-written file is served")
        self.swaps += 1

    def _live_if(self, **wanted: str) -> dict[str, str] | None:
        live = self._live()
        return live if wanted.items() <= live.items() else None

    def _live(self) -> dict[str, str]:
        return {info.name: info.digest for info in self._client.codebooks()}

    def _write(self, path: Path) -> str:
        path.parent.mkdir(exist_ok=True)
        quantizer = VectorQuantizer(CODES, DIM)
        codes = torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(next(self._seeds)))
        quantizer.load_state_dict({"embedding.weight": codes})
        exact = codes.double()
        # |z - a|^2 less what all share; random numbers have no near-ties that float64 could miss.
        scores = exact.square().sum(1) - 2 * torch.from_numpy(LATENTS).double() @ exact.T
        aside = path.with_name(f".{path.name}")
        digest = save_codebook(quantizer, aside)
        begins = time.monotonic()
        self._journal.add(Life(digest, scores.argmin(1).numpy().astype(np.uint16), codes[:ROWS].numpy(), begins))
        aside.replace(path)
        return digest


class Load:
    """Clients of every kind, until `stop` is set."""

    def __init__(self, target: str, journal: Journal) -> None:
        self._target = target
        self._journal = journal
        self._stop = threading.Event()

    def run(self, pool: ThreadPoolExecutor) -> None:
        for client in (self._calls, self._stream, self._sdk, self._jobs):
            pool.submit(self._guarded, client)

    def stop(self) -> None:
        self._stop.set()

    def _guarded(self, client: Callable[[], None]) -> None:
        try:
            client()
        except BaseException as error:
            self._journal.fail(f"{client.__name__}: {type(error).__name__}: {error}")

    def _going_on(self) -> Iterator[int]:
        for number in itertools.count():
            if self._stop.wait(REST_S):
                return
            yield number

    @staticmethod
    def _request(name: str) -> pb.EncodeRequest:
        return pb.EncodeRequest(codebook=name, dtype=pb.DTYPE_FLOAT32, shape=LATENTS.shape, latents=LATENTS.tobytes())

    def _calls(self) -> None:
        indices = np.arange(ROWS, dtype=np.uint16)
        decode = {
            name: pb.DecodeRequest(codebook=name, dtype=pb.DTYPE_UINT16, shape=indices.shape, indices=indices.tobytes())
            for name in ("flat", "many")
        }
        with grpc.insecure_channel(self._target) as channel:
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
            for number in self._going_on():
                name = ("flat", "many")[number % 2]
                asked = time.monotonic()
                reply = stub.Encode(self._request(name))
                self._journal.check(reply.digest, asked, np.frombuffer(reply.indices, np.uint16))
                asked = time.monotonic()
                reply = stub.Decode(decode[name])
                rows = np.frombuffer(reply.latents, np.float32).reshape(ROWS, DIM)
                self._journal.check(reply.digest, asked, None, rows)

    def _stream(self) -> None:
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with grpc.insecure_channel(self._target) as channel:
            replies = tokenizer_pb2_grpc.TokenizerServiceStub(channel).EncodeStream(iter(requests.get, None))
            for _ in self._going_on():
                asked = time.monotonic()
                requests.put(self._request("flat"))
                reply = next(replies)
                self._journal.check(reply.digest, asked, np.frombuffer(reply.indices, np.uint16))
            requests.put(None)

    def _sdk(self) -> None:
        with Client(self._target) as client:
            for number in self._going_on():
                asked = time.monotonic()
                indices = client.encode(LATENTS, codebook=("flat", "many")[number % 2])
                self._journal.check(self._journal.digest_of(indices), asked, indices)

    def _jobs(self) -> None:
        with Client(self._target, codebook="flat") as client:
            for _ in self._going_on():
                asked, whose = time.monotonic(), set()
                self._journal.jobs += 1
                try:
                    for indices in client.encode_many([LATENTS] * 40):
                        whose.add(self._journal.digest_of(indices))
                        self._journal.check(next(iter(whose)), asked, indices)
                except DigestChanged:
                    self._journal.jobs_stopped += 1
                if len(whose) > 1:
                    self._journal.fail(f"a job has answers of {len(whose)} codebooks")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def drained(daemon: Any) -> threading.Thread:
    """Read the daemon's log, which would fill its pipe."""
    thread = threading.Thread(target=lambda: [None for _ in daemon.process.stderr], daemon=True)
    thread.start()
    return thread


def soak(
    daemon_of: Callable[[Path], Any], folder: Path, until: Callable[[Swapper, Journal, float], bool], every_s: float
) -> tuple[Journal, Swapper, list[int]]:
    """Swap under load; return what happened and the daemon's memory after each swap."""
    journal = Journal()
    swapper = Swapper(folder, journal)
    daemon = daemon_of(folder)
    log = drained(daemon)
    swapper.serve(daemon)
    load = Load(daemon.target, journal)
    memory = []
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        load.run(pool)
        try:
            while not until(swapper, journal, time.monotonic() - began) and not journal.failures:
                due = time.monotonic() + every_s
                swapper.swap()
                memory.append(resident_bytes(daemon.process.pid))
                time.sleep(max(0.0, due - time.monotonic()))
        finally:
            load.stop()
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait() == 0
    log.join()
    return journal, swapper, memory


@pytest.fixture
def daemon_of(vqserved: Callable[..., Any]) -> Callable[[Path], Any]:
    return lambda folder: vqserved(folder, "--device", "cpu")


def test_no_request_fails_while_codebooks_are_swapped(
    daemon_of: Callable[[Path], Any], tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = request.config.getoption("--soak-seconds")
    # A swap a second, but in a run of seconds more than a handful.
    every_s = 1.0 if seconds >= 60 else 0.1

    def is_enough(swapper: Swapper, journal: Journal, passed_s: float) -> bool:
        return passed_s >= seconds and swapper.swaps >= 5 and journal.answers > 20 * seconds

    journal, swapper, memory = soak(daemon_of, tmp_path / "books", is_enough, every_s)
    with capsys.disabled():
        print(
            f"\n{journal.answers} answers, {swapper.swaps} swaps of two codebooks in {seconds:g} s, "
            f"{len(journal.failures)} failures; {journal.jobs} jobs, {journal.jobs_stopped} of them met a swap and "
            f"stopped; resident {memory[0] / MIB:.0f} MiB after the first swap, {memory[-1] / MIB:.0f} MiB after the "
            f"last, {max(memory) / MIB:.0f} MiB at most"
        )
    assert journal.failures == []


def test_memory_comes_back(daemon_of: Callable[[Path], Any], tmp_path: Path) -> None:
    """A codebook that is not let go of takes 5 MiB or more: 80 swaps of two of them would show as 800."""
    journal, swapper, memory = soak(daemon_of, tmp_path / "books", lambda swapper, *_: swapper.swaps >= 100, 0.0)
    assert journal.failures == []
    assert swapper.swaps == 100
    assert max(memory[-10:]) - max(memory[10:20]) < 48 * MIB
