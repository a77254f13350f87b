"""`vqserve` and `python -m vqserve`: the command line of the client."""

from __future__ import annotations

import os
import sys
from importlib import import_module


def main() -> int:
    """Run one command; return the exit code."""
    # gRPC reads it when it is imported. Without it, gRPC writes lines of its own to stderr, for example for a server
    # whose certificate is not trusted, beside the one line that says so.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    return int(import_module("vqserve_client.cli").main())


if __name__ == "__main__":
    sys.exit(main())
