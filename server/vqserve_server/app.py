"""The daemon put together: codebooks, engine, gRPC server, signals."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vqserve_server.codebook_path import SUFFIX
from vqserve_server.codebooks import load_codebook
from vqserve_server.config import RpcConfig, ServeConfig
from vqserve_server.engine import Engine
from vqserve_server.errors import VqserveError
from vqserve_server.rpc import RpcServer
from vqserve_server.rpc.server import address
from vqserve_server.tokenizer import Tokenizer

DEMO_NAME = "demo"
DEMO_PATH = Path(__file__).parent / "assets" / "demo.safetensors"
_NAME = re.compile(r"[\w.+-]{1,128}")

logger = logging.getLogger(__name__)


class StartError(VqserveError):
    """The daemon cannot start; the text says why, in one line."""


def find_codebooks(sources: Sequence[str]) -> dict[str, Path]:
    """Return the codebook files to serve by name, in the order given; a folder's in name order.

    Args:
        sources: paths of files or folders, or NAME=FILE; none: the demo codebook.

    Raises:
        StartError: nothing is there, a folder cannot be read, or two have one name.
    """
    found: dict[str, Path] = {}
    for name, path in _named_paths(sources):
        if not _NAME.fullmatch(name):
            raise StartError(f"{name!r} is no name for a codebook: use letters, digits and . _ + - (NAME=PATH)")
        if name in found:
            raise StartError(f"two codebooks are named {name!r}: {found[name]} and {path}; name one (NAME=PATH)")
        found[name] = path
    return found


def _named_paths(sources: Sequence[str]) -> list[tuple[str, Path]]:
    if not sources:
        return [(DEMO_NAME, DEMO_PATH)]
    pairs = []
    for source in sources:
        name, equals, path_text = source.partition("=")
        if not equals or Path(source).exists():
            name, path_text = "", source
        path = Path(path_text)
        if not path.exists():
            raise StartError(f"no such file or folder: {path}")
        if not path.is_dir():
            pairs.append((name or path.stem, path))
            continue
        if name:
            raise StartError(f"{path} is a folder: a name goes with a file")
        files = _codebook_files(path)
        if not files:
            raise StartError(f"no *{SUFFIX} file in {path}")
        pairs += [(file.stem, file) for file in files]
    return pairs


def _codebook_files(folder: Path) -> list[Path]:
    # Not glob, to which a folder that may not be read is an empty one: a mounted folder often belongs to somebody else.
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))
    except PermissionError as error:
        hint = f"{error.strerror}; let it (chmod a+rX), or serve as another user"
        raise StartError(f"user {os.geteuid()} cannot read the folder {folder}: {hint}") from None


def load_tokenizers(codebooks: dict[str, Path], config: ServeConfig) -> list[Tokenizer]:
    """Return the tokenizers, warm: each has encoded and decoded once.

    Raises:
        VqserveError: a file cannot be served.
    """
    tokenizers = []
    for name, path in codebooks.items():
        quantizer = load_codebook(path).quantizer
        tokenizer = Tokenizer(quantizer, name=name, device=config.device, search=config.search)
        tokenizer.encode_rows(np.ones((1, tokenizer.info.input_dim), np.float32))
        tokenizer.decode_rows(np.zeros(1, np.int64), output="latents")
        logger.info("codebook %s", _line(tokenizer))
        tokenizers.append(tokenizer)
    return tokenizers


def _line(tokenizer: Tokenizer) -> str:
    info = tokenizer.info
    return (
        f"{info.name}: {info.kind}, {info.num_codes} x {info.code_dim}, search {tokenizer.search} on "
        f"{tokenizer.device}, digest {info.digest[:12]}"
    )


def check_address(config: RpcConfig) -> None:
    """Find out whether the address can be listened on, before minutes go into loading codebooks.

    Raises:
        StartError: says why not.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError as error:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise StartError(f"cannot listen on {address(config.host, config.port)}: {reason}") from None


class App:
    """One server: an engine and its gRPC front. Its methods belong to one event loop."""

    def __init__(self, tokenizers: Sequence[Tokenizer], config: ServeConfig | None = None) -> None:
        """Make the server; nothing runs before `start`.

        Args:
            tokenizers: what is served.
            config: all settings.
        """
        self._config = config or ServeConfig()
        self._loop = asyncio.get_running_loop()
        self.broken = asyncio.Event()
        self.engine = Engine(
            tokenizers,
            self._config.engine,
            on_broken=self._on_broken,
        )
        self._rpc = RpcServer(self.engine, self._config.rpc)

    async def start(self) -> int:
        """Start, and return the port.

        Raises:
            StartError: the address cannot be bound.
        """
        self.engine.start()
        try:
            port = await self._rpc.start()
        except RuntimeError:
            rpc = self._config.rpc
            raise StartError(f"cannot listen on {address(rpc.host, rpc.port)}") from None
        return port

    async def stop(self) -> bool:
        """Take no more requests, answer those inside, and stop; return whether all were answered in time."""
        deadline = self._loop.time() + self._config.drain_seconds
        self._rpc.not_serving()
        self.engine.drain()
        finished = await self._rpc.stop(self._config.drain_seconds)
        left_s = max(deadline - self._loop.time(), 0.0)
        stopped = await asyncio.to_thread(self.engine.stop, left_s)
        logger.info("served %s", self.engine.stats)
        return finished and stopped

    def _on_broken(self) -> None:
        def tell() -> None:
            self._rpc.not_serving()
            self.broken.set()

        self._loop.call_soon_threadsafe(tell)


async def serve(tokenizers: Sequence[Tokenizer], config: ServeConfig) -> int:
    """Serve until a signal says to stop or the device is lost; return the exit code."""
    app = App(tokenizers, config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            # As process 1 of a container a signal's default action would be to ignore it.
            os._exit(128 + number)
        logger.info("%s: stopping", signal.Signals(number).name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    port = await app.start()
    _announce(tokenizers, config.rpc.host, port)
    done, pending = await asyncio.wait(
        [asyncio.create_task(stop.wait()), asyncio.create_task(app.broken.wait())],
        return_when=asyncio.FIRST_COMPLETED,
    )
    del done
    for task in pending:
        task.cancel()
    in_time = await app.stop()
    code = 1 if app.broken.is_set() else 0
    if not in_time:
        logger.warning("not all requests were answered within --drain-seconds %g", config.drain_seconds)
        # A thread that computes cannot be stopped, and the interpreter's own end may trip over it.
        _exit_now(code)
    return code


def run(sources: Sequence[str], config: ServeConfig) -> int:
    """Load codebooks and serve them; return the exit code.

    Raises:
        VqserveError: the daemon cannot start.
    """
    _set_up_logging(config.log_level)
    codebooks = find_codebooks(sources)
    check_address(config.rpc)
    if not _is_loopback(config.rpc.host):
        logger.warning("listening on %s without TLS or tokens: anybody who reaches it can use it", config.rpc.host)
    tokenizers = load_tokenizers(codebooks, config)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        code = runner.run(serve(tokenizers, config))
    if code:
        raise StartError("the device failed; the log has the reason")
    return code


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop; None: asyncio's own."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _announce(tokenizers: Sequence[Tokenizer], host: str, port: int) -> None:
    count = f"{len(tokenizers)} codebook{'' if len(tokenizers) == 1 else 's'}"
    devices = ", ".join(sorted({str(tokenizer.device) for tokenizer in tokenizers}))
    sys.stdout.write(f"vqserved: ready on {address(host, port)}, {count}, {devices}\n")
    sys.stdout.flush()


def _set_up_logging(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
