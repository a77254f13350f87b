"""Functions that run in a process of their own, so that a load does not slow down what is measured beside it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

# Not forked: gRPC does not survive that in the middle of a call.
_context = multiprocessing.get_context("spawn")


class Control:
    """The link of such a function to its parent."""

    def __init__(self) -> None:
        self._begun = _context.Event()
        self._ended = _context.Event()

    def begin(self) -> None:
        """Tell the parent that the function has begun its work."""
        self._begun.set()

    @property
    def ended(self) -> bool:
        """Whether the parent wants it to return."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait, and return whether the parent wants it to return."""
        return self._ended.wait(seconds)

    def wait_begun(self) -> bool:
        return self._begun.wait(60)

    def end(self) -> None:
        self._ended.set()


class Beside:
    """A function that runs in a process of its own until its result is asked for.

    The function gets a Control and the arguments. It calls `begin`, and returns once `ended` is true.
    """

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self._control = Control()
        self._pipe, theirs = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_run, args=(theirs, self._control, function, arguments), daemon=True)
        self._process.start()
        # Otherwise `result` would not see that the process has ended.
        theirs.close()
        if not self._control.wait_begun():
            raise RuntimeError(f"{function.__name__} did not begin")
        self._result: Any = None
        if self._pipe.poll():
            self._receive()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, seconds: float) -> bool:
        """Wait until the function has returned of itself; return whether it has."""
        return self._result is not None or self._pipe.poll(seconds)

    def result(self) -> Any:
        """End the function and return what it returns."""
        self._control.end()
        if self._result is None:
            self._receive()
        self._process.join(10)
        return self._result

    def _receive(self) -> None:
        self._result = self._pipe.recv()
        if isinstance(self._result, BaseException):
            raise self._result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()


def _run(pipe: Any, control: Control, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    try:
        result = function(control, *arguments)
    except Exception as error:
        result = RuntimeError(f"{function.__name__}: {error!r}")
    pipe.send(result)
    # Where it failed before it had begun.
    control.begin()
