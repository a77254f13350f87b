"""Makes tests/golden/residual_fsq/*.npz from versions of vector-quantize-pytorch, or holds these against ours.

    .venv/bin/python tests/golden/make_residual_fsq.py
    .venv/bin/python tests/golden/make_residual_fsq.py --check --rows 100000

The versions are installed, one at a time, beside what the environment of make_foreign.py has.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_HERE = Path(__file__).resolve().parent
FOLDER = _HERE / "residual_fsq"
# Versions, and what each bounds with if nothing else is asked for: one of each, and the newest.
VERSIONS = {"1.17.8": "atanh_twice", "1.25.2": "atanh", "1.32.0": "soft_clamp"}
_GOLDEN_ROWS = 160


def main() -> int:
    """Make goldens or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the library with ours, keep nothing")
    parser.add_argument("--rows", type=int, default=_GOLDEN_ROWS, help="tokens, a multiple of 32 (%(default)s)")
    parser.add_argument("--python", type=Path, help="of another environment that has torch, einops, einx and loguru")
    args = parser.parse_args()
    if args.rows % 32:
        parser.error("--rows must be a multiple of 32")
    python = args.python or _environment()
    if args.check:
        print("| Library | Case | Tokens x indices | Differing | Largest distance | Decoded |")
        print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) if args.check else FOLDER
        out.mkdir(exist_ok=True)
        for version, bound in VERSIONS.items():
            _make(python, version, bound, out / f"{version}.npz", args.rows)
            if args.check:
                _check(out / f"{version}.npz")
    return 0


def _environment() -> Path:
    from make_foreign import _environment as environment  # noqa: PLC0415

    return environment()


def _make(python: Path, version: str, bound: str, path: Path, rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--target",
            folder,
        ]
        subprocess.run([*pip, f"vector-quantize-pytorch=={version}"], check=True)
        command = [python, "-m", "libraries.from_residual_fsq", path, bound, "--rows", str(rows)]
        search = os.pathsep.join([folder, str(_HERE)])
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": search})


def _check(path: Path) -> None:
    # Here, because the goldens are made without our package too.
    from libraries.residual_fsq_ties import compare, load  # noqa: PLC0415

    library, cases = load(path)
    for name, case in cases.items():
        found = compare(case)
        print(
            f"| {library} | {name} | {found.tokens} x {case.indices.shape[-1]} | {found.differing} | "
            f"{found.distance:.1e} | {found.decoded:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
