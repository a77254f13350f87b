"""Arrays of every kind, there and back, with both clients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vqserve.codebook_info import CodebookInfo
from vqserve.layout import Layout

pytestmark = pytest.mark.filterwarnings("error")


def expected_indices(tiny, latents, axis):
    rows = np.moveaxis(np.asarray(latents, np.float64), axis, -1)
    return tiny.codes["small"].encode(rows.reshape(-1, 4)).reshape(rows.shape[:-1])


@pytest.mark.parametrize(
    ("shape", "layout", "axis"),
    [
        ((7, 4), None, -1),
        ((2, 5, 4), None, -1),
        ((2, 4, 5), "channels_first", 1),
        ((2, 4, 3, 5), None, 1),
        ((2, 3, 5, 4), "channels_last", -1),
        ((1, 4, 2, 3, 2), None, 1),
        ((0, 4, 3, 3), None, 1),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_encode_numpy(tiny, connect, latents, shape, layout, axis, dtype):
    array = latents(*shape, dtype=dtype)
    indices = connect(tiny.target).encode(array, layout=layout)
    assert type(indices) is np.ndarray
    assert indices.dtype == np.uint16
    assert indices.flags.writeable
    np.testing.assert_array_equal(indices, expected_indices(tiny, array, axis))


@pytest.mark.parametrize("layout", [None, "channels_first", "channels_last"])
def test_decode_numpy(tiny, connect, layout):
    indices = np.arange(24).reshape(2, 3, 4)
    decoded = connect(tiny.target).decode(indices, layout=layout)
    rows = tiny.codes["small"].decode(indices)
    expected = rows if layout == "channels_last" else np.moveaxis(rows, -1, 1)
    np.testing.assert_array_equal(decoded, expected)
    assert decoded.dtype == np.float32


def test_decode_code_rows_and_dtypes(tiny, connect):
    client = connect(tiny.target)
    indices = np.arange(6, dtype=np.uint8)
    rows = tiny.codes["small"].rows[:6]
    assert (client.decode(indices, output="code_rows") == rows).all()
    for dtype in ("float16", "float64"):
        decoded = client.decode(indices, output="code_rows", dtype=dtype)
        assert decoded.dtype == np.dtype(dtype)
        assert (decoded == rows.astype(dtype)).all()


def test_bfloat16_is_float32_for_numpy_and_itself_for_torch(tiny, connect):
    client = connect(tiny.target)
    rows = torch.from_numpy(tiny.codes["small"].rows[:6]).to(torch.bfloat16)
    as_numpy = client.decode(np.arange(6), output="code_rows", dtype="bfloat16")
    assert as_numpy.dtype == np.float32
    assert (as_numpy == rows.float().numpy()).all()
    as_torch = client.decode(torch.arange(6), output="code_rows", dtype="bfloat16")
    assert as_torch.dtype == torch.bfloat16
    assert torch.equal(as_torch, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_torch_in_torch_out(tiny, connect, latents, dtype):
    client = connect(tiny.target)
    tensor = torch.from_numpy(latents(2, 4, 3, 5)).to(dtype)
    indices = client.encode(tensor)
    assert isinstance(indices, torch.Tensor)
    assert indices.dtype == torch.int64
    assert (indices.numpy() == expected_indices(tiny, tensor.double().numpy(), 1)).all()
    decoded = client.decode(indices)
    assert decoded.dtype == torch.float32
    assert decoded.shape == (2, 8, 3, 5)


def test_awkward_arrays(tiny, connect, latents):
    client = connect(tiny.target)
    array = latents(6, 4, 6, 6)
    expected = client.encode(array)
    big_endian = array.astype(">f4")
    fortran = np.asfortranarray(array)
    readonly = array.copy()
    readonly.flags.writeable = False
    for same in (big_endian, fortran, readonly, array[::-1][::-1], array.view(np.matrix) if array.ndim == 2 else array):
        assert (client.encode(same) == expected).all()
    assert (client.encode(array[::2, :, ::3]) == expected[::2, ::3]).all()
    assert (client.encode(array.transpose(0, 2, 3, 1), layout="channels_last") == expected).all()
    assert (client.decode(expected.astype(">u2")) == client.decode(expected)).all()
    assert (client.decode(expected[:, ::2]) == client.decode(expected)[:, :, ::2]).all()


def test_awkward_tensors(tiny, connect, latents):
    client = connect(tiny.target)
    array = latents(6, 4, 6, 6)
    expected = torch.from_numpy(client.encode(array).astype(np.int64))
    tensor = torch.from_numpy(array)
    assert torch.equal(client.encode(tensor.clone().requires_grad_()), expected)
    assert torch.equal(client.encode(torch.nn.Parameter(tensor.clone())), expected)
    assert torch.equal(client.encode(tensor.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(client.encode(tensor[::2, :, 1:]), expected[::2, 1:])
    negated = torch.imag(torch.complex(torch.zeros_like(tensor), -tensor).conj())
    assert negated.is_neg()
    assert torch.equal(client.encode(negated), expected)
    strided = tensor.to(torch.bfloat16)[:, :, ::2]
    assert torch.equal(client.encode(strided), client.encode(strided.float()))


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">i2", ">u8"])
def test_indices_of_every_integer(tiny, connect, dtype):
    indices = np.array([0, 1, 99], dtype)
    assert (connect(tiny.target).decode(indices) == tiny.codes["small"].decode(np.array([0, 1, 99]))).all()


@pytest.mark.parametrize(
    "vocabulary", [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_smallest_type_that_holds_the_vocabulary(serve_tiny, codes, connect, vocabulary):
    size, dtype = vocabulary
    server = serve_tiny(codes("sized", num_codes=size, dim=1))
    assert connect(server.target).encode(np.zeros((2, 1), np.float32)).dtype == dtype


def test_the_codebooks_own_layout_counts(serve_tiny, codes, connect, latents):
    server = serve_tiny(codes("last"))
    server.replace("last", layout=Layout.CHANNELS_LAST)
    client = connect(server.target)
    array = latents(2, 3, 5, 4)
    assert client.encode(array).shape == (2, 3, 5)
    assert client.decode(client.encode(array)).shape == (2, 3, 5, 8)


def test_codebooks(tiny, connect):
    (info,) = connect(tiny.target).codebooks()
    assert isinstance(info, CodebookInfo)
    assert info == tiny.codes["small"].info


@pytest.mark.parametrize("wrong", [[[1.0, 2.0]], 1.0, None, "text", np.float32(1), np.ma.masked_array(np.ones((2, 4)))])
def test_what_is_no_array_is_a_type_error(tiny, connect, wrong):
    client = connect(tiny.target)
    for call in (client.encode, client.decode):
        with pytest.raises(TypeError, match=r"numpy array or a torch tensor|masked"):
            call(wrong)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (np.ones((2, 4), object), "object"),
        (np.ones((2, 4), np.int32), "int32"),
        (np.ones((2, 4), np.complex64), "complex64"),
        (np.ones((2, 4), np.longdouble), "longdouble|float128"),
        (np.ones((2, 4), "V8"), "V8|void"),
        (np.ones((2, 3), np.float32), "3 channels"),
        (np.ones((2, 3, 4, 4), np.float32), "3 channels"),
        (np.ones(4, np.float32), "2 to 5 axes"),
        (np.ones((), np.float32), "2 to 5 axes"),
        (np.ones((1, 4, 1, 1, 1, 1), np.float32), "2 to 5 axes"),
        (torch.ones(2, 4, dtype=torch.int32), "int32"),
        (torch.ones(2, 4, dtype=torch.complex64), "complex64"),
    ],
)
def test_latents_that_cannot_be_served(tiny, connect, wrong, text):
    with pytest.raises(ValueError, match=text):
        connect(tiny.target).encode(wrong)
    assert tiny.requests == []


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (np.ones(3, np.float32), "float32"),
        (np.ones(3, bool), "bool"),
        (np.ones(3, object), "object"),
        (np.array(3), "1 to 4 axes"),
        (np.ones((1,) * 5, np.int64), "1 to 4 axes"),
        (np.array([1 << 63], np.uint64), rf"{1 << 63}, not in \[0, 300\)"),
        (torch.ones(3, dtype=torch.bool), "bool"),
        (torch.ones(3, dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_indices_that_cannot_be_served(tiny, connect, wrong, text):
    with pytest.raises(ValueError, match=text):
        connect(tiny.target).decode(wrong)
    assert tiny.requests == []


def test_tensors_without_values(tiny, connect):
    client = connect(tiny.target)
    for wrong in (torch.ones(2, 4, device="meta"), torch.ones(2, 4).to_sparse()):
        with pytest.raises(TypeError, match="dense torch tensor"):
            client.encode(wrong)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layout": "nchw"}, "nchw"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": np.int8}, "int8"),
        ({"output": "codes"}, "codes"),
        ({"timeout": 0}, "above 0"),
        ({"timeout": float("nan")}, "above 0"),
        ({"digest": "abc"}, "64 lower-case"),
        ({"codebook": ""}, "must not be empty"),
    ],
)
def test_options_that_make_no_sense(tiny, connect, options, text):
    client = connect(tiny.target)
    with pytest.raises(ValueError, match=text):
        client.decode(np.arange(3), **options)
    # The error comes when the generator is made, not with its first result.
    with pytest.raises(ValueError, match=text):
        next(client.decode_many([np.arange(3)], **options))
    assert tiny.requests == []


def test_channels_first_needs_an_axis_for_it(tiny, connect):
    with pytest.raises(ValueError, match="channels_first"):
        connect(tiny.target).encode(np.ones((4, 4), np.float32), layout="channels_first")
    with pytest.raises(ValueError, match="channels_first"):
        connect(tiny.target).decode(np.arange(4), layout="channels_first")
