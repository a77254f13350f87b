"""Cutting arrays: no message over its limit, and not one bit of difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqserve.layout import Layout
from vqserve_client import MessageTooLarge, ServerError
from vqserve_client.arrays import cut_text, latents_cut, plan, rows_per_message

GRIDS = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@given(grid=GRIDS, max_rows=st.integers(1, 200))
@settings(max_examples=300)
def test_cuts_cover_the_grid_once_in_order_and_none_is_too_large(grid, max_rows):
    positions = np.arange(math.prod(grid)).reshape(grid)
    cuts = list(plan(grid, max_rows))
    assert len(cuts) == len(plan(grid, max_rows))
    assert all(positions[cut].size <= max_rows for cut in cuts)
    # Every cut is one contiguous run of the grid, so mapped files are read in order.
    assert np.concatenate([positions[cut].ravel() for cut in cuts]).tolist() == list(range(positions.size))


@given(grid=GRIDS, max_rows=st.integers(1, 200))
@settings(max_examples=200)
def test_no_more_cuts_than_twice_the_least(grid, max_rows):
    inner = [math.prod(grid[axis:]) for axis in range(len(grid) + 1)]
    axis = next(axis for axis in range(len(grid)) if inner[axis + 1] <= max_rows)
    runs = math.ceil(grid[axis] / (max_rows // inner[axis + 1]))
    expected = 1 if inner[0] <= max_rows else runs * math.prod(grid[:axis])
    assert len(plan(grid, max_rows)) == expected


def test_a_grid_without_tokens_is_one_request():
    assert [cut_text(cut) for cut in plan((0, 3), 5)] == ["[:, :]"]
    assert [cut_text(cut) for cut in plan((3, 10**12, 0), 5)] == ["[:, :, :]"]


def test_the_cut_of_latents_keeps_all_channels():
    (cut, *_) = plan((2, 6), 3)
    assert cut_text(latents_cut(cut, Layout.CHANNELS_FIRST)) == "[0:1, :, 0:3]"
    assert cut_text(latents_cut(cut, Layout.CHANNELS_LAST)) == "[0:1, 0:3, :]"


def test_rows_per_message_is_never_below_zero():
    assert rows_per_message(1024, 1000, 4, 4) == 0
    assert rows_per_message(1024, 12, 100, 4) == 5


LIMIT = 1024


@pytest.mark.parametrize("shape", [(100, 4), (2, 50, 4), (3, 4, 20, 20), (1, 4, 40, 30), (2, 4, 3, 7, 11)])
def test_chunked_equals_whole_bit_for_bit(serve_tiny, codes, connect, latents, shape):
    server = serve_tiny(
        codes("small"),
        **{"grpc.max_receive_message_length": LIMIT, "grpc.max_send_message_length": LIMIT},
    )
    whole_server = serve_tiny(codes("small"))
    whole, chunked = connect(whole_server.target), connect(server.target, max_message_bytes=LIMIT)
    array = latents(*shape)
    indices = chunked.encode(array)
    assert (indices == whole.encode(array)).all()
    assert len(server.requests) > 1
    server.requests.clear()
    for dtype in ("float32", "float64", "bfloat16"):
        for output in ("latents", "code_rows"):
            options = {"dtype": dtype, "output": output}
            decoded, expected = chunked.decode(indices, **options), whole.decode(indices, **options)
            assert decoded.dtype == expected.dtype
            assert decoded.tobytes() == expected.tobytes()
    tensor = torch.from_numpy(indices.astype(np.int64))
    assert torch.equal(chunked.decode(tensor, dtype="bfloat16"), whole.decode(tensor, dtype="bfloat16"))
    assert torch.equal(chunked.encode(torch.from_numpy(array)), tensor)


def test_the_reply_counts_as_well_as_the_request(serve_tiny, codes, connect):
    server = serve_tiny(codes("wide", num_codes=20, dim=500), **{"grpc.max_send_message_length": 1 << 16})
    client = connect(server.target, max_message_bytes=1 << 16)
    indices = np.arange(20, dtype=np.uint8)
    assert (client.decode(indices) == server.codes["wide"].decode(indices)).all()
    assert [list(request.shape) for request in server.requests] == [[10], [10]]


def test_a_token_that_fits_no_message(serve_tiny, codes, connect, latents):
    server = serve_tiny(codes("wide", num_codes=20, dim=500))
    client = connect(server.target, max_message_bytes=1024)
    with pytest.raises(MessageTooLarge, match="2000 bytes in the request"):
        client.encode(latents(3, 500))
    with pytest.raises(MessageTooLarge, match="4000 in the reply"):
        client.decode(np.arange(3))
    assert server.requests == []


def test_a_server_with_a_smaller_limit_says_so_and_is_not_asked_again(serve_tiny, codes, connect, latents):
    server = serve_tiny(codes("small"), **{"grpc.max_receive_message_length": 1000})
    with pytest.raises(MessageTooLarge, match="max_message_bytes"):
        connect(server.target).encode(latents(1000, 4))


def test_a_reply_over_the_clients_limit(tiny, connect, lying):
    tiny.script.extend([lying(latents=b"\0" * 10_000)])
    with pytest.raises(MessageTooLarge):
        connect(tiny.target, max_message_bytes=5000).decode(np.arange(3))


def test_errors_say_which_part_they_speak_of(tiny, connect, failing, latents):
    tiny.script.append(failing("INVALID_ARGUMENT", "the sum of latents is odd"))
    client = connect(tiny.target, max_message_bytes=1024, window=1)
    with pytest.raises(ValueError, match=r"odd; in the part latents\[0:1, :, 0:3, :\], from whose start"):
        client.encode(latents(2, 4, 9, 9))


def test_an_error_that_is_not_about_the_array_does_not_name_a_part(tiny, connect, failing, latents):
    tiny.script.append(failing("INTERNAL", "the server failed"))
    client = connect(tiny.target, max_message_bytes=1024, window=1)
    with pytest.raises(ServerError) as caught:
        client.encode(latents(4, 4, 20, 20))
    assert "in the part" not in str(caught.value)
