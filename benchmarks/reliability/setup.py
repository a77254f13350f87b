"""What every scenario gets: codebooks, servers and processes that end with it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from reliability.beside import Beside
from reliability.server import Server


class Setup:
    """One run of a scenario.

    Attributes:
        scratch: folder for temporary files.
        seconds: length of each measurement.
        python: the server's interpreter.
    """

    def __init__(self, scratch: Path, *, seconds: float, python: str, cases: str) -> None:
        self.scratch = scratch
        self.seconds = seconds
        self.python = python
        self._cases = cases
        self._stack = ExitStack()
        self._started = 0

    def wants(self, case: str) -> bool:
        """Return whether the caller wants this case of the scenario."""
        return self._cases in case

    @property
    def books(self) -> Path:
        """A folder with the codebooks of cells.py: tiny, ldm-f8, vqgan-f16."""
        folder = self.scratch / "books"
        if not folder.exists():
            from cells import make_books

            folder.mkdir()
            make_books(folder)
        return folder

    def command(self, *arguments: object) -> list[str]:
        """Return a command line of the server's package."""
        return [self.python, "-m", "vqserve_tools", *map(str, arguments)]

    def knows(self, flag: str) -> bool:
        """Return whether the server has a flag."""
        shown = subprocess.run(self.command("serve", "--help"), capture_output=True, text=True, check=True)
        return f"{flag} " in shown.stdout.replace("\n", " ")

    def server(self, *flags: object, port: int = 0, command: list[str] | None = None, **options: Any) -> Server:
        """Start a server of the codebooks, which is killed when the scenario ends."""
        self._started += 1
        log = self.scratch / f"log{self._started}-{id(self)}"
        arguments = command or self.command("serve")
        server = Server([*arguments, str(self.books), "--port", str(port), *map(str, flags)], log, **options)
        self._stack.callback(server.kill)
        return server

    def beside(self, function: Callable[..., Any], *arguments: object) -> Beside:
        """Run a function in a process of its own; see Beside."""
        return self._stack.enter_context(Beside(function, *arguments))

    def keep(self, context: Any) -> Any:
        """Enter a context that ends with the scenario."""
        return self._stack.enter_context(context)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
