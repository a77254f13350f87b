"""Runs pytest while every core has other work: `scripts/busy.py [PYTEST ARGUMENTS]` (`make test-busy`).

What fails only here waits for something by the clock. The other work ends with pytest, however that ends.
"""

from __future__ import annotations

import os
import subprocess
import sys

# Ends by itself after this script has ended, even if it was killed: the process then has another parent.
_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))"


def main() -> int:
    """Run pytest under load; return its exit code."""
    spinners = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in os.sched_getaffinity(0)]  # noqa: S603
    try:
        return subprocess.run([sys.executable, "-m", "pytest", *sys.argv[1:]], check=False).returncode  # noqa: S603
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


if __name__ == "__main__":
    sys.exit(main())
