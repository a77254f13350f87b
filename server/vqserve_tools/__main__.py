"""The process of `vqserved`, which `python -m vqserve_tools` is too."""

import sys

from vqserve_server import signals


def main() -> int:
    """Run `vqserved` as a process of its own; return the exit code."""
    signals.end_at_signals()
    from vqserve_tools import cli  # noqa: PLC0415

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
