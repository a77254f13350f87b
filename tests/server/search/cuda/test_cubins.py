"""Kernels that are compiled ahead of time: how they are made, which are refused, and how they are launched."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from support.cubin import parameters_of
from support.fake_cuda import FakeCuda
from vqserve_server.search import Objective, SearchCounts, prepare
from vqserve_server.search.cuda import choice, cubins
from vqserve_server.search.cuda.choice import CompiledLauncher, kernel_searcher, launcher_for, why_unavailable
from vqserve_server.search.cuda.driver import Driver, Parameters
from vqserve_server.search.cuda.jit import JitLauncher
from vqserve_server.search.cuda.launcher import LaunchFailed
from vqserve_server.search.cuda.variants import all_variants
from vqserve_server.search.tiled import TiledSearcher

SOURCES = Path(cubins.__file__).parent
CUDA = torch.device("cuda", 0)
# One variant is enough to see how they are made; all take half a minute.
COMPILE = """
import sys
from vqserve_server.search.cuda import cubins
every = cubins.all_variants
cubins.all_variants = lambda architecture: every(architecture)[:1]
code = cubins.main([sys.argv[1], "80"])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder of cubins, made as the Dockerfile does: Triton is there, and three of our files."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    root = tmp_path_factory.mktemp("sources")
    package = root / "vqserve_server/search/cuda"
    package.mkdir(parents=True)
    for name in ("cubins.py", "kernels.py", "variants.py"):
        shutil.copy(SOURCES / name, package)
    distribution = metadata.distribution("triton")
    folders = {Path(str(file)).parts[0] for file in distribution.files or ()}
    for folder in ("triton", *(name for name in folders if name.endswith(".dist-info"))):
        (root / folder).symlink_to(distribution.locate_file(folder))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(root / "cache")}
    # -S: the environment's other packages cannot be imported.
    command = [sys.executable, "-S", "-c", COMPILE, root / "made"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 kernels, ")
    return root / "made"


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "compiled"))


@pytest.fixture
def cuda(tmp_path):
    fake = FakeCuda(tmp_path)
    fake.expect([8] * 4)
    return fake


def launcher(folder, cuda, capability=(8, 0)):
    return CompiledLauncher(cubins.read_index(folder), folder, capability, Driver(0, cuda.library), lambda: 0x51)


def test_a_compiled_kernel_takes_what_its_variant_says(made):
    [cubin] = cubins.read_index(made)
    variant = all_variants(80)[0]
    assert (cubin.name, cubin.architecture, cubin.warps) == (variant.name, 80, variant.num_warps)
    content = cubins.read(cubin, made)
    assert parameters_of(content) == Parameters(cubin.arguments).layout
    # Equal sources are compiled to equal files, wherever they are.
    assert str(made.parent).encode() not in content


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
def test_a_launch_passes_addresses_and_numbers(folder, cuda, capability):
    compiled = launcher(folder, cuda, capability)
    assert [line.split()[0] for line in cuda.take()][:2] == ["load", "function"]
    variant = all_variants(80)[0]
    tensors = [torch.empty(64) for _ in variant.signature]
    args = [one if kind.startswith("*") else 7 for one, (_, kind) in zip(tensors, variant.signature, strict=True)]
    compiled.launch(variant, (3, 2), args)
    [line] = cuda.take()
    words = line.split()
    assert words[3:6] == ["3", "2", "1"]
    assert words[7:10] == [str(32 * variant.num_warps), "1", "1"]
    assert words[-6:-4] == ["51", "parameters"]
    passed = [int.from_bytes(bytes.fromhex(word), "little") for word in words[-4:]]
    assert passed == [tensor.data_ptr() for tensor in tensors[:4]]
    with pytest.raises(ValueError, match="not aligned to 16 bytes"):
        compiled.launch(variant, (3, 2), [tensors[0][1:], *args[1:]])
    cuda.fail("cuLaunchKernel", 719)
    with pytest.raises(LaunchFailed, match=r"cuLaunchKernel: .* \(719\)"):
        compiled.launch(variant, (3, 2), args)


def spoil(folder, what):
    index = folder / "index.json"
    content = json.loads(index.read_text())
    if what == "nothing":
        shutil.rmtree(folder)
    elif what == "no json":
        index.write_text("{")
    elif what == "source":
        index.write_text(json.dumps(content | {"source": "0" * 64}))
    elif what == "format":
        index.write_text(json.dumps(content | {"format": 2}))
    else:
        file = folder / content["cubins"][0]["file"]
        if what == "missing file":
            file.unlink()
        elif what == "damaged file":
            file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("what", "capability", "text"),
    [
        ("nothing", (8, 0), "this installation has no compiled kernels"),
        ("no json", (8, 0), "the index of the compiled kernels cannot be read"),
        ("source", (8, 0), "made from other sources than these"),
        ("format", (8, 0), "made from other sources than these"),
        ("missing file", (8, 0), "a compiled kernel cannot be read"),
        ("damaged file", (8, 0), r"the compiled kernel sm_80/.*\.cubin is damaged"),
        ("capability", (7, 5), "no compiled kernels for compute capability 7.5"),
        ("capability", (9, 0), "no compiled kernels for compute capability 9.0"),
        ("capability", (12, 0), "no compiled kernels for compute capability 12.0"),
    ],
)
def test_what_a_device_cannot_run_is_refused(folder, cuda, what, capability, text):
    spoil(folder, what)
    with pytest.raises(cubins.Unusable, match=text):
        launcher(folder, cuda, capability)


@pytest.mark.parametrize(
    ("capability", "architecture", "runs"),
    [
        ((9, 0), 90, True),
        ((10, 0), 100, True),
        ((8, 9), 89, True),
        ((10, 3), 100, False),
        ((12, 0), 100, False),
        ((8, 6), 89, False),
    ],
)
def test_code_for_later_architectures_runs_on_no_other(capability, architecture, runs):
    index = [cubins.Cubin("k", one, "f", "", "k", [], warps=4, shared=0) for one in (80, 89, 90, 100)]
    if runs:
        [found] = cubins.cubins_for(index, capability, architecture)
        assert found.architecture == architecture
    else:
        with pytest.raises(cubins.Unusable):
            cubins.cubins_for(index, capability, architecture)


@pytest.fixture
def machine(monkeypatch, cuda):
    """Return a function that makes this a machine with a GPU, with or without cubins, Triton and a C compiler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(choice, "Driver", lambda device: Driver(device, cuda.library))
    find_spec, which = importlib.util.find_spec, shutil.which

    def make(folder, *, has_triton, has_compiler):
        monkeypatch.setattr(cubins, "FOLDER", folder)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: find_spec(name) if has_triton or name != "triton" else None
        )
        monkeypatch.setattr(shutil, "which", lambda name: which(name) if has_compiler else None)

    yield make
    choice._compiled.cache_clear()
    choice._tell.cache_clear()


def test_compiled_kernels_come_first_then_triton(machine, folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    machine(folder, has_triton=False, has_compiler=False)
    assert isinstance(launcher_for(CUDA), CompiledLauncher)
    assert launcher_for(CUDA) is launcher_for(CUDA)
    assert not caplog.messages
    choice._compiled.cache_clear()
    machine(tmp_path / "nothing", has_triton=True, has_compiler=True)
    assert isinstance(launcher_for(CUDA), JitLauncher)
    assert why_unavailable(CUDA) is None
    [line] = caplog.messages
    assert line.startswith('search_kernels by="Triton')
    assert "no compiled kernels" in line
    caplog.clear()
    machine(tmp_path / "nothing", has_triton=True, has_compiler=False)
    expected = (
        "this installation has no compiled kernels, and Triton finds no C compiler: install gcc or clang, or set CC"
    )
    assert why_unavailable(CUDA) == why_unavailable(CUDA) == expected
    [line] = caplog.messages
    assert line.startswith('search_kernels slower="torch')


def test_a_driver_that_does_not_take_them_is_a_reason(machine, folder, cuda):
    machine(folder, has_triton=False, has_compiler=False)
    cuda.fail("cuModuleLoadData", 209)
    assert "no kernel image is available for execution on the device (209), and Triton" in why_unavailable(CUDA)


def test_kernels_that_fail_while_serving_are_told_once_and_torch_searches(monkeypatch, caplog):
    class Broken:
        launches = 0

        def launch(self, variant, grid, args):
            Broken.launches += 1
            raise LaunchFailed("cc is gone")

    monkeypatch.setattr(choice, "launcher_for", lambda device: Broken())
    caplog.set_level(logging.WARNING)
    codes, rows = torch.randn(50, 4), torch.randn(20, 4)
    tiled = TiledSearcher(codes, None, Objective.L2, dtype=torch.float32)
    made = kernel_searcher(codes, None, Objective.L2, fallback=lambda: tiled)
    counts = SearchCounts()
    for _ in range(3):
        assert torch.equal(made.search(rows, counts), prepare(codes).search(rows))
    assert counts.rows == 60
    [line] = caplog.messages
    assert line.startswith("search_kernel_failed ")
    assert "cc is gone" in line
    assert Broken.launches == 1
