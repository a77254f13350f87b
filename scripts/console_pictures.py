"""Makes the pictures of the console in docs/assets: `make console-pictures` (needs Chromium; takes some minutes).

Trains three codebooks, starts a server with two workers, and lets clients call it: `faces` and `speech` (four stages)
with latents like those of their training, `textures` with others.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from vqserve_client import Client, VqserveError
from vqserve_server.codebooks import load_codebook, save_codebook
from vqserve_server.quantizers import ResidualQuantizer
from vqserve_tools.cli import main as vqserved

_OUT = Path(__file__).resolve().parents[1] / "docs" / "assets"
_DIM, _CODES, _STAGES, _STAGE_CODES = 8, 1024, 4, 256
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
_QUICK = ("--init", "sample", "--steps", 40, "--quiet")
_READY = re.compile(r"vqserved: ready on ([^,]+),")
_WIDE, _NARROW = {"width": 1240, "height": 1120}, {"width": 390, "height": 1500}

Latents = npt.NDArray[np.float32]
Draw = Callable[[np.random.Generator, int], Latents]


@dataclass(frozen=True)
class _Job:
    """What one caller does."""

    codebook: str
    draw: Draw
    rows: int
    makes_mistakes: bool = False


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="load before (default: 300)")
    seconds = parser.parse_args().seconds
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("there is no Chromium on this machine")
    with tempfile.TemporaryDirectory() as scratch:
        books = Path(scratch) / "books"
        books.mkdir()
        _make_codebooks(books)
        with _server(books) as (target, url), _load(target), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=_FLAGS)
            _take(browser, url, seconds)
            browser.close()


def _centres(seed: int, scale: float) -> Draw:
    """Return how to draw latents around 200 centres of unequal frequency."""
    rng = np.random.default_rng(seed)
    centres = (rng.standard_normal((200, _DIM)) * scale).astype(np.float32)
    shares = rng.dirichlet(np.full(200, 0.6))

    def draw(rng: np.random.Generator, rows: int) -> Latents:
        chosen = centres[rng.choice(200, rows, p=shares)]
        return chosen + rng.standard_normal((rows, _DIM), dtype=np.float32) * np.float32(0.6)

    return draw


_FACES, _WIDER = _centres(1, 1.0), _centres(2, 2.0)


def _narrow(rng: np.random.Generator, rows: int) -> Latents:
    """Latents of which `textures` was not trained: a part of its space, and shifted."""
    latents = _WIDER(rng, rows * 2)
    return (latents[latents[:, 0] > 0.0][:rows] + np.float32(0.4)) if rows else latents


def _make_codebooks(books: Path) -> None:
    rng = np.random.default_rng(0)
    for name, draw in (("faces", _FACES), ("textures", _WIDER)):
        latents = books.parent / f"{name}.npy"
        np.save(latents, draw(rng, 200_000))
        book = books / f"{name}.safetensors"
        _vqserved("train", latents, "-o", book, "--num-codes", _CODES, *_QUICK)
    # The stages of a residual codebook, each trained on what the one before leaves.
    rest = _FACES(rng, 200_000)
    quantizer = ResidualQuantizer(_STAGES, _STAGE_CODES, _DIM)
    state = quantizer.state_dict()
    for key in sorted(state):
        latents, book = books.parent / "rest.npy", books.parent / "stage.safetensors"
        np.save(latents, rest)
        _vqserved("train", latents, "-o", book, "--num-codes", _STAGE_CODES, "--force", *_QUICK)
        codes = load_codebook(book).quantizer.state_dict()["embedding.weight"]
        state[key] = codes
        rest = rest - codes[torch.cdist(torch.from_numpy(rest), codes).argmin(1)].numpy()
    quantizer.load_state_dict(state)
    speech, latents = books / "speech.safetensors", books.parent / "faces.npy"
    save_codebook(quantizer, speech)
    _vqserved("inspect", speech, "--latents", latents, "--layout", "channels_last", "--save-stats")


def _vqserved(*arguments: object) -> None:
    """Run a command in this process: it starts only once."""
    with redirect_stdout(io.StringIO()):
        if code := vqserved(list(map(str, arguments))):
            sys.exit(code)


@contextmanager
def _server(books: Path) -> Iterator[tuple[str, str]]:
    """Run a server; yield its target and the console's URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    command = [sys.executable, "-m", "vqserve_tools", "serve", str(books), "--workers", "2", "--port", "0"]
    command += ["--metrics-port", str(metrics_port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            if process.stdout is None or (ready := _READY.match(process.stdout.readline())) is None:
                raise RuntimeError("the server did not start")
            yield ready[1], f"http://127.0.0.1:{metrics_port}/"
        finally:
            process.send_signal(signal.SIGTERM)


@contextmanager
def _load(target: str) -> Iterator[None]:
    """Call the server from several threads, more and less."""
    stopped = threading.Event()
    jobs = [
        _Job("faces", _FACES, 2048, makes_mistakes=True),
        *[_Job("faces", _FACES, 2048)] * 4,
        *[_Job("speech", _FACES, 1024)] * 3,
        *[_Job("textures", _narrow, 4096)] * 2,
    ]
    threads = [threading.Thread(target=_call, args=(target, job, stopped, i)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def _call(target: str, job: _Job, stopped: threading.Event, number: int) -> None:
    rng = np.random.default_rng(number)
    drawn = [job.draw(rng, job.rows) for _ in range(300)]
    with Client(target, codebook=job.codebook) as client:
        calls = 0
        while not stopped.is_set():
            calls += 1
            indices = client.encode(drawn[calls % len(drawn)], layout="channels_last")
            if calls % 3 == 0:
                client.decode(indices, layout="channels_last")
            if job.makes_mistakes and calls % 40 == 0:
                # The page shows errors.
                _send_what_is_no_latent(client)
            stopped.wait(0.01 * (1.2 + math.sin(time.monotonic() / 20 + number)))


def _send_what_is_no_latent(client: Client) -> None:
    try:
        client.encode(np.full((4, _DIM), np.nan, np.float32))
    except VqserveError:
        return


def _take(browser: Browser, url: str, seconds: float) -> None:
    views: dict[str, tuple[Any, Any]] = {
        "light": (_WIDE, "light"),
        "dark": (_WIDE, "dark"),
        "narrow": (_NARROW, "light"),
    }
    pages = {}
    for name, (viewport, scheme) in views.items():
        pages[name] = browser.new_context(viewport=viewport, color_scheme=scheme, device_scale_factor=1.5).new_page()
        pages[name].goto(url)
    # All pages ask from now on, so that their curves are complete.
    pages["light"].wait_for_timeout(1000 * seconds)
    for name, page in pages.items():
        _write(f"console-{name}", page.screenshot())
    for page in pages.values():
        # The bar at the top would lie over what is scrolled to.
        page.set_viewport_size({"width": _WIDE["width"], "height": 8000})
    for name, codebook, view in (("usage", "speech", "dark"), ("dead-codes", "textures", "light")):
        _write(f"console-{name}", pages[view].locator(f"#usage-{codebook}").screenshot())


def _write(name: str, png: bytes) -> None:
    """Write a picture, with the colours of a page: few."""
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(_OUT / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
