"""Makes tests/golden/foreign/*.npz from the libraries themselves, or holds the libraries against our imports.

    .venv/bin/python tests/golden/make_foreign.py [FAMILY ...]
    .venv/bin/python tests/golden/make_foreign.py --check --rows 100000 [FAMILY ...]

The libraries are installed into an environment of their own, .venv-foreign: see requirements.txt and
requirements-no-deps.txt in libraries/. Without --check the goldens are small; with it codebooks have their published
sizes, nothing is kept, and a table is printed, for README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_ENVIRONMENT = _ROOT / ".venv-foreign"
FOREIGN = _HERE / "foreign"
# What a golden may weigh.
MAX_BYTES = 100_000
_GOLDEN_ROWS = 256
# Module of libraries/: the functions in it that make a golden each.
FAMILIES = {
    "from_diffusers": ("diffusers_vqmodel", "amused"),
    "from_transformers": (
        "chameleon",
        "emu3",
        "encodec_transformers",
        "dac_transformers",
        "mimi_transformers",
        "xcodec",
        "xcodec_2",
        "higgs_audio_v2",
    ),
    "from_codecs": ("encodec", "dac", "mimi", "speechtokenizer"),
    "from_lucidrains": (
        "lucidrains_vq",
        "lucidrains_vq_cosine",
        "lucidrains_rvq",
        "lucidrains_rvq_shared",
        "lucidrains_rvq_cosine",
        "lucidrains_grouped_rvq",
        "lucidrains_fsq",
        "lucidrains_fsq_symmetric",
        "lucidrains_lfq",
        "lucidrains_simvq",
    ),
    "from_speech": ("fish_speech", "qwen_25hz", "qwen_25hz_residual", "s3_tokenizer"),
    "from_taming": ("taming", "taming_gumbel", "open_magvit2"),
}
MODULE_OF = {family: module for module, families in FAMILIES.items() for family in families}


def main() -> int:
    """Make goldens or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(MODULE_OF)}; none: all")
    parser.add_argument("--check", action="store_true", help="compare the libraries with our imports, keep nothing")
    parser.add_argument("--rows", type=int, default=_GOLDEN_ROWS, help="tokens, a multiple of 32 (%(default)s)")
    args = parser.parse_args()
    unknown = sorted(set(args.families) - set(MODULE_OF))
    if unknown or args.rows % 32:
        parser.error(f"there is no family {unknown[0]}" if unknown else "--rows must be a multiple of 32")
    python = _environment()
    families = args.families or list(MODULE_OF)
    if args.check:
        return _check(python, families, args.rows)
    FOREIGN.mkdir(exist_ok=True)
    for family in families:
        path = FOREIGN / f"{family}.npz"
        _make(python, family, path, args.rows)
        print(f"{family}: {path.stat().st_size} bytes")
        if path.stat().st_size > MAX_BYTES:
            print(f"{family}: more than {MAX_BYTES} bytes", file=sys.stderr)
            return 1
    return 0


def _environment() -> Path:
    """Return the Python that has the libraries, made anew when what they are changes."""
    python, stamp = _ENVIRONMENT / "bin" / "python", _ENVIRONMENT / "installed.txt"
    with_deps, alone = (_HERE / "libraries" / name for name in ("requirements.txt", "requirements-no-deps.txt"))
    wanted = with_deps.read_text() + alone.read_text()
    if not stamp.is_file() or stamp.read_text() != wanted:
        venv.create(_ENVIRONMENT, clear=True, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        constraints = ["-c", _ROOT / "constraints.txt"]
        subprocess.run([*pip, *constraints, "-r", with_deps], check=True)
        subprocess.run([*pip, *constraints, "--no-deps", "-r", alone], check=True)
        stamp.write_text(wanted)
    return python


def _make(python: Path, family: str, path: Path, rows: int, *options: str) -> None:
    command = [python, "-m", "libraries.library", MODULE_OF[family], family, path, "--rows", str(rows), *options]
    # Nothing of a hub is wanted: weights are drawn.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(_HERE)}
    subprocess.run(command, check=True, env=environment)


def _check(python: Path, families: list[str], rows: int) -> int:
    # Here, because the goldens are made without our package too.
    from libraries.comparison import compare, import_golden  # noqa: PLC0415
    from libraries.golden import Golden  # noqa: PLC0415

    print("| Family | Library | Kind | Tokens x indices | Differing | Largest gap / bound | Decoded |")
    print("|---|---|---|---|---|---|---|")
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "golden.npz"
            _make(python, family, path, rows, "--full-size")
            golden = Golden.load(path)
            with contextlib.redirect_stdout(io.StringIO()):
                codebook = import_golden(golden, Path(folder))
            found = compare(golden, codebook)
        per_token = golden.indices.size // found.tokens
        print(
            f"| {family} | {golden.library} | {found.kind} | {found.tokens} x {per_token} | {found.differing} | "
            f"{found.largest_share:.2g} | {found.decoded:.1e} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
