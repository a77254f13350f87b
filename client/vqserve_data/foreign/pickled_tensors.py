"""The tensors and numpy arrays that the calls in a pickle would have made.

The formats: torch/_utils.py and torch/serialization.py, `_rebuild_*` and `persistent_load`; numpy's
`multiarray._reconstruct`, `ndarray.__setstate__` and `dtype.__setstate__`. Whatever differs from what those write is an
error, not a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from vqserve_data.foreign.pickled_values import (
    Global,
    Instance,
    PersistentId,
    PickleError,
    Table,
    described,
)

# Bytes of an element, for all types that torch has storages of.
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1, "complex128": 16, "complex64": 8, "qint8": 1, "qint32": 4, "quint8": 1, "quint4x2": 1, "quint2x4": 1,
}  # fmt: skip
# Types that torch has no storages of: their tensors are views of bytes.
_VIEWED_BYTES = {"uint16": 2, "uint32": 4, "uint64": 8}
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64", "QInt8Storage": "qint8", "QInt32Storage": "qint32", "QUInt8Storage": "quint8",
    "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4", "UntypedStorage": "uint8",
}  # fmt: skip
_NUMPY = {
    "f2": "float16", "f4": "float32", "f8": "float64", "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64",
    "u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64", "b1": "bool",
}  # fmt: skip
_TYPE = re.compile(r"[a-z][a-z0-9_]{,40}")
_MAX_AXES = 64
_MAX_LENGTH = 1 << 62
# A parameter of a class of its own around a tensor.
_MAX_WRAPPERS = 4
_MAX_KEY_CHARACTERS = 64
_NOT_DENSE = "is not a dense tensor with values"


@dataclass(frozen=True)
class Storage:
    """Numbers outside of the pickle, which several tensors can share.

    Attributes:
        key: its name in the file.
        dtype: name of the element type.
        length: number of elements that the pickle claims.
        start, stop: the part that tensors of this reference may use, in bytes.
    """

    key: str
    dtype: str
    length: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes of the whole storage."""
        return self.length * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class PickledTensor:
    """A tensor or a numpy array that is not read yet.

    Attributes:
        shape: lengths of the axes.
        dtype: name of the element type.
        strides: steps along the axes, in elements.
        offset: position of the first element, in elements from the start of `source`.
        source: the numbers: outside of the pickle, or in it as bytes or as text in Latin-1; None: they cannot be read.
        big_endian: byte order of numbers in the pickle.
        reason: why it cannot be read.
    """

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] = ()
    offset: int = 0
    source: Storage | bytes | str | None = None
    big_endian: bool = False
    reason: str = _NOT_DENSE

    @property
    def item_bytes(self) -> int:
        """Bytes of an element; 0: the type is not known."""
        return ITEM_BYTES.get(self.dtype, _VIEWED_BYTES.get(self.dtype, 0))

    @property
    def size(self) -> int:
        """Bytes of all elements, if each were stored once."""
        return math.prod(self.shape) * self.item_bytes

    @property
    def span(self) -> tuple[int, int]:
        """First and last byte (exclusive) in the source."""
        if 0 in self.shape:
            return 0, 0
        last = sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        return self.offset * self.item_bytes, (self.offset + last + 1) * self.item_bytes


def storage_of(reference: PersistentId) -> Storage | None:
    """Return the storage that a reference names; None: it names something else.

    Raises:
        PickleError: the reference is damaged.
    """
    value = reference.value
    if not isinstance(value, tuple) or len(value) not in (5, 6) or not isinstance(value[0], str):
        return None
    if value[0] != "storage":
        return None
    kind, key, length = value[1], value[2], value[4]
    if not isinstance(kind, Global) or kind.name not in _STORAGES:
        raise PickleError("has numbers of an unknown type: it is damaged, or of a newer format")
    if not isinstance(key, str) or len(key) > _MAX_KEY_CHARACTERS:
        raise _damaged()
    dtype = _STORAGES[kind.name]
    length, start, stop = _length(length), 0, _length(length)
    if len(value) == 6 and value[5] is not None:
        # Views of a storage, as the older format had them once: their own key, offset and length.
        view = value[5]
        if not isinstance(view, tuple) or len(view) != 3:
            raise _damaged()
        start, stop = _length(view[1]), _length(view[1]) + _length(view[2])
        if stop > length:
            raise _damaged()
    item_bytes = ITEM_BYTES[dtype]
    return Storage(key, dtype, length, start * item_bytes, stop * item_bytes)


def tensor_of(value: Instance) -> PickledTensor | None:
    """Return the tensor or the array that a call would have made; None: the call makes something else.

    Raises:
        PickleError: the arguments are not those that torch or numpy would write.
    """
    reason = ""
    for _ in range(_MAX_WRAPPERS):
        if value.path in _AROUND_A_TENSOR:
            inner = value.argument(0)
        elif value.path in _OF_A_CLASS:
            reason = reason or _reason_of(value.argument(1))
            inner = Instance(value.argument(0), value.argument(2))
        else:
            make = _MAKERS.get(value.path)
            tensor = None if make is None else make(value)
            return _unreadable(tensor.shape, tensor.dtype, reason) if tensor and reason else tensor
        if not isinstance(inner, Instance):
            break
        value = inner
    return _unreadable((), "unknown", reason)


def _reason_of(kind: object) -> str:
    if isinstance(kind, Global) and kind.path in _PLAIN:
        return ""
    return (
        f"is {described(kind)}, whose numbers can mean something else than a tensor's; where it was made, save "
        "tensor.as_subclass(torch.Tensor) in its place"
    )


def _unreadable(shape: tuple[int, ...], dtype: str, reason: str = "") -> PickledTensor:
    return PickledTensor(shape, dtype, reason=reason or _NOT_DENSE)


# torch.


def _strided(value: Instance) -> PickledTensor:
    """Of _rebuild_tensor, and of _rebuild_tensor_v2: storage, offset, shape, strides, gradient, hooks, metadata."""
    return _on_storage(value, None, value.argument(6))


def _strided_of_type(value: Instance) -> PickledTensor:
    """Of _rebuild_tensor_v3: the same, with a type in front of the metadata."""
    return _on_storage(value, value.argument(6), value.argument(7))


def _on_storage(value: Instance, dtype: object, metadata: object) -> PickledTensor:
    reference = value.argument(0)
    storage = storage_of(reference) if isinstance(reference, PersistentId) else None
    shape, strides = _lengths(value.argument(2)), _lengths(value.argument(3))
    if storage is None or len(shape) != len(strides):
        raise _damaged()
    name = storage.dtype if dtype is None else _torch_type(dtype)
    # Marks of a tensor that is stored conjugated or negated.
    if isinstance(metadata, Table) and metadata.named:
        return _unreadable(shape, name)
    return PickledTensor(shape, name, strides, _length(value.argument(1)), storage)


def _without_numbers(shape_at: int) -> Callable[[Instance], PickledTensor]:
    return lambda value: _unreadable(_shape_among((value.argument(shape_at),)), "unknown")


def _sparse(value: Instance) -> PickledTensor:
    parts = value.argument(1)
    return _unreadable(_shape_among(parts[:_MAX_AXES] if isinstance(parts, tuple) else ()), "unknown")


def _shape_among(values: tuple[object, ...]) -> tuple[int, ...]:
    for value in values:
        if isinstance(value, tuple) or (isinstance(value, Instance) and value.path == ("torch", "Size")):
            return _lengths(value)
    return ()


def _torch_type(value: object) -> str:
    if not isinstance(value, Global) or value.module != "torch" or not _TYPE.fullmatch(value.name):
        raise _damaged()
    return value.name


# numpy.


def _numpy_array(value: Instance) -> PickledTensor | None:
    """Of _reconstruct, whose state is: version, shape, type, whether the first axis is the fastest, data."""
    state = value.state
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    return _on_bytes(state[4], state[2], state[1], is_fortran=state[3] is True)


def _numpy_buffer(value: Instance) -> PickledTensor | None:
    """Of _frombuffer: data, type, shape, order."""
    data, dtype, shape, order = (value.argument(index) for index in range(4))
    return _on_bytes(data, dtype, shape, is_fortran=order == "F")


def _on_bytes(data: object, dtype: object, shape: object, *, is_fortran: bool) -> PickledTensor | None:
    if isinstance(data, Instance) and data.path == ("_codecs", "encode"):
        data = data.argument(0)
    if isinstance(data, Instance) and data.path == ("builtins", "bytes"):
        data = b""
    if not isinstance(data, bytes | str) or not isinstance(dtype, Instance) or dtype.path != ("numpy", "dtype"):
        return None
    code, state = dtype.argument(0), dtype.state
    name = _NUMPY.get(code) if isinstance(code, str) and len(code) == 2 else None
    if name is None:
        return None
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
    lengths = _lengths(shape)
    strides = _dense_strides(lengths[::-1])[::-1] if not is_fortran else _dense_strides(lengths)
    array = PickledTensor(lengths, name, strides, 0, data, big_endian=isinstance(order, str) and order == ">")
    if array.size != len(data):
        raise _damaged()
    return array


def _dense_strides(fastest_first: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for length in fastest_first:
        strides.append(step)
        step *= length
    return tuple(strides)


# Numbers.


def _lengths(value: object) -> tuple[int, ...]:
    if isinstance(value, Instance) and value.path == ("torch", "Size"):
        value = value.argument(0)
    if not isinstance(value, tuple | list) or len(value) > _MAX_AXES:
        raise _damaged()
    return tuple(_length(length) for length in value)


def _length(value: object) -> int:
    if type(value) is not int or not 0 <= value < _MAX_LENGTH:
        raise _damaged()
    return value


def _damaged() -> PickleError:
    return PickleError("is damaged: the description of a tensor cannot be read")


_PLAIN = {
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "Buffer"),
    ("torch.nn", "Parameter"),
    ("torch.nn", "Buffer"),
}
# Calls whose first argument is the tensor.
_AROUND_A_TENSOR = {
    ("torch._utils", name)
    for name in (
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_device_tensor_from_cpu_tensor",
        "_rebuild_device_tensor_from_numpy",
        "_rebuild_xla_tensor",
    )
}
# Calls whose arguments are a function, a class, and arguments of the function.
_OF_A_CLASS = {
    (module, name)
    for module in ("torch._tensor", "torch.tensor")
    for name in ("_rebuild_from_type", "_rebuild_from_type_v2")
}
_MAKERS: dict[tuple[str, str], Callable[[Instance], PickledTensor | None]] = {
    ("torch._utils", "_rebuild_tensor"): _strided,
    ("torch._utils", "_rebuild_tensor_v2"): _strided,
    ("torch._utils", "_rebuild_tensor_v3"): _strided_of_type,
    ("torch._utils", "_rebuild_qtensor"): _without_numbers(2),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _without_numbers(1),
    ("torch._utils", "_rebuild_wrapper_subclass"): _without_numbers(2),
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _sparse,
    ("torch._utils", "_rebuild_nested_tensor"): _without_numbers(9),
    **{(module, "_reconstruct"): _numpy_array for module in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{(module, "_frombuffer"): _numpy_buffer for module in ("numpy.core.numeric", "numpy._core.numeric")},
}
