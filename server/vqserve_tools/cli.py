"""`vqserved`: the command line of the server, with the commands of the tools."""

from __future__ import annotations

from collections.abc import Sequence

from vqserve_server import cli
from vqserve_server.cli import Command

COMMANDS = {
    "import": Command(
        "make a codebook file from a checkpoint or an array", "vqserve_tools.importing.commands", "add_import_parser"
    ),
    "inspect": Command(
        "describe a codebook file, and how it fits latents", "vqserve_tools.inspection.commands", "add_inspect_parser"
    ),
    "token": Command(
        "make a token for a caller", "vqserve_server.access.command", "add_token_parser", needs_extra=False
    ),
    "train": Command("train a codebook on latents", "vqserve_tools.training.commands", "add_train_parser"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vqserved`; return the exit code: 0, 1 on an error, 2 on wrong usage."""
    return cli.main(argv, COMMANDS)
