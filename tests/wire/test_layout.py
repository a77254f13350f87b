"""Layouts: where the channels are, and what that makes of a shape."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqserve.layout import (
    Layout,
    channel_axis,
    grid_shape,
    latents_shape,
    num_rows,
    parse_layout,
    resolve_layout,
)

FIRST, LAST = Layout.CHANNELS_FIRST, Layout.CHANNELS_LAST


@pytest.mark.parametrize(("rank", "expected"), [(2, LAST), (3, LAST), (4, FIRST), (5, FIRST)])
def test_defaults(rank, expected):
    assert resolve_layout(rank, None) is expected


@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize("default", [None, FIRST, LAST])
def test_the_caller_goes_before_the_codebook(rank, default):
    for asked in Layout:
        assert resolve_layout(rank, asked, default) is asked
    assert default is None or resolve_layout(rank, None, default) is default


def test_two_axes_have_their_channels_last():
    assert resolve_layout(2, LAST) is LAST
    # The codebook's default is for latents that have a choice.
    assert resolve_layout(2, None, FIRST) is LAST
    with pytest.raises(ValueError, match="channels_first needs at least 3 axes"):
        resolve_layout(2, FIRST)


@pytest.mark.parametrize("rank", [-1, 0, 1, 6, 100])
def test_other_ranks(rank):
    with pytest.raises(ValueError, match="2 to 5 axes"):
        resolve_layout(rank, None)


@given(
    grid=st.lists(st.integers(0, 1 << 63), min_size=1, max_size=4),
    channels=st.integers(1, 1 << 31),
    layout=st.sampled_from(Layout),
)
def test_grid_and_latents_are_each_others_inverse(grid, channels, layout):
    shape = latents_shape(grid, channels, layout)
    assert len(shape) == len(grid) + 1
    assert shape[channel_axis(layout)] == channels
    assert grid_shape(shape, layout) == tuple(grid)
    assert num_rows(grid) * channels == math.prod(shape)


def test_shapes_by_hand():
    assert latents_shape((2, 5, 6), 4, FIRST) == (2, 4, 5, 6)
    assert latents_shape((2, 5, 6), 4, LAST) == (2, 5, 6, 4)
    assert grid_shape((2, 4, 7, 5, 6), FIRST) == (2, 7, 5, 6)
    assert num_rows(()) == 1


def test_parse():
    assert parse_layout(None) is None
    assert parse_layout("channels_last") is LAST
    assert parse_layout(FIRST) is FIRST
    for wrong in ("", "nchw", "CHANNELS_LAST", 3):
        with pytest.raises(ValueError, match="'channels_first', 'channels_last' or None"):
            parse_layout(wrong)
