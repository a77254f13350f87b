"""`python -m vqserve_server` is `vqserved` without the tools."""

import sys

from vqserve_server import signals

if __name__ == "__main__":
    signals.end_at_signals()
    from vqserve_server.cli import main

    sys.exit(main())
