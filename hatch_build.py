"""Compiles the CPU search when a wheel or an editable install is made.

The compiler is zig's (a build requirement from the package index), so that a source build needs nothing that pip does
not bring and the library runs on systems older than the one that built it.

`python hatch_build.py FILE` compiles the library alone, and a build for which `VQSERVE_LIBSEARCH` names such a file
packs it as it is: the Dockerfile compiles in a stage that changes of Python do not reach. `VQSERVE_KERNELS` names a
folder of kernels for GPUs to pack, which `python -m vqserve_server.search.cuda.cubins` makes; without it the wheel has
none, and Triton compiles them at run time.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("server/vqserve_server/search/native")
_LIBRARY = _FOLDER / "libsearch.so"
_COMMON = [
    "-O3",
    "-std=c11",
    "-Wall",
    "-Wextra",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=on",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
]

# machine -> (zig target, wheel platform, {symbol suffix: flags}). The suffixes are those of native/library.py.
_TARGETS: dict[str, tuple[str, str, dict[str, str]]] = {
    "x86_64": (
        "x86_64-linux-gnu.2.28",
        "manylinux_2_28_x86_64",
        {
            "avx512": "-mcpu=x86_64_v4 -mprefer-vector-width=512 -DLANES=16 -DROWS=8 -DVECS=3",
            "avx2": "-mcpu=x86_64_v3 -DLANES=8 -DROWS=4 -DVECS=2",
            "default": "-mcpu=x86_64 -DLANES=4 -DROWS=4 -DVECS=2",
        },
    ),
    "aarch64": (
        "aarch64-linux-gnu.2.28",
        "manylinux_2_28_aarch64",
        {"default": "-DLANES=4 -DROWS=8 -DVECS=2"},
    ),
}


class CompileSearch(BuildHookInterface[Any]):
    """Adds the compiled library to the wheel, and the wheel's platform to its name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the build; on a machine without a target the wheel has no library and torch searches."""
        kernels = os.environ.get("VQSERVE_KERNELS")
        if self.target_name == "wheel" and kernels:
            build_data["force_include"][kernels] = "vqserve_server/search/cuda/compiled"
        target = _target()
        if self.target_name != "wheel" or target is None:
            return
        root = Path(self.root)
        compiled = os.environ.get("VQSERVE_LIBSEARCH")
        content = Path(compiled).read_bytes() if compiled else _compile(root, target)
        # A process that has the old library mapped keeps it.
        (root / _LIBRARY).unlink(missing_ok=True)
        (root / _LIBRARY).write_bytes(content)
        (root / _LIBRARY).chmod(0o755)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{target[1]}"
        build_data["artifacts"].append(str(_LIBRARY))


def _target() -> tuple[str, str, dict[str, str]] | None:
    return _TARGETS.get(platform.machine()) if sys.platform == "linux" else None


def _compile(root: Path, target: tuple[str, str, dict[str, str]]) -> bytes:
    """Return the library, compiled from the sources below `root`."""
    triple, _, levels = target
    with tempfile.TemporaryDirectory() as scratch:
        objects = [
            _compile_one(root, triple, f"{name}.c", [], Path(scratch) / f"{name}.o") for name in ("decode", "pool")
        ]
        for level, flags in levels.items():
            own = [*flags.split(), f"-DLEVEL={level}"]
            objects.append(_compile_one(root, triple, "search.c", own, Path(scratch) / f"{level}.o"))
        library = Path(scratch) / "libsearch.so"
        _zig("-target", triple, "-shared", "-s", "-pthread", "-o", str(library), *objects, "-lm")
        return library.read_bytes()


def _compile_one(root: Path, triple: str, name: str, flags: list[str], target: Path) -> str:
    source = root / _FOLDER / name
    _zig("-target", triple, *_COMMON, *flags, "-c", str(source), "-o", str(target))
    return str(target)


def _zig(*arguments: str) -> None:
    command = [sys.executable, "-m", "ziglang", "cc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _main() -> None:
    target = _target()
    if target is not None:
        Path(sys.argv[1]).write_bytes(_compile(Path(__file__).parent, target))


if __name__ == "__main__":
    _main()
