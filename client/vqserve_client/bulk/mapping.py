"""`--map module:function`: the user's own code between a reader and the server, in this process or in several.

The function takes an item (with a picture or a sound a `RawItem`) and returns its latents, for example those that an
encoder makes of a picture. An error of it is the reason why the item has no result.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

from vqserve_client.arrays import Array
from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, Item, RawItem, Record

T = TypeVar("T")
Function = Callable[[Item | RawItem], Any]

# Items that are ahead of the one that is next, for each process.
_AHEAD = 4
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def load_function(name: str) -> Function:
    """Return the function that "package.module:function" names; modules of the current folder are found, too.

    Raises:
        FileError: there is none.
    """
    module, mark, attribute = name.partition(":")
    if not (module and mark and attribute):
        raise FileError(f"--map must be MODULE:FUNCTION, such as encoders.vqgan:latents, not {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = importlib.import_module(module)
    except ImportError as error:
        raise FileError(f"--map {name}: {error}") from error
    try:
        for part in attribute.split("."):
            function = getattr(function, part)
    except AttributeError as error:
        raise FileError(f"--map {name}: {error}") from error
    if not callable(function):
        raise FileError(f"--map {name}: it is not a function")
    return function


class Mapping:
    """Applies a function to items, in order.

    Attributes:
        name: the function, as "package.module:function".
    """

    def __init__(self, name: str, processes: int = 0) -> None:
        """Import the function.

        Args:
            name: "package.module:function".
            processes: number of processes; 0: this one.

        Raises:
            FileError: there is no such function.
        """
        self.name = name
        self._function = load_function(name)
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        # The processes end when this end of a pipe is closed, also because this process was killed.
        self._alive: Connection | None = None

    def __call__(self, items: Iterator[tuple[T, Record]]) -> Iterator[tuple[T, Item | BadItem]]:
        """Yield each item with what the function returns for it, and with what comes with it, such as its place."""
        if self._processes:
            return self._across(items)
        return ((place, apply(self._function, item)) for place, item in items)

    def close(self) -> None:
        """End the processes, whatever the function is doing."""
        if self._pool is not None and self._alive is not None:
            self._alive.close()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _across(self, items: Iterator[tuple[T, Record]]) -> Iterator[tuple[T, Item | BadItem]]:
        if self._pool is None:
            # A fork would copy the threads of gRPC and of the job.
            context = multiprocessing.get_context("spawn")
            watched, self._alive = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(self._processes, context, _begin, (self.name, list(sys.path), watched))
        ahead: deque[tuple[T, Future[Item | BadItem]]] = deque()
        try:
            for place, item in items:
                ahead.append((place, self._pool.submit(_apply_here, _loaded(item))))
                if len(ahead) >= self._processes * _AHEAD:
                    yield _result(*ahead.popleft())
            while ahead:
                yield _result(*ahead.popleft())
        except BrokenProcessPool as error:
            raise FileError(f"--map {self.name}: one of its processes ended: is there enough memory?") from error


def _result(place: T, future: Future[Item | BadItem]) -> tuple[T, Item | BadItem]:
    return place, future.result()


def apply(function: Function, item: Record) -> Item | BadItem:
    """Return an item with the array that a function makes of it; an error of the function makes it a bad one."""
    if isinstance(item, BadItem):
        return item
    try:
        array = _array_of(function(item))
    except (Exception, SystemExit) as error:
        # The same data set gives the same bytes: no addresses of objects.
        text = _ADDRESS.sub("", " ".join(str(error).split()))
        return BadItem(item.key, item.source, f"map: {type(error).__name__}: {text}")
    return Item(item.key, array, item.source, item.fields)


def _array_of(value: Any) -> Array:
    """Return what the function returned as a numpy array, which may be a tensor on any device."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray) or value.dtype.hasobject:
        raise TypeError(f"it returned {type(value).__name__}, not an array of numbers")
    # The function may return the same memory for the next item, before this one is sent.
    return np.array(value)


def _loaded(item: Record) -> Record:
    """Return an item that another process can be given."""
    if not isinstance(item, Item) or isinstance(item.array, np.ndarray):
        return item
    return replace(item, array=np.asarray(item.array[(slice(None),) * len(item.array.shape)]))


# In a process of the pool: its function.
_here: list[Function] = []


def _begin(name: str, path: list[str], watched: Connection) -> None:
    # Ctrl-C is for the job, which ends its processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_job, args=(watched,), name="vqserve-watching", daemon=True).start()
    sys.path[:] = path
    _here.append(load_function(name))


def _end_with_job(watched: Connection) -> None:
    # Nothing is ever sent.
    watched.poll(None)
    os._exit(1)


def _apply_here(item: Record) -> Item | BadItem:
    return apply(_here[0], item)
