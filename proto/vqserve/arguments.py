"""The argument parser of both command lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that reports wrong usage in one line, like all other errors."""

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
