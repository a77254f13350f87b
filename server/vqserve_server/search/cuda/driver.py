"""The functions of NVIDIA's driver that load compiled kernels and launch them: no compiler, no Triton.

They are called through ctypes, which releases the interpreter's lock meanwhile.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_uint, c_void_p

LIBRARY = "libcuda.so.1"
# Without a call of cuFuncSetAttribute a block has at most this much shared memory.
_SHARED_BYTES = 48 << 10
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_WARP = 32

# Functions by name, without the prefix "cu", and their arguments (CUDA driver API, cuda.h).
_FUNCTIONS: dict[str, tuple[type, ...]] = {
    "Init": (c_uint,),
    "GetErrorString": (c_int, POINTER(c_char_p)),
    "DeviceGet": (POINTER(c_int), c_int),
    "DevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "CtxPushCurrent_v2": (c_void_p,),
    "CtxPopCurrent_v2": (POINTER(c_void_p),),
    "ModuleLoadData": (POINTER(c_void_p), c_char_p),
    "ModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "FuncSetAttribute": (c_void_p, c_int, c_int),
    "LaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
}
# Triton's types of arguments that are no pointers, as `struct` writes them with the machine's own alignment.
_FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q"}
_FORMATS |= {"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}
# Triton's kernels have two further arguments: memory that the kernel needs beside its own, and memory of its profiler.
_SCRATCH = ("*i8", "*i8")


class DriverError(RuntimeError):
    """A function of the driver failed."""


class Driver:
    """The driver's library and the main context of one device, which torch uses as well; thread-safe."""

    def __init__(self, device: int, library: ctypes.CDLL | None = None) -> None:
        """Take the main context of a device.

        Args:
            device: its number, as torch counts devices.
            library: the driver's library; None: that of the system.

        Raises:
            DriverError: there is no driver, or no such device.
        """
        if library is None:
            try:
                library = ctypes.CDLL(LIBRARY)
            except OSError as error:
                raise DriverError(f"no NVIDIA driver: {error}") from error
        self._functions = {}
        for name, arguments in _FUNCTIONS.items():
            try:
                function = getattr(library, f"cu{name}")
            except AttributeError as error:
                raise DriverError(f"{LIBRARY} has no cu{name}: the driver is too old") from error
            function.argtypes = arguments
            function.restype = c_int
            self._functions[name] = function
        self._call("Init", 0)
        handle = c_int()
        self._call("DeviceGet", ctypes.byref(handle), device)
        # Never released: the kernels stay loaded to the end of the process.
        self._context = c_void_p()
        self._call("DevicePrimaryCtxRetain", ctypes.byref(self._context), handle)

    def load(self, cubin: bytes, entry: str, arguments: Sequence[str], *, warps: int, shared: int) -> Kernel:
        """Load one kernel into the device's memory.

        Args:
            cubin: machine code for this device.
            entry: name of the kernel in it.
            arguments: Triton's types of the arguments: "*fp32", "i32" ...
            warps: warps of a block.
            shared: bytes of shared memory of a block.

        Raises:
            DriverError: the code is not for this device, or the device has too little shared memory.
        """
        module, function = c_void_p(), c_void_p()
        with self._current():
            self._call("ModuleLoadData", ctypes.byref(module), cubin)
            self._call("ModuleGetFunction", ctypes.byref(function), module, entry.encode())
            if shared > _SHARED_BYTES:
                self._call("FuncSetAttribute", function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        return Kernel(self, function, Parameters(arguments), threads=warps * _WARP, shared=shared)

    def launch(self, function: c_void_p, *shape_and_stream: int, parameters: ctypes.Array[c_void_p]) -> None:
        """Start a function; see `Kernel.launch`.

        Args:
            function: the function.
            shape_and_stream: grid (3), block (3), bytes of shared memory, stream.
            parameters: an address for each parameter.
        """
        with self._current():
            self._call("LaunchKernel", function, *shape_and_stream, parameters, None)

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the context current: that of a thread may be another device's, or none before its first call."""
        self._call("CtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("CtxPopCurrent_v2", ctypes.byref(c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        error = self._functions[name](*arguments)
        if error:
            text = c_char_p()
            self._functions["GetErrorString"](error, ctypes.byref(text))
            raise DriverError(f"cu{name}: {(text.value or b'unknown error').decode()} ({error})")


class Kernel:
    """A kernel in a device's memory; thread-safe."""

    def __init__(
        self, driver: Driver, function: c_void_p, parameters: Parameters, *, threads: int, shared: int
    ) -> None:
        """Store the driver that loaded it, the function, its parameters, and threads and shared bytes of a block."""
        self._driver = driver
        self._function = function
        self._parameters = parameters
        self._threads = threads
        self._shared = shared

    def launch(self, grid: tuple[int, int, int], values: Sequence[float], stream: int) -> None:
        """Start it; the caller keeps the memory that pointers name until the stream has passed the kernel.

        Args:
            grid: numbers of blocks.
            values: numbers, and addresses in the device's memory, in the order of the arguments.
            stream: handle of the stream; 0: the default one.

        Raises:
            DriverError: the driver did not accept it, or the device has failed before.
        """
        parameters = self._parameters.pack(values)
        self._driver.launch(self._function, *grid, self._threads, 1, 1, self._shared, stream, parameters=parameters)


class Parameters:
    """The parameters of a kernel that Triton compiled, as cuLaunchKernel reads them: an address for each."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Lay out the arguments of a signature, and Triton's own behind them.

        Raises:
            DriverError: a type that cannot be passed.
        """
        # They are next to each other and aligned by their sizes, though cuLaunchKernel does not ask for it.
        self._count = len(arguments)
        formats = [_format(argument) for argument in (*arguments, *_SCRATCH)]
        self._struct = struct.Struct(f"@{''.join(formats)}")
        ends = [struct.calcsize(f"@{''.join(formats[: i + 1])}") for i in range(len(formats))]
        self._sizes = tuple(struct.calcsize(one) for one in formats)
        self._offsets = tuple(end - size for end, size in zip(ends, self._sizes, strict=True))
        self._array = c_void_p * len(formats)

    @property
    def layout(self) -> list[tuple[int, int]]:
        """Offset and size of each parameter, Triton's own included."""
        return list(zip(self._offsets, self._sizes, strict=True))

    def pack(self, values: Sequence[float]) -> ctypes.Array[c_void_p]:
        """Return the addresses of the values, which live as long as the array.

        Raises:
            DriverError: too many or too few values, or one that the type of its argument cannot hold.
        """
        if len(values) != self._count:
            raise DriverError(f"a kernel of {self._count} arguments got {len(values)}")
        try:
            packed = ctypes.create_string_buffer(self._struct.pack(*values, *(0,) * len(_SCRATCH)))
        except struct.error as error:
            raise DriverError(f"an argument does not fit its type: {error}") from error
        start = ctypes.addressof(packed)
        parameters = self._array(*(start + offset for offset in self._offsets))
        # The array holds addresses alone.
        parameters.packed = packed  # type: ignore[attr-defined]
        return parameters


def _format(argument: str) -> str:
    if argument.startswith("*"):
        return "Q"
    if argument not in _FORMATS:
        raise DriverError(f"a kernel with an argument of the type {argument} cannot be launched")
    return _FORMATS[argument]
