"""Validation against a plain reading of what is allowed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vqserve.codebook_info import CodebookInfo
from vqserve.layout import Layout
from vqserve.validation import check_has_output, check_indices, check_indices_shape, check_latents_shape
from vqserve_server import validation
from vqserve_server.errors import IndexOutOfRange, InvalidDtype, InvalidOption, InvalidShape, NonFiniteLatents

INFO = CodebookInfo(
    name="c", digest="0" * 64, kind="vq", num_codes=7, vocab_size=7, input_dim=4, code_dim=4, output_dim=4
)


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((2, 4), None, Layout.CHANNELS_LAST),
        ((2, 3, 4), None, Layout.CHANNELS_LAST),
        ((2, 4, 3), "channels_first", Layout.CHANNELS_FIRST),
        ((2, 4, 3, 3), None, Layout.CHANNELS_FIRST),
        ((2, 3, 3, 4), "channels_last", Layout.CHANNELS_LAST),
        ((2, 4, 3, 3, 3), None, Layout.CHANNELS_FIRST),
        ((0, 4, 0, 3), None, Layout.CHANNELS_FIRST),
    ],
)
def test_layout_of_latents(shape, layout, expected):
    assert check_latents_shape(shape, layout, info=INFO) is expected


@pytest.mark.parametrize("shape", [(), (4,), (4,) * 6, (2, 5), (2, 3, 3, 4), (2, 4, 3)])
def test_shapes_that_are_rejected_name_what_is_wrong(shape):
    with pytest.raises(InvalidShape, match=r"channels|axes"):
        check_latents_shape(shape, None, info=INFO)


def test_two_axes_have_no_channels_first():
    with pytest.raises(InvalidShape, match="at least 3 axes"):
        check_latents_shape((4, 4), "channels_first", info=INFO)


def test_unknown_layout_names_the_known_ones():
    with pytest.raises(InvalidOption, match="channels_last"):
        check_latents_shape((2, 4), "nchw", info=INFO)


def test_sizes_that_overflow_are_rejected_also_beside_an_empty_axis():
    with pytest.raises(InvalidShape, match="too large"):
        check_latents_shape((0, 4, 1 << 31, 1 << 31), None, info=INFO)
    with pytest.raises(InvalidShape, match="more than can be held"):
        check_indices_shape((0, 1 << 31, 1 << 31), None, info=INFO)


@pytest.mark.parametrize("rank", [0, 5])
def test_ranks_of_indices(rank):
    with pytest.raises(InvalidShape, match="1 to 4 axes"):
        check_indices_shape((1,) * rank, None, info=INFO)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", ">f2"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_position_is_that_in_the_callers_array(dtype, value):
    latents = np.zeros((2, 4, 3, 3), dtype)
    latents[1, 2, 0, 1] = value
    with pytest.raises(NonFiniteLatents, match=r"latents\[1, 2, 0, 1\] is " + str(value)):
        validation.check_finite(latents)
    # Not the position in memory: a transposed view has other axes.
    with pytest.raises(NonFiniteLatents, match=r"latents\[1, 0, 2, 1\]"):
        validation.check_finite(latents.transpose(3, 2, 1, 0)[:, :, :, :].copy(order="F"))


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
        elements=st.sampled_from([0.0, 1.5, -2.0, 65504.0, np.nan, np.inf, -np.inf]),
    )
)
def test_first_non_finite_is_the_first_in_c_order(array):
    bad = np.argwhere(~np.isfinite(array))
    expected = tuple(bad[0].tolist()) if len(bad) else None
    assert validation.first_non_finite(array) == expected


def test_the_largest_numbers_are_finite():
    validation.check_finite(np.full(9, np.finfo(np.float32).max, np.float32))
    validation.check_finite(np.full(9, np.finfo(np.float16).max, np.float16))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64])
def test_indices_of_every_type(dtype):
    check_indices(np.array([[0, 6]], dtype), decodable=7)
    with pytest.raises(IndexOutOfRange, match=r"indices\[0, 1\] is 7, not in \[0, 7\)"):
        check_indices(np.array([[0, 7]], dtype), decodable=7)
    check_indices(np.array([np.iinfo(dtype).max], dtype), decodable=1 << 64)


def test_indices_never_wrap():
    with pytest.raises(IndexOutOfRange, match=r"indices\[1\] is 18446744073709551615"):
        check_indices(np.array([0, (1 << 64) - 1], np.uint64), decodable=7)
    with pytest.raises(IndexOutOfRange, match=r"indices\[0\] is -1"):
        check_indices(np.array([-1, 9], np.int8), decodable=1000)
    with pytest.raises(IndexOutOfRange, match=r"indices\[1\] is -128"):
        check_indices(np.array([100, -128], np.int8), decodable=1 << 32)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64])
@pytest.mark.parametrize("axis", [1, -1])
def test_indices_of_stages_of_every_type(dtype, axis):
    # Some types do not hold all sizes.
    sizes = (5, 1 << 32, 200, 7, 1)
    most = [min(size - 1, int(np.iinfo(dtype).max)) for size in sizes]

    def check(rows):
        array = np.array([[row] for row in rows], dtype)
        moved = array if axis == -1 else np.moveaxis(array, -1, 1)
        validation.check_indices(moved, decodable=1 << 32, stage_sizes=sizes, axis=axis)

    for count in range(1, 6):
        check([[0] * count, most[:count]])
    for stage, size in ((0, 5), (3, 7), (4, 1)):
        wrong = list(most)
        wrong[stage] = size
        position = f"1, 0, {stage}" if axis == -1 else f"1, {stage}, 0"
        match = rf"indices\[{position}\] is {size}, not in \[0, {size}\), the vocabulary of stage {stage}"
        with pytest.raises(IndexOutOfRange, match=match):
            check([most, wrong])


def test_indices_of_stages_never_wrap():
    with pytest.raises(IndexOutOfRange, match=r"indices\[0, 1\] is 18446744073709551615, not in \[0, 9\)"):
        validation.check_indices(np.array([[1, (1 << 64) - 1]], np.uint64), decodable=300, stage_sizes=(300, 9))
    with pytest.raises(IndexOutOfRange, match=r"indices\[0, 0\] is -1, not in \[0, 300\), the vocabulary of stage 0"):
        validation.check_indices(np.array([[-1, 3]], np.int8), decodable=300, stage_sizes=(300, 9))
    validation.check_indices(np.empty((0, 2), np.int64), decodable=300, stage_sizes=(300, 9))


def test_no_indices_are_in_range():
    check_indices(np.empty((0, 3), np.int64), decodable=1)


@pytest.mark.parametrize("dtype", [np.bool_, np.float32, np.complex64, object])
def test_other_types_are_no_indices(dtype):
    with pytest.raises(InvalidDtype, match="integers"):
        check_indices(np.zeros(3, dtype), decodable=7)


def test_infos_layout_is_the_default():
    info = CodebookInfo(**{**vars(INFO), "layout": Layout.CHANNELS_FIRST})
    assert check_latents_shape((2, 4, 3), None, info=info) is Layout.CHANNELS_FIRST


RESIDUAL = replace(INFO, kind="rvq", num_quantizers=5, layout=Layout.CHANNELS_FIRST)


@pytest.mark.parametrize(
    ("shape", "layout", "count", "expected"),
    [
        ((9, 5), None, None, Layout.CHANNELS_LAST),
        ((2, 5, 9), None, None, Layout.CHANNELS_FIRST),
        ((2, 9, 5), "channels_last", None, Layout.CHANNELS_LAST),
        ((2, 5, 3, 3), None, 2, Layout.CHANNELS_FIRST),
        ((2, 2, 3, 3), None, 2, Layout.CHANNELS_FIRST),
        ((0, 3, 3, 3, 1), None, 1, Layout.CHANNELS_FIRST),
    ],
)
def test_indices_with_stages(shape, layout, count, expected):
    assert check_indices_shape(shape, layout, info=RESIDUAL, num_quantizers=count) is expected


@pytest.mark.parametrize(
    ("shape", "count", "match"),
    [
        ((5,), None, "2 to 5 axes, not 1"),
        ((5,) * 6, None, "2 to 5 axes, not 6"),
        ((2, 4, 9), None, "have 4 for a token in layout channels_first, expected 5: pass num_quantizers"),
        ((1, 1, 9), 2, "have 1 for a token in layout channels_first, expected 2 to 5$"),
        ((5, 1, 9), None, r"have 1 for a token .*, expected 5: are they \(n_q, b, ...\)\? swapaxes\(0, 1\) first$"),
        ((2, 6), 2, "have 6 for a token in layout channels_last, expected 2 to 5$"),
        ((0, 5, 1 << 31, 1 << 31), None, "more than can be held"),
    ],
)
def test_indices_without_their_stages(shape, count, match):
    with pytest.raises(InvalidShape, match=match):
        check_indices_shape(shape, None, info=RESIDUAL, num_quantizers=count)


def test_code_rows_of_stages():
    check_has_output("latents", info=RESIDUAL)
    check_has_output("code_rows", info=INFO)
    with pytest.raises(InvalidOption, match="'c' has stages"):
        check_has_output("code_rows", info=RESIDUAL)


def test_a_kind_that_is_not_known_here_has_stages_if_it_has_several_indices():
    assert replace(INFO, kind="new", num_quantizers=2).has_stages
    assert replace(INFO, kind="rvq").has_stages
    assert not replace(INFO, kind="new").has_stages
