"""The wheel, built as a user builds it: what is in it, and what is not."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import vqserve

ROOT = Path(__file__).parents[1]
PACKAGES = ["vqserve", "vqserve_bench", "vqserve_client", "vqserve_data", "vqserve_server", "vqserve_tools"]
PLATFORMS = {"x86_64": "manylinux_2_28_x86_64", "aarch64": "manylinux_2_28_aarch64"}
COMPILED = PLATFORMS.get(platform.machine()) if sys.platform == "linux" else None
KERNELS = "vqserve_server/search/cuda/compiled/index.json"
LIBRARY = "vqserve_server/search/native/libsearch.so"
DIST_INFO = f"vqserve-{vqserve.__version__}.dist-info"

# pip fetches the build requirements, a C compiler of 100 MB among them: about 40 s once for this file.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # A copy without anything that was built: the build writes its library into the tree, which others are using.
    source = tmp_path_factory.mktemp("checkout") / "vqserve"
    built = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "out", "compiled")
    shutil.copytree(ROOT, source, ignore=built)
    folder = tmp_path_factory.mktemp("wheel")
    kernels = tmp_path_factory.mktemp("kernels")
    (kernels / "index.json").write_text("{}")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), "."]
    environment = {**os.environ, "VQSERVE_KERNELS": str(kernels)}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_its_name_says_where_it_runs(wheel):
    assert wheel.name == f"vqserve-{vqserve.__version__}-py3-none-{COMPILED or 'any'}.whl"


def test_it_holds_the_packages_and_nothing_else(names):
    assert sorted({name.partition("/")[0] for name in names}) == sorted([*PACKAGES, DIST_INFO])
    assert len(names) == len(set(names))


def test_it_holds_every_file_of_the_sources(names):
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    sources = {
        path.relative_to((ROOT / folder).parent).as_posix()
        for folder in folders["packages"]
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so" and "compiled" not in path.parts
    }
    packed = {name for name in names if not name.startswith(DIST_INFO)}
    assert packed == sources | {KERNELS} | ({LIBRARY} if COMPILED else set())


@pytest.mark.parametrize(
    "name",
    [
        *(f"{package}/py.typed" for package in PACKAGES),
        "vqserve/v1/tokenizer.proto",
        "vqserve/v1/tokenizer_pb2.pyi",
        "vqserve_server/assets/README.md",
        "vqserve_server/assets/demo.png",
        "vqserve_server/assets/demo.safetensors",
        "vqserve_server/page/index.html",
        "vqserve_server/page/main.js",
        "vqserve_server/search/native/search.c",
        f"{DIST_INFO}/licenses/LICENSE",
    ],
)
def test_it_holds_what_is_no_code(names, name):
    assert name in names


def test_nothing_of_a_checkout_came_along(names):
    strangers = {"tests", "benchmarks", "examples", "docs", "__pycache__"}
    assert [name for name in names if strangers & set(name.split("/"))] == []


def test_its_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_bytes(archive.read(f"{DIST_INFO}/METADATA"))
        tags = message_from_bytes(archive.read(f"{DIST_INFO}/WHEEL"))
        scripts = archive.read(f"{DIST_INFO}/entry_points.txt").decode()
    assert metadata["License-Expression"] == "Apache-2.0"
    base = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in base if line.startswith("torch")]
    assert tags["Root-Is-Purelib"] == ("false" if COMPILED else "true")
    assert "vqserve = vqserve.__main__:main" in scripts
    assert "vqserved = vqserve_tools.__main__:main" in scripts


@pytest.mark.skipif(COMPILED is None, reason="the search is not compiled on this platform")
def test_its_library_loads(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        library = ctypes.CDLL(archive.extract(LIBRARY, tmp_path))
    assert library.vq_search_default
