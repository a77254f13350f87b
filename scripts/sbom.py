"""Writes a software bill of materials of what the image installs, in CycloneDX's JSON (`make sbom`).

    python scripts/sbom.py FILE

It lists what `vqserve[server]` needs, in the releases that are installed here, and not the tools beside them. Two runs
write the same file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from importlib import metadata
from pathlib import Path

from image_requirements import COMPILER, runtime_requirements
from lock import closure
from packaging.utils import canonicalize_name

import vqserve

_ROOT = Path(__file__).resolve().parents[1]
_CYCLONEDX = "1.6"


def main(target: Path) -> int:
    """Write the file; return the exit code."""
    pyproject = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    installed = {canonicalize_name(one.name): one for one in metadata.distributions()}
    requires = {name: one.requires or [] for name, one in installed.items()}
    with tempfile.TemporaryDirectory() as scratch:
        # An environment that has their metadata alone, which is all that the tool reads.
        environment = Path(scratch)
        venv.create(environment, with_pip=False)
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": scratch}))
        for name in closure(runtime_requirements(pyproject), requires) - {canonicalize_name(COMPILER)}:
            folder = Path(str(installed[name].locate_file("."))) / _folder(installed[name])
            (packages / folder.name).symlink_to(folder, target_is_directory=True)
        command = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", str(_ROOT / "pyproject.toml")]
        command += ["--mc-type", "application", "--output-reproducible", "--output-format", "JSON", "--sv", _CYCLONEDX]
        done = subprocess.run([*command, str(environment)], stdout=subprocess.PIPE, check=False)  # noqa: S603
    if done.returncode:
        return done.returncode
    bill = json.loads(done.stdout)
    # pyproject.toml has none: it is in the code.
    bill["metadata"]["component"]["version"] = vqserve.__version__
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"{json.dumps(bill, indent=2)}\n")
    return 0


def _folder(distribution: metadata.Distribution) -> str:
    """Return the name of a package's folder of metadata."""
    [record] = [file for file in distribution.files or () if file.name == "METADATA" and len(file.parts) == 2]
    return record.parts[0]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
