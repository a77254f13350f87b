"""A photograph to tokens and back, through a real server: what `make demo` runs.

Starts `vqserved serve` with the bundled codebook, sends it a picture that the codebook was not trained on, and writes
the original beside what comes back. Needs no network. Exit status: 0 if all of it is as it should be, else 1.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from patches import CHANNELS, PATCH, latents_to_picture, picture_to_latents, psnr_db
from PIL import Image

import vqserve_server
from vqserve_client import Client, VqserveError
from vqserve_server import Tokenizer

ASSETS = Path(vqserve_server.__file__).parent / "assets"
OUT = Path(__file__).parents[1] / "out"
LEAST_PSNR_DB = 24.0
CORNER = (5, 12)
GAP = 8  # pixels between the two pictures
START_S = 120
STOP_S = 60
_READY = re.compile(r"vqserved: ready on (\S+), (.*)")


class DemoError(Exception):
    """Something is not as it should be; the text says what."""


@dataclass
class Server:
    """A running `vqserved serve`."""

    process: subprocess.Popen[str]
    target: str
    summary: str

    def stop(self) -> None:
        """Ask it to stop, as an operator would, and wait until it has."""
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"the server did not stop within {STOP_S} s") from None
        if status != 0:
            raise DemoError(f"the server stopped with exit code {status}, not 0")


@contextmanager
def serving(log: Path) -> Iterator[Server]:
    """Start a server on a free port, and stop it when the block ends, after an error too."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VQSERVE_")}
    command = [sys.executable, "-m", "vqserve_tools", "serve", "--port", "0"]
    with (
        log.open("w") as messages,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True, env=environment) as process,  # noqa: S603
    ):
        try:
            target, summary = wait_until_ready(process, log)
            yield Server(process, target, summary)
        finally:
            if process.poll() is None:
                process.kill()


def wait_until_ready(process: subprocess.Popen[str], log: Path) -> tuple[str, str]:
    """Return the address and the summary from the server's line on stdout."""
    impatience = threading.Timer(START_S, process.kill)
    impatience.start()
    try:
        line = process.stdout.readline() if process.stdout else ""
    finally:
        impatience.cancel()
    ready = _READY.match(line)
    if ready is None:
        raise DemoError(f"the server did not start; the end of its log: {log.read_text()[-500:].strip() or 'none'}")
    return ready[1], ready[2]


def main() -> int:
    """Run the demo; return the exit status."""
    OUT.mkdir(exist_ok=True)
    with Image.open(ASSETS / "demo.png") as picture:
        original = np.asarray(picture.convert("RGB"))
    try:
        show(original)
    except (DemoError, VqserveError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    return 0


def show(original: npt.NDArray[np.uint8]) -> None:
    """Encode the picture on a server, decode it, and print what happens."""
    height, width, _ = original.shape
    print("vqserve demo: a photograph to tokens and back, through a real server\n")
    with serving(OUT / "demo-server.log") as server:
        say("server", f"vqserved serve --port 0: ready on {server.target}, {server.summary}")
        with Client(server.target) as client:
            (codebook,) = client.codebooks()
            say("codebook", f"{codebook.name!r}: {codebook.num_codes} codes of {codebook.code_dim} numbers")
            say("", f"digest {codebook.digest[:16]}..., which a client can pin")

            latents = picture_to_latents(original)
            _, _, rows, columns = latents.shape
            say("picture", f"{width} x {height} pixels, not one that the codebook was trained with")
            say("latents", f"{columns} x {rows} patches of {PATCH} x {PATCH} pixels, {CHANNELS} numbers each")

            started = time.perf_counter()
            tokens = client.encode(latents)
            encoded = time.perf_counter()
            decoded = client.decode(tokens)
            finished = time.perf_counter()

        say("tokens", f"{tokens.size} indices, {tokens.dtype}, one for each patch; the top left corner:")
        for row in tokens[0, : CORNER[0], : CORNER[1]]:
            say("", " ".join(f"{index:5d}" for index in row) + " ...")
        encode_ms, decode_ms = 1e3 * (encoded - started), 1e3 * (finished - encoded)
        say("time", f"round trip {encode_ms + decode_ms:.1f} ms: encode {encode_ms:.1f}, decode {decode_ms:.1f}")
        server.stop()
        say("stopped", "the server, with exit code 0")

    local = Tokenizer.load(ASSETS / "demo.safetensors", device="cpu").encode(latents)
    if not np.array_equal(tokens, local):
        raise DemoError(
            f"{np.count_nonzero(tokens != local)} tokens differ from those of the Tokenizer in this process"
        )
    say("check", "the same tokens as vqserve_server.Tokenizer gives in this process")

    copy = latents_to_picture(decoded)
    psnr = psnr_db(original, copy)
    bits = math.log2(codebook.num_codes) * tokens.size / (width * height)
    say("size", f"{bits:.2f} bits per pixel instead of 24: {24 / bits:.0f} times smaller")
    say("quality", f"PSNR {psnr:.2f} dB")
    write_pair(original, copy, OUT / "demo.png")
    say("look", f"out/demo.png: the original on the left, decoded from {tokens.size} tokens on the right")
    if psnr < LEAST_PSNR_DB:
        raise DemoError(f"PSNR {psnr:.2f} dB is below {LEAST_PSNR_DB} dB")


def say(what: str, text: str) -> None:
    """Print one line of the story."""
    print(f"  {what:<9} {text}", flush=True)


def write_pair(left: npt.NDArray[np.uint8], right: npt.NDArray[np.uint8], path: Path) -> None:
    """Write two pictures of one height side by side."""
    gap = np.full((left.shape[0], GAP, 3), 255, np.uint8)
    Image.fromarray(np.concatenate([left, gap, right], axis=1)).save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
