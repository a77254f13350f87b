"""What a server that lies can do to the SDK."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from reliability.figure import Figure
from reliability.messages import MIB
from reliability.registry import scenario
from reliability.setup import Setup
from vqserve.v1 import tokenizer_pb2 as pb

_TEXT_BYTES = 50 * 1000 * 1000
_ZEROS_BYTES = 60 * MIB
_TIMEOUT_S = 1.0
# The call's own second, and what it takes to receive and drop such a reply.
_MOST_S = 2.5
_MOST_CHARACTERS = 4000
_CLIENT = """
import json, sys, time
import numpy as np
from vqserve_client import Client
target, name, timeout = sys.argv[1], sys.argv[2] or None, float(sys.argv[3])
client = Client(target, codebook=name, timeout=timeout, retries=0, max_message_bytes=128 << 20)
print("begin", flush=True)
began = time.monotonic()
try:
    client.encode(np.zeros((4, 4), np.float32))
    text = ""
except KeyboardInterrupt:
    text = "KeyboardInterrupt"
except Exception as error:
    text = f"{type(error).__name__}: {error}"
print(json.dumps({"seconds": time.monotonic() - began, "characters": len(text), "printable": text.isprintable()}))
"""


def _book(**changes: Any) -> pb.CodebookInfo:
    fields = {"name": "book", "digest": "0" * 64, "kind": "vq", "num_codes": 16, "vocab_size": 16}
    widths = {"input_dim": 4, "code_dim": 4, "output_dim": 4, "num_quantizers": 1}
    return pb.CodebookInfo(**{**fields, **widths, **changes})


class _Liar:
    """A server with one codebook, whose replies to Encode are given."""

    def __init__(self, book: pb.CodebookInfo, reply: bytes, *, details: str = "") -> None:
        def answer(_request: bytes, context: grpc.ServicerContext) -> bytes:
            if details:
                context.abort(grpc.StatusCode.INTERNAL, details)
            return reply

        listed = pb.ListCodebooksResponse(codebooks=[book]).SerializeToString()
        methods = {
            "ListCodebooks": grpc.unary_unary_rpc_method_handler(lambda _request, _context: listed),
            "Encode": grpc.unary_unary_rpc_method_handler(answer),
        }
        self._server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_send_message_length", -1)])
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("vqserve.v1.TokenizerService", methods),)
        )
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def __enter__(self) -> _Liar:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None)


@scenario("lying-server", "a server that lies costs the SDK neither time nor a terminal", seconds=1)
def lying_server(setup: Setup) -> Iterator[Figure]:
    zeros = bytes(_ZEROS_BYTES)
    cases: dict[str, Callable[[], _Liar]] = {
        "a name of 50 MB": lambda: _Liar(_book(name="n" * _TEXT_BYTES), b""),
        "a kind of 50 MB": lambda: _Liar(_book(kind="k" * _TEXT_BYTES), b""),
        "escapes in a name": lambda: _Liar(_book(name="\x1b[2J\x1b]0;owned\x07\n" * 50), b""),
        "a status text of escapes": lambda: _Liar(_book(), b"", details="\x1b[2J\x9b31m\n" * 200),
        "a reply of 60 MiB of zeros": lambda: _Liar(_book(), zeros),
        "a reply of 60 MiB of unknown fields": lambda: _Liar(_book(), b"\x78\x01" * (_ZEROS_BYTES // 2)),
    }
    for case, make in cases.items():
        if not setup.wants(case):
            continue
        with make() as liar:
            seen = _call(liar.target, _TIMEOUT_S)
            yield Figure(what=f"{case}: timeout=1 returned after, s", value=seen["seconds"], at_most=_MOST_S)
            yield Figure(what=f"{case}: characters of the error", value=seen["characters"], at_most=_MOST_CHARACTERS)
            yield Figure(what=f"{case}: the error is printable", value=str(seen["printable"]), wanted="True")
            yield from _listed(case, liar.target)
            ended_s = _interrupted(liar.target)
            yield Figure(what=f"{case}: Ctrl-C returned after, s", value=ended_s, at_most=_MOST_S)


def _call(target: str, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-c", _CLIENT, target, "", str(timeout_s)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _listed(case: str, target: str) -> Iterator[Figure]:
    """Return what `vqserve codebooks` writes."""
    command = [sys.executable, "-m", "vqserve_client", "codebooks", "--target", target]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=120)
    written = done.stdout + done.stderr
    yield Figure(
        what=f"{case}: characters that `vqserve codebooks` writes", value=len(written), at_most=_MOST_CHARACTERS
    )
    printable = str(written.replace("\n", "").isprintable())
    yield Figure(what=f"{case}: they are printable", value=printable, wanted="True")


def _interrupted(target: str) -> float:
    """Return how long Ctrl-C takes, half a second after the call began; 0 where the call had ended before."""
    command = [sys.executable, "-c", _CLIENT, target, "", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        if process.poll() is not None:
            return 0.0
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        process.wait(120)
        return time.monotonic() - began
