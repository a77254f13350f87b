"""Faults for a server that runs on a CPU, in any process with this folder on PYTHONPATH; see support/faults.py.

Python imports this module when it starts. The faults are put into the modules of the server when those are imported.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import os
import sys
import threading
import time
from pathlib import Path

FOLDER = Path(os.environ["FAULTY_DEVICE"])
# The file of this process: it holds the fault and its number.
FILE = FOLDER / os.environ.get("_VQSERVE_WORKER", "0")
# Faults that last as long as the process.
lasting: set[str] = set()


def fault() -> tuple[str, float]:
    """The fault of this process and its number; "" if it has none."""
    if lasting:
        return next(iter(lasting)), 0.0
    try:
        name, number = FILE.read_text().split()
    except FileNotFoundError:
        return "", 0.0
    return name, float(number)


def happens(*names: str) -> str:
    """The fault of this process if it is one of these, which happens now; the process after this one has none."""
    name, _ = fault()
    if name not in names:
        return ""
    FILE.unlink(missing_ok=True)
    (FOLDER / f"{FILE.name}.happened").touch()
    return name


def stand_still() -> None:
    """Never return."""
    threading.Event().wait()


def before(rows: object) -> None:
    """What happens to a computation before its result is there."""
    import torch  # noqa: PLC0415

    name, number = fault()
    if name == "slow":
        time.sleep(number)
    if name == "out_of_memory" and len(rows) > number:
        raise torch.OutOfMemoryError("CUDA out of memory")
    if happens("hang"):
        stand_still()
    if happens("hold_the_interpreter"):
        # Other than with CDLL, no other thread runs Python meanwhile.
        ctypes.PyDLL(None).sleep(3600)
    if happens("sticky"):
        lasting.add("sticky")
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    if happens("garbage"):
        lasting.add("garbage")
    if happens("failing"):
        lasting.add("failing")
        raise ZeroDivisionError


def patch_tokenizer(module: object) -> None:
    tokenizer = module.Tokenizer
    encode_rows, decode_rows = tokenizer.encode_rows, tokenizer.decode_rows

    def encode(self: object, rows: object, **options: object) -> object:
        before(rows)
        found = encode_rows(self, rows, **options)
        return found[::-1].copy() if "garbage" in lasting else found

    def decode(self: object, indices: object, **options: object) -> object:
        before(indices)
        return decode_rows(self, indices, **options)

    tokenizer.encode_rows, tokenizer.decode_rows = encode, decode
    # What is computed where it is passes neither.
    tokenizer.native_batch = None


def patch_health(module: object) -> None:
    """The transport's thread gets stuck in a health check."""
    check = module.Health._check

    def stuck(self: object, call: object) -> None:
        if happens("hang_transport"):
            stand_still()
        check(self, call)

    module.Health._check = stuck


def patch_reloader(module: object) -> None:
    """The event loop gets stuck at a SIGHUP."""
    request = module.Reloader.request

    def stuck(self: object) -> None:
        if happens("hang_loop"):
            stand_still()
        request(self)

    module.Reloader.request = stuck


PATCHES = {
    "vqserve_server.tokenizer.tokenizer": patch_tokenizer,
    "vqserve_server.rpc.health": patch_health,
    "vqserve_server.repository": patch_reloader,
}


class Patching(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module as usual, and patches it when it is loaded."""

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        if name not in PATCHES:
            return None
        specs = (each.find_spec(name, path, target) for each in sys.meta_path if each is not self)
        spec = next(spec for spec in specs if spec is not None)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: object) -> object:
        return self.loader.create_module(spec)

    def exec_module(self, module: object) -> None:
        self.loader.exec_module(module)
        PATCHES[module.__name__](module)


sys.meta_path.insert(0, Patching())
