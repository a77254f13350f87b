"""The argument parser of both command lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that reports wrong usage in one line, like all other errors.

    An option that holds one value may be given once: argparse would use the last value and drop the others in silence.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and how to list the options, and exit with 2."""
        self._exit_wrong_usage(self.prog, message)

    def parse_command(
        self, words: Sequence[str], explain: Callable[[argparse.Namespace, Sequence[str]], str | None] | None = None
    ) -> argparse.Namespace:
        """Parse a command line; unlike with parse_args, the error about unknown words names the command.

        Args:
            words: words of the command line, the command first.
            explain: function that returns an error text from the parsed arguments and the unknown words, or None for
                the usual text.
        """
        args, unknown = self.parse_known_args(words)
        if unknown:
            command = "" if words[0].startswith("-") else f" {words[0]}"
            text = explain(args, unknown) if explain is not None else None
            self._exit_wrong_usage(f"{self.prog}{command}", text or f"unrecognized arguments: {' '.join(unknown)}")
        return args

    def _exit_wrong_usage(self, program: str, message: str) -> NoReturn:
        self.exit(2, f"{program}: error: {message}; `{program} --help` lists the options\n")


class _StoreOnce(argparse._StoreAction):
    """Store a value; a second value for the same option is wrong usage."""

    # Each parse fills a namespace of its own, so the namespace identifies the parse.
    _filled: argparse.Namespace | None = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if option_string is not None:
            if self._filled is namespace:
                raise argparse.ArgumentError(self, "it is given twice, and only one value is used: give it once")
            self._filled = namespace
        super().__call__(parser, namespace, values, option_string)
