"""`vqserve` and `python -m vqserve`: the command line of the client."""

from __future__ import annotations

import os
import sys
import threading
from importlib import import_module


def main() -> int:
    """Run one command; return the exit code."""
    # gRPC reads it when it is imported. Without it, gRPC writes lines of its own to stderr, for example for a server
    # whose certificate is not trusted, beside the one line that says so.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    code = int(import_module("vqserve_client.cli").main())
    if any(thread.daemon and thread.name == "vqserve-reading" for thread in threading.enumerate()):
        # It waits in a read or in the user's function. Python would abort if the thread holds the lock of a file.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
