"""How both command lines tell of wrong usage."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that tells of wrong usage in one line, as other errors are told."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the options are listed, and exit with 2."""
        self._refuse(self.prog, message)

    def parse_command(
        self, words: Sequence[str], explain: Callable[[argparse.Namespace, Sequence[str]], str | None] | None = None
    ) -> argparse.Namespace:
        """Parse a command line; unlike parse_args, words that are not known are told of by the command.

        Args:
            words: the command first.
            explain: returns what to say of words that are not known, beside what was; None: nothing special.
        """
        args, unknown = self.parse_known_args(words)
        if unknown:
            command = "" if words[0].startswith("-") else f" {words[0]}"
            text = explain(args, unknown) if explain is not None else None
            self._refuse(f"{self.prog}{command}", text or f"unrecognized arguments: {' '.join(unknown)}")
        return args

    def _refuse(self, program: str, message: str) -> NoReturn:
        self.exit(2, f"{program}: error: {message}; `{program} --help` lists the options\n")
