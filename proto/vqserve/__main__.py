"""The process of `vqserve`, which `python -m vqserve` is too."""

import importlib
import os
import sys


def main() -> int:
    """Run `vqserve` as a process of its own; return the exit code."""
    # gRPC writes lines of its own about each connection that fails. It reads this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # By name: what client and server share does not depend on either.
    return int(importlib.import_module("vqserve_client.cli").main())


if __name__ == "__main__":
    sys.exit(main())
