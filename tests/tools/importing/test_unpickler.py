"""The interpreter of pickles: what Python's own makes of harmless data, and of torch's files, it makes too."""

from __future__ import annotations

import ast
import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqserve.errors import ForeignCheckpointError
from vqserve_data.foreign import pickle_machine, pickled_names, pickled_tensors, pickled_values, unpickler
from vqserve_data.foreign.pickle_machine import Machine
from vqserve_data.foreign.pickled_values import Bag, Instance, PickleError, Table
from vqserve_tools.importing.files import open_foreign

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def loaded(data: bytes) -> object:
    return unpickler.load(Machine(data))


MADE = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "bytes"): bytes,
    ("_codecs", "encode"): str.encode,
}


def plain(value: object) -> object:
    """Return a value as Python's unpickler would have made it."""
    match value:
        case Table():
            return {key: plain(inside) for key, inside in [*value.named.items(), *(value.others or ())]}
        case Bag():
            return set(value.members)
        case Instance():
            made = MADE[value.path](*map(plain, value.arguments))
            return made if value.table is None else OrderedDict(plain(value.table))
        case list() | tuple():
            return type(value)(map(plain, value))
    return value


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.binary().map(bytearray)
)
KEYS = st.text() | st.integers(0, 1 << 70)
VALUES = st.recursive(
    SCALARS | st.sets(KEYS) | st.frozensets(KEYS),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
    ),
    max_leaves=30,
)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("is_optimized", [False, True])
def test_harmless_data_is_what_python_makes_of_it(protocol, is_optimized):
    @settings(max_examples=50)
    @given(VALUES)
    def check(value):
        data = pickle.dumps(value, protocol)
        if is_optimized:
            data = pickletools.optimize(data)
        # A bytearray in protocol 5 is bytes here, which is equal.
        assert plain(loaded(data)) == pickle.loads(data)  # noqa: S301
        with pytest.raises(PickleError):
            loaded(data[:-1])

    check()


def test_values_that_share_parts_share_them_here():
    shared: list[object] = [1]
    value = loaded(pickle.dumps([shared, (shared,), {"a": shared}]))
    assert value[0] is value[1][0] is value[2].named["a"]
    shared.append(shared)
    endless = loaded(pickle.dumps(shared))
    assert endless[1] is endless


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"S'it\\'s'\n.", "it's"),
        (b'S"a\\x41"\n.', "aA"),
        (b"U\x02\xff\xfe.", b"\xff\xfe"),
        (b"T\x02\x00\x00\x00ab.", "ab"),
        (b"I01\n.", True),
        (b"I00\n.", False),
        (b"I-7\n.", -7),
        (b"L-7L\n.", -7),
        (b"F1.5\n.", 1.5),
        (b"V\\u00e9\n.", "é"),
        (b"(I1\nI2\nl.", [1, 2]),
        (b"(I1\nI2\nt.", (1, 2)),
        (b"\x82\x05.", "extension 5"),
        (b"K\x07K\x08(K\x0910.", 7),
        (b"K\x072\x86.", (7, 7)),
        (b"K\x07\x94]\x94h\x00a.", [7]),
        (b"\x96\x02\x00\x00\x00\x00\x00\x00\x00ab\x98.", b"ab"),
    ],
)
def test_instructions_of_older_and_newer_pickles(data, value):
    found = loaded(data)
    assert (found.name if isinstance(value, str) and value.startswith("extension") else found) == value


def test_every_instruction_is_known():
    known = {ord(code.code) for code in pickletools.opcodes if code.name not in {"STOP", "NEXT_BUFFER"}}
    assert set(unpickler._INSTRUCTIONS) == known


@pytest.mark.parametrize("module", [unpickler, pickle_machine, pickled_values, pickled_tensors, pickled_names])
def test_the_modules_have_nothing_that_could_run_anything(module):
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in imported if name.startswith("vqserve_data.foreign.")}
    assert imported - ours <= {
        "__future__",
        "codecs",
        "collections.abc",
        "dataclasses",
        "math",
        "re",
        "struct",
        "typing",
    }
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "open", "getattr", "setattr", "vars", "globals", "__import__"}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {name for name in attributes if name.startswith("__") and name not in {"__init__", "__name__"}}


# Files of torch.


def tensors_of_every_kind() -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, generator=generator)
    state: dict[str, object] = {
        "plain": base,
        "transposed": base.T,
        "sliced": base[1:4, ::2],
        "same": base,
        "row": base[2],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base + 1),
        "with_attribute": torch.nn.Parameter(base + 2),
        "buffer": torch.nn.Buffer(base + 3),
        "channels_last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
    }
    state["with_attribute"].is_special = True
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
                  torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64):  # fmt: skip
        state[str(dtype).removeprefix("torch.")] = (base * 9).abs().to(dtype)
    return state


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_are_what_torch_makes_of_them(tmp_path, protocol, is_zip):
    source, state = tmp_path / "m.pt", tensors_of_every_kind()
    torch.save(state, source, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    with open_foreign(source) as arrays:
        assert list(arrays) == list(state)
        for name, array in arrays.items():
            tensor = state[name].detach()
            assert (array.shape, array.dtype) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            expected = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
            values = array.read()
            assert values.dtype == expected.dtype
            assert np.array_equal(values, expected)
            assert values.flags.c_contiguous


@pytest.mark.parametrize("protocol", [2, 5])
def test_numpy_arrays_beside_tensors(tmp_path, protocol):
    source, base = tmp_path / "m.pt", np.arange(12.0).reshape(3, 4)
    arrays = {"f8": base, "f4": base.astype("f4"), "fortran": np.asfortranarray(base), "big": base.astype(">f4"),
              "u1": base.astype("u1"),
              "bool": base > 3, "none": np.zeros((0, 2)), "scalar_array": np.array(1.5)}  # fmt: skip
    others = {
        "scalar": np.float64(3),
        "text": np.array(["a"]),
        "objects": np.array([{}]),
        "dates": np.array(["2020"], "M8"),
    }
    torch.save({**arrays, **others}, source, pickle_protocol=protocol)
    with open_foreign(source) as found:
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            values = found[name].read()
            assert np.array_equal(values, array)
            assert (values.dtype, found[name].shape) == (array.dtype.newbyteorder("="), array.shape)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_have_no_plain_values_are_named_and_not_read(tmp_path):
    source = tmp_path / "m.pt"
    state = {
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "meta": torch.zeros(2, 4, device="meta"),
        "negated": torch.view_as_complex(torch.ones(2, 2)).conj().imag,
        "float8": torch.zeros(2, 2).to(torch.float8_e4m3fn),
        "quantized": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
    }
    torch.save(state, source)
    with open_foreign(source) as arrays:
        shapes = {name: array.shape for name, array in arrays.items()}
        assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name, array in arrays.items():
            reason = "is of type float8_e4m3fn, which is not read" if name == "float8" else "is not a dense tensor"
            with pytest.raises(ForeignCheckpointError, match=f"m.pt: {name} {reason}"):
                array.read()


def test_big_endian_files(tmp_path):
    source = tmp_path / "m.pt"
    torch.save({"a": torch.arange(3.0)}, source)
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(source, "w") as archive:
        for name, content in members.items():
            big = np.frombuffer(content, "<f4").astype(">f4").tobytes() if name.endswith("data/0") else content
            archive.writestr(name, b"big" if name.endswith("byteorder") else big)
    with open_foreign(source) as arrays:
        assert arrays["a"].read().tolist() == [0, 1, 2]


def test_a_lone_tensor_and_a_file_in_memory(tmp_path):
    file = io.BytesIO()
    torch.save(torch.nn.Parameter(torch.ones(2, 2)), file)
    (tmp_path / "m.pt").write_bytes(file.getvalue())
    with open_foreign(tmp_path / "m.pt") as arrays:
        assert list(arrays) == [""]
        assert arrays[""].read().tolist() == [[1, 1], [1, 1]]
