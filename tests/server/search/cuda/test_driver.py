"""Kernels loaded and launched through the driver: a library that stands in for it, beside Triton's launcher."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import struct
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest

from support.cubin import parameters_of
from support.fake_cuda import FakeCuda
from vqserve_server.search.cuda.driver import Driver, DriverError, Parameters

ARGUMENTS = ["*fp32", "i32", "*i8", "i64", "fp32", "i1", "*fp64", "u16", "i32"]
VALUES = [0x7F0000000100, -5, 0x7F0000000200, 1 << 40, 1.5, 1, 0, 65535, 9]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return FakeCuda(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def cuda(built):
    built.fail("", 0)
    built.take()
    built.expect([8, 4, 8, 8, 4, 1, 8, 2, 4, 8, 8])
    return built


def little_endian(value, size):
    packed = struct.pack("<f", value) if isinstance(value, float) else value.to_bytes(8, "little", signed=value < 0)
    return packed[:size].hex()


def test_a_kernel_is_loaded_and_launched_in_the_context_of_its_device(cuda):
    driver = Driver(1, cuda.library)
    kernel = driver.load(b"\x7fELF", "nearest", ARGUMENTS, warps=8, shared=100_000)
    assert cuda.take() == ["load \x7fELF in 1041", "function nearest", "attribute 8 = 100000"]
    kernel.launch((70000, 2, 1), VALUES, 0xABC)
    sizes = [8, 4, 8, 8, 4, 1, 8, 2, 4]
    expected = " ".join([*map(little_endian, VALUES, sizes), "00" * 8, "00" * 8])
    [line] = cuda.take()
    assert line == f"launch 7707 grid 70000 2 1 block 256 1 1 shared 100000 stream abc parameters {expected}"
    # A thread that never called the driver has no context.
    thread = threading.Thread(target=kernel.launch, args=((1, 1, 1), VALUES, 0))
    thread.start()
    thread.join()
    assert len(cuda.take()) == 1
    context = ctypes.c_void_p()
    cuda.library.cuCtxGetCurrent(ctypes.byref(context))
    assert context.value is None


def test_little_shared_memory_needs_no_permission(cuda):
    Driver(0, cuda.library).load(b"\x7fELF", "nearest", ARGUMENTS, warps=4, shared=48 << 10)
    assert [line.split()[0] for line in cuda.take()] == ["load", "function"]


@pytest.mark.parametrize(
    ("function", "code", "text"),
    [
        ("cuInit", 100, "cuInit: out of order (100)"),
        ("cuDeviceGet", 101, "cuDeviceGet: out of order (101)"),
        ("cuModuleLoadData", 209, "cuModuleLoadData: no kernel image is available for execution on the device (209)"),
        ("cuModuleGetFunction", 500, "cuModuleGetFunction: out of order (500)"),
        ("cuFuncSetAttribute", 1, "cuFuncSetAttribute: out of order (1)"),
        ("cuLaunchKernel", 719, "cuLaunchKernel: out of order (719)"),
    ],
)
def test_the_driver_s_errors_are_told_in_its_words(cuda, function, code, text):
    cuda.fail(function, code)
    with pytest.raises(DriverError) as caught:
        Driver(0, cuda.library).load(b"\x7fELF", "k", ["i32"], warps=4, shared=1 << 16).launch((1, 1, 1), [1], 0)
    assert str(caught.value) == text
    # Whatever fails, the thread has the context that it had.
    context = ctypes.c_void_p()
    cuda.library.cuCtxGetCurrent(ctypes.byref(context))
    assert context.value is None


def test_a_machine_without_the_driver_says_so(monkeypatch):
    monkeypatch.setattr("vqserve_server.search.cuda.driver.LIBRARY", "libcuda_of_nobody.so.1")
    with pytest.raises(DriverError, match="no NVIDIA driver: libcuda_of_nobody"):
        Driver(0)
    with pytest.raises(DriverError, match="has no cuInit: the driver is too old"):
        Driver(0, ctypes.CDLL(None))


def test_what_does_not_fit_is_not_launched():
    with pytest.raises(DriverError, match="type fp16"):
        Parameters(["*fp16", "fp16"])
    parameters = Parameters(["i32", "*fp32"])
    for values, text in (([1], "2 arguments got 1"), ([1 << 31, 0], "does not fit"), ([1, -1], "does not fit")):
        with pytest.raises(DriverError, match=text):
            parameters.pack(values)


COMPILED = """
import json, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import ASTSource

@triton.jit
def kernel(a, n, b, m, s, flag, c, w, k, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(a + at, mask=at < n) * s + (m + w + k).to(tl.float32)
    tl.store(b + at, (value > 0) & flag, mask=at < n)
    tl.store(c + at, value.to(tl.float64), mask=at < n)

types = json.loads(sys.argv[1])
signature = dict(zip(kernel.arg_names, [*types, "constexpr"]))
source = ASTSource(kernel, signature, constexprs={"BLOCK": 64})
compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 8})
open(sys.argv[2], "wb").write(compiled.asm["cubin"])
if len(sys.argv) > 3:
    triton.runtime.driver.set_active(CudaDriver())
    launcher = triton.runtime.driver.active.launcher_cls(source, compiled.metadata)
    import ctypes
    fake = ctypes.CDLL("libcuda.so.1")
    sizes = [8, 4, 8, 8, 4, 1, 8, 2, 4, 8, 8]
    fake.fake_expect((ctypes.c_int * len(sizes))(*sizes), len(sizes))
    fake.fake_log.restype = ctypes.c_char_p
    launcher(70000, 2, 1, 0xABC, 0x7707, (8, 1, 100000), None, None, None, *json.loads(sys.argv[3]), 64)
    print(fake.fake_log().decode(), end="")
"""


def compile_with_triton(folder, *values, library=None):
    """Compile a kernel in a process of its own, as the library must not be that of this one; return what it printed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    script = folder / "compiled.py"
    script.write_text(COMPILED)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    if library is not None:
        environment |= {"TRITON_LIBCUDA_PATH": str(library.parent), "LD_LIBRARY_PATH": str(library.parent)}
    command = [sys.executable, script, json.dumps(ARGUMENTS), folder / "kernel.cubin", *map(json.dumps, values)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_layout_is_that_of_the_machine_code(tmp_path):
    compile_with_triton(tmp_path)
    assert parameters_of((tmp_path / "kernel.cubin").read_bytes()) == Parameters(ARGUMENTS).layout


@pytest.mark.long
@pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="Triton compiles its launcher with Python.h"
)
def test_parameters_are_those_of_triton_s_launcher(cuda, tmp_path):
    kernel = Driver(0, cuda.library).load(b"\x7fELF", "nearest", ARGUMENTS, warps=8, shared=100_000)
    cuda.take()
    kernel.launch((70000, 2, 1), VALUES, 0xABC)
    [ours] = cuda.take()
    assert compile_with_triton(tmp_path, VALUES, library=cuda.path).splitlines() == [ours]
