"""Payloads: arrays survive the round trip, and wrong sizes are errors before memory is allocated."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vqserve import dtypes, payload
from vqserve.v1 import tokenizer_pb2 as pb

DTYPES = [dtype for dtype in pb.DType.values() if dtype != pb.DTYPE_UNSPECIFIED]
NUMPY = sorted({dtype.storage.str[1:] for dtype in dtypes.DTYPES})


@given(
    array=st.sampled_from(NUMPY).flatmap(
        lambda code: hnp.arrays(st.sampled_from([f"<{code}", f">{code}"]), hnp.array_shapes(min_dims=0, min_side=0))
    )
)
def test_round_trip(array):
    dtype = payload.dtype_of(array)
    data = payload.to_bytes(array, dtype)
    again = payload.from_bytes(data, dtype, array.shape)
    assert len(data) == array.size * payload.itemsize(dtype)
    np.testing.assert_array_equal(again, array)
    assert again.dtype == array.dtype.newbyteorder("<")
    assert not again.flags.writeable


@given(hnp.arrays(np.float32, (4, 6, 2), elements=st.floats(-9, 9, width=32)))
def test_strides_do_not_matter(array):
    expected = payload.to_bytes(np.ascontiguousarray(array[::2, ::-1].swapaxes(0, 2)), pb.DTYPE_FLOAT32)
    assert payload.to_bytes(array[::2, ::-1].swapaxes(0, 2), pb.DTYPE_FLOAT32) == expected


@given(hnp.arrays(np.uint16, hnp.array_shapes(min_side=0)))
def test_bfloat16_bits_travel_as_they_are(bits):
    data = payload.to_bytes(bits, pb.DTYPE_BFLOAT16)
    assert (payload.from_bytes(data, pb.DTYPE_BFLOAT16, bits.shape) == bits).all()


def test_bytes_are_little_endian_in_c_order():
    assert payload.to_bytes(np.array([[1, 2], [3, 4]], ">u2", order="F"), pb.DTYPE_UINT16) == b"\1\0\2\0\3\0\4\0"


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 1 << 64), max_size=6),
    data=st.binary(max_size=64),
)
def test_bytes_that_are_not_the_shapes_are_rejected(dtype, shape, data):
    text = f"the payload has {len(data)}"
    if math.prod(shape) * payload.itemsize(dtype) == len(data):
        # An axis of zero lets the others be as large as they like.
        if math.prod(length or 1 for length in shape) < 1 << 60:
            assert payload.from_bytes(data, dtype, shape).shape == tuple(shape)
            return
        text = "too large"
    with pytest.raises(payload.PayloadError, match=text):
        payload.from_bytes(data, dtype, shape)


@pytest.mark.parametrize(
    "shape", [(1 << 63, 1 << 63), (1 << 32, 1 << 32), (1 << 62, 4), (1,) * 40 + (5,), (1 << 64, 1 << 64, 1 << 64)]
)
def test_products_that_would_wrap_are_rejected(shape):
    with pytest.raises(payload.PayloadError):
        payload.from_bytes(b"", pb.DTYPE_UINT8, shape)


@pytest.mark.parametrize("shape", [(0, 1 << 63), (1 << 64, 0), (0,) * 70, (0, 1 << 62, 1 << 62)])
def test_empty_arrays_of_absurd_shape(shape):
    with pytest.raises(payload.PayloadError, match="too large"):
        payload.from_bytes(b"", pb.DTYPE_FLOAT64, shape)


@pytest.mark.parametrize("dtype", [pb.DTYPE_UNSPECIFIED, 10, -1, 1 << 31])
def test_types_that_are_none(dtype):
    with pytest.raises(payload.PayloadError, match="dtype must be set"):
        payload.from_bytes(b"", dtype, (0,))


@pytest.mark.parametrize("wrong", [bool, object, "c8", "i2", "V2"])
def test_arrays_that_do_not_travel(wrong):
    with pytest.raises(payload.PayloadError, match="cannot be sent"):
        payload.dtype_of(np.zeros(2, wrong))


@pytest.mark.parametrize("dtype", DTYPES)
def test_names(dtype):
    assert payload.dtype_of_name(payload.dtype_name(dtype)) == dtype
    assert payload.dtype_name(dtype) in {"bfloat16", *(str(np.dtype(code)) for code in NUMPY)}


@pytest.mark.parametrize("name", ["", "unspecified", "int8", "float", "DTYPE_FLOAT32"])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="on the wire"):
        payload.dtype_of_name(name)


def test_every_type_is_for_latents_or_for_indices():
    assert set(DTYPES) == payload.LATENT_DTYPES | payload.INDEX_DTYPES
    assert not payload.LATENT_DTYPES & payload.INDEX_DTYPES


@pytest.mark.parametrize("kind", [pb.EncodeRequest, pb.EncodeResponse, pb.DecodeRequest, pb.DecodeResponse])
def test_the_envelope_is_the_most_that_a_message_holds_beside_name_and_payload(kind):
    stats = {field.name: (1 << 64) - 1 for field in pb.ServedStats.DESCRIPTOR.fields if field.name != "batch_requests"}
    most = {
        "digest": "f" * 64,
        "expected_digest": "f" * 64,
        "shape": [(1 << 64) - 1] * 5,
        "stats": pb.ServedStats(**stats, batch_requests=(1 << 32) - 1),
    }
    fields = [field for field in kind.DESCRIPTOR.fields if field.name != "codebook" and field.number != 100]
    message = kind(**{field.name: most.get(field.name, 7 if field.name.endswith("dtype") else 1) for field in fields})
    assert [field for field, _ in message.ListFields()] == fields
    # Tags and lengths of the name and of a payload of 2 GiB.
    assert len(message.SerializeToString()) + 2 * (2 + 5) <= payload.ENVELOPE_BYTES


@given(st.integers(1, 1 << 32))
def test_index_dtype_is_the_smallest_that_holds_the_vocabulary(vocab_size):
    dtype = payload.index_dtype(vocab_size)
    assert payload.holds_vocabulary(dtype, vocab_size)
    for other in dtypes.INDICES:
        if other.storage.itemsize < payload.itemsize(dtype):
            assert not payload.holds_vocabulary(other.number, vocab_size)


@pytest.mark.parametrize("dtype", dtypes.INDICES, ids=lambda dtype: dtype.name)
def test_holds_vocabulary_to_the_last_index(dtype):
    most = int(np.iinfo(dtype.storage).max) + 1
    assert payload.holds_vocabulary(dtype.number, most)
    assert not payload.holds_vocabulary(dtype.number, most + 1)
