"""How both command lines tell of wrong usage."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that tells of wrong usage in one line, as other errors are told."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the options are listed, and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}; `{self.prog} --help` lists the options\n")
