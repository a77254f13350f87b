"""How many Python calls of ours one small encode takes, on the server and in the client: `benchmarks/walk.py`.

Fewer calls mean a request path that a reader can follow and that costs less. The server runs in a process of its own
with a profiler on every thread; the client is profiled in this one. Only functions of this project's packages count. A
call is the call of a function with a name; the column "events" also counts lambdas, comprehensions, and generators and
coroutines that are resumed. An object counts when the constructor of one of our classes runs. Threads differ a little
from run to run, so every walk is recorded several times, and the one of median length is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import numpy as np

PACKAGES = ("vqserve", "vqserve_client", "vqserve_server", "vqserve_tools")
# A request's last calls come after its reply: the recorder waits until none has come for this long.
QUIET_S = 0.3
WARMUP = 5
RECORDINGS = 7
_RESUMABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@dataclass(frozen=True)
class Step:
    """One call of a function of ours.

    Attributes:
        thread: name of the thread.
        depth: how many functions of ours are on the stack below it.
        file: path below the source root.
        function: qualified name.
        resumed: whether a generator or coroutine goes on, rather than begins.
        created: the class of the object that this call constructs; empty for other calls.
    """

    thread: str
    depth: int
    file: str
    function: str
    resumed: bool = False
    created: str = ""

    @property
    def is_call(self) -> bool:
        """Whether a function with a name begins."""
        return not self.resumed and (bool(self.created) or not self.function.endswith(">"))


class Recorder:
    """A profile function that collects steps while it is switched on."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.recording = False
        self._last = 0.0

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        if not self.recording or event != "call":
            return
        step = _step(frame)
        if step is not None:
            self.steps.append(step)
            self._last = time.monotonic()

    def install(self) -> None:
        """Profile this thread and all that start from now on."""
        threading.setprofile(self)
        sys.setprofile(self)

    def start(self) -> None:
        self.steps = []
        self._last = time.monotonic()
        self.recording = True

    def record(self, work: Callable[[], object]) -> list[Step]:
        self.start()
        work()
        return self.stop()

    def stop(self) -> list[Step]:
        """Stop when the steps have ceased, and return them."""
        while (left_s := self._last + QUIET_S - time.monotonic()) > 0:
            time.sleep(left_s)
        self.recording = False
        return self.steps


def _package(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def _step(frame: FrameType) -> Step | None:
    code = frame.f_code
    thread = threading.current_thread().name
    if code.co_filename == "<string>":
        # What dataclasses and NamedTuple generate.
        owner = frame.f_locals.get("self") if code.co_name == "__init__" else frame.f_locals.get("_cls")
        kind = owner if isinstance(owner, type) else type(owner)
        if owner is None or not _package(kind.__module__):
            return None
        return Step(
            thread, _depth(frame), _file(kind.__module__), f"{kind.__name__}.{code.co_name}", False, kind.__name__
        )
    if not _package(frame.f_globals.get("__name__", "")):
        return None
    resumed = bool(code.co_flags & _RESUMABLE) and code.co_code[frame.f_lasti + 1] & 3 != 0
    created = ""
    if code.co_name == "__init__":
        created = type(frame.f_locals["self"]).__name__
    return Step(thread, _depth(frame), _file(frame.f_globals["__name__"]), code.co_qualname, resumed, created)


def _file(module: str) -> str:
    path = Path(sys.modules[module].__file__ or module)
    return str(
        path.relative_to(next(parent for parent in path.parents if parent.name == module.partition(".")[0]).parent)
    )


def _depth(frame: FrameType) -> int:
    depth, outer = 0, frame.f_back
    while outer is not None:
        depth += _package(outer.f_globals.get("__name__", ""))
        outer = outer.f_back
    return depth


def serve() -> int:
    """Run `vqserved serve` on a free port, and record what the parent asks for by lines on stdin."""
    recorder = Recorder()
    recorder.install()
    from vqserve_server.cli import main

    def control() -> None:
        for line in sys.stdin:
            if line.strip() == "start":
                recorder.start()
                print("started", flush=True)
            elif line.strip() == "stop":
                print(json.dumps([asdict(step) for step in recorder.stop()]), flush=True)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=control, name="control", daemon=True).start()
    return main(["serve", "--port", "0"])


class Server:
    """The server process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.target = self._line().split()[3].rstrip(",")

    def record(self, work: Callable[[], object]) -> list[Step]:
        self._say("start")
        self._line()
        work()
        self._say("stop")
        return [Step(**fields) for fields in json.loads(self._line())]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the server ended")
        return line


def walks() -> dict[str, list[Step]]:
    """Record one small encode on the server and in both clients, each after some like it."""
    from vqserve_client import Client

    found: dict[str, list[Step]] = {}
    recorder = Recorder()
    server = Server()
    try:
        with Client(server.target) as client:
            info = client.codebooks()[0]
            latents = np.zeros((1, info.input_dim, 4, 4), np.float32)
            indices = client.encode(latents)
            for _ in range(WARMUP):
                client.encode(latents)
            found["server: Encode"] = median([server.record(lambda: client.encode(latents)) for _ in range(RECORDINGS)])
            recorder.install()
            found["Client.encode"] = median(
                [recorder.record(lambda: client.encode(latents)) for _ in range(RECORDINGS)]
            )
            found["Client.decode"] = median(
                [recorder.record(lambda: client.decode(indices)) for _ in range(RECORDINGS)]
            )
        found["AsyncClient.encode"] = asyncio.run(awaited(server.target, recorder, latents))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        server.close()
    return found


async def awaited(target: str, recorder: Recorder, latents: np.ndarray) -> list[Step]:
    from vqserve_client import AsyncClient

    recordings = []
    async with AsyncClient(target) as client:
        for _ in range(WARMUP):
            await client.encode(latents)
        for _ in range(RECORDINGS):
            recorder.start()
            await client.encode(latents)
            recordings.append(recorder.stop())
    return median(recordings)


def median(recordings: list[list[Step]]) -> list[Step]:
    return sorted(recordings, key=len)[len(recordings) // 2]


def table(found: dict[str, list[Step]]) -> str:
    heads = ("walk", "calls", "events", "functions", "files", "objects", "threads")
    rows = [heads]
    for name, steps in found.items():
        rows.append(
            (
                name,
                str(sum(step.is_call for step in steps)),
                str(len(steps)),
                str(len({(step.file, step.function) for step in steps if step.is_call})),
                str(len({step.file for step in steps})),
                str(sum(bool(step.created) for step in steps)),
                str(len({step.thread for step in steps})),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def sequence(steps: list[Step]) -> str:
    lines = []
    for step in steps:
        notes = " (resumed)" if step.resumed else f" (new {step.created})" if step.created else ""
        lines.append(f"  {step.thread:<16.16} {'  ' * step.depth}{step.file}:{step.function}{notes}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print every call in order")
    parser.add_argument("--only", metavar="TEXT", help="the walks whose name contains this")
    parser.add_argument("--json", action="store_true", help="print the walks as JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    found = {name: steps for name, steps in walks().items() if args.only is None or args.only in name}
    if args.json:
        print(json.dumps({name: [asdict(step) for step in steps] for name, steps in found.items()}, indent=1))
        return 0
    print(table(found))
    if args.list:
        for name, steps in found.items():
            print(f"\n{name}\n{sequence(steps)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
