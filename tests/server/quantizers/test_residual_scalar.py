"""Residual FSQ: stage by stage the digits that the formula gives in exact arithmetic, and what is left for the next."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import exact
from support.tanh import tanh_between
from vqserve.layout import Layout
from vqserve_server.errors import (
    CodebookError,
    IndexOutOfRange,
    InvalidDtype,
    InvalidOption,
    InvalidShape,
    NonFiniteLatents,
)
from vqserve_server.quantizers import FiniteScalarQuantizer, ResidualFiniteScalarQuantizer, freeze
from vqserve_server.quantizers.fsq_boundaries import stage_boundaries
from vqserve_server.quantizers.inference.first_bound import Curve, FirstBound
from vqserve_server.search.quotients import round_fraction

FAST = settings(max_examples=40, derandomize=True, database=None, deadline=None)
BOUNDS = ("atanh_twice", "atanh", "symmetric", "soft_clamp")
SCALES = ("levels_minus_one", "levels")
CPU = torch.device("cpu")


# The formulas, in rationals.


def bounded(x: Fraction, level: int, kind: str) -> tuple[Fraction, Fraction]:
    """Two rationals around what the kind of bound makes of a channel."""
    if kind == "soft_clamp":
        limit = Fraction(level, level - 1)
        return tuple(limit * t for t in tanh_between(x / limit))
    half, offset = Fraction(1001 * (level - 1), 2000), Fraction(1 - level % 2, 2)
    # tanh(x + atanh(q)) = (t + q) / (1 + q t)
    q = offset / half
    return tuple((t + q) / (1 + q * t) * half - offset for t in tanh_between(x))


def digit(x: Fraction, level: int, bound: str) -> int:
    if bound in ("symmetric", "soft_clamp"):
        edges = (min(max(x, Fraction(-1)), Fraction(1)),) * 2 if bound == "soft_clamp" else tanh_between(x)
        found = {math.floor((level - 1) * (edge + 1) / 2 + Fraction(1, 2)) for edge in edges}
    else:
        found = {round(value) + level // 2 for value in bounded(x, level, "atanh")}
    (only,) = found
    return min(max(only, 0), level - 1)


def value(digit: int, level: int, bound: str) -> Fraction:
    if bound in ("symmetric", "soft_clamp"):
        return Fraction(2 * digit, level - 1) - 1
    return Fraction(digit - level // 2, level // 2)


def first(x: float, level: int, bound: str) -> float:
    """r_0 of a channel."""
    if bound not in ("atanh_twice", "soft_clamp"):
        return x
    near = {float(round_fraction(edge)) + 0.0 for edge in bounded(Fraction(x), level, bound)}
    (only,) = near
    return only


def oracle(quantizer: ResidualFiniteScalarQuantizer, row: list[float], dtype: type) -> tuple[list[int], list[float]]:
    """The indices of one latent without projections, and what they decode to."""
    indices, decoded, count = [0] * quantizer.num_quantizers, [], quantizer.groups
    levels, width, number = quantizer.levels, quantizer.code_dim, type(np.float32(0))
    if quantizer.bound in ("atanh", "symmetric"):
        number = dtype
    for group in range(count):
        for place, level in enumerate(levels):
            residual = number(first(row[group * width + place], level, quantizer.bound))
            base = level - 1 if quantizer.scales == "levels_minus_one" else level
            total = None
            for stage in range(quantizer.num_quantizers // count):
                found = digit(Fraction(float(residual)) * base**stage, level, quantizer.bound)
                indices[stage * count + group] += found * math.prod(levels[:place])
                part = exact.round32(value(found, level, quantizer.bound) / base**stage)
                residual = residual - part
                total = part if total is None else total + part
            decoded.append(float(total))
    return indices, decoded


def neighbours(number: float, dtype: type) -> list[float]:
    """The numbers of a type around a real one."""
    near = dtype(number)
    return [float(x) for x in (np.nextafter(near, dtype(-np.inf)), near, np.nextafter(near, dtype(np.inf)))]


# Boundaries.


@pytest.mark.parametrize(
    ("bound", "of_stage"), [("atanh", "atanh"), ("symmetric", "symmetric"), ("soft_clamp", "clamp")]
)
@pytest.mark.parametrize("level", [2, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("scales", SCALES)
def test_boundaries_of_every_stage_are_where_the_formula_jumps(bound, of_stage, level, scales):
    quantizer = ResidualFiniteScalarQuantizer([level], 4, bound, scales)
    base = level - 1 if scales == "levels_minus_one" else level
    divisors = tuple(base**stage for stage in range(4))
    edges = stage_boundaries(level, of_stage, divisors)
    assert edges.shape == (4, level - 1)
    for stage, grid in enumerate(freeze(quantizer, device="cpu")._parts[0].stages):
        for dtype in (np.float32, np.float64):
            near = [z for edge in edges[stage] for z in neighbours(edge, dtype)]
            z = np.array([*near, *neighbours(0.0, dtype), -1e30, 1e30], dtype)[:, None]
            expected = [digit(Fraction(float(x)) * divisors[stage], level, bound) for x in z[:, 0]]
            assert grid.encode_rows(torch.from_numpy(z)).tolist() == expected
            assert set(expected) == set(range(level))


def test_boundaries_that_are_numbers_belong_to_the_upper_digit():
    # (2 d - L) / (L - 1) for L = 5 are -3/4, -1/4, 1/4 and 3/4, and half of that with a divisor of 2.
    [first_stage, second] = stage_boundaries(5, "clamp", (1, 2))
    assert first_stage.tolist() == [np.nextafter(x, -np.inf) for x in (-0.75, -0.25, 0.25, 0.75)]
    assert second.tolist() == [np.nextafter(x, -np.inf) for x in (-0.375, -0.125, 0.125, 0.375)]


# The bound before the first stage.


@pytest.mark.parametrize("kind", ["atanh_twice", "soft_clamp"])
@pytest.mark.parametrize("level", [2, 3, 4, 5, 8, 126, 65536])
def test_the_first_bound_is_rounded_once(kind, level):
    curve = Curve.of_soft_clamp(level) if kind == "soft_clamp" else Curve.of_fsq(level)
    generator = torch.Generator().manual_seed(level)
    drawn = torch.randn(60, 7, generator=generator, dtype=torch.float64) * 10.0 ** torch.tensor(
        [-40, -12, -3, -1, 0, 1, 2]
    )
    special = [0.0, -0.0, 1e-45, -1e-45, 5e-324, 1e-300, 63.9, 64.0, 1e30, -1e30, 1.7e308]
    for z in (drawn.flatten().float().double(), drawn.flatten(), torch.tensor(special, dtype=torch.float64)):
        got = FirstBound.of([curve], CPU)(z[:, None])
        assert got.dtype == torch.float32
        expected = torch.tensor([first(x, level, kind) for x in z.tolist()])
        assert torch.equal(got[:, 0].view(torch.int32), expected.view(torch.int32))


def test_the_first_bound_next_to_where_the_rounding_changes():
    """Numbers of float64 whose bounds are half-way between two of float32, as far as float64 can tell."""
    curve = Curve.of_soft_clamp(4)
    limit = 4 / 3
    middles = (torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.05).double() + 2.0**-26
    z = limit * torch.atanh(middles / limit)
    z = torch.stack([torch.nextafter(z, z - 1), z, torch.nextafter(z, z + 1)], dim=1)
    got = FirstBound.of([curve] * 3, CPU)(z)
    assert got.tolist() == [[first(x, 4, "soft_clamp") for x in row] for row in z.tolist()]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("level", [2, 3, 4])
def test_small_numbers_whatever_the_processor_does_with_them(bound, level):
    quantizer = ResidualFiniteScalarQuantizer([level], 3, bound, "levels")
    z = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e-39, -3e-39, 0.5])[:, None]
    expected = [oracle(quantizer, row, np.float32)[0] for row in z.tolist()]
    wide = z.double()
    assert quantizer.encode(z).tolist() == expected
    try:
        torch.set_flush_denormal(True)
        assert quantizer.encode(z).tolist() == expected
        assert quantizer.encode(wide).tolist() == expected
    finally:
        torch.set_flush_denormal(False)


# Tokens.


@pytest.mark.parametrize("bound", BOUNDS)
@given(
    levels=st.lists(st.integers(2, 9), min_size=1, max_size=3),
    scales=st.sampled_from(SCALES),
    stages=st.integers(1, 5),
    groups=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-6, 0.3, 1.0, 4.0, 1e6]),
    double=st.booleans(),
)
@FAST
def test_any_latents(bound, levels, scales, stages, groups, seed, scale, double):
    quantizer = ResidualFiniteScalarQuantizer(levels, stages * groups, bound, scales, groups=groups)
    dtype = torch.float64 if double else torch.float32
    z = torch.randn(4, quantizer.input_dim, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale
    expected = [oracle(quantizer, row, np.float64 if double else np.float32) for row in z.tolist()]
    indices = quantizer.encode(z)
    assert indices.tolist() == [found for found, _ in expected]
    assert quantizer.decode(indices).tolist() == [decoded for _, decoded in expected]
    assert torch.equal(torch.cat([quantizer.encode(row[None]) for row in z]), indices)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("scales", SCALES)
def test_residuals_next_to_the_boundaries_of_the_second_stage(bound, scales):
    quantizer = ResidualFiniteScalarQuantizer([4], 3, bound, scales)
    [stages] = {part.stages for part in freeze(quantizer, device="cpu")._parts}
    # r_0 = q_0 + t_1: the residual is a boundary of the second stage, but for a rounding.
    wanted = (stages[0]._values[0].double()[:, None] + stages[1]._boundaries[0][None, :]).flatten().numpy()
    if bound in ("atanh_twice", "soft_clamp"):
        half, offset = 3 * 1.001 / 2, 0.5
        with np.errstate(invalid="ignore"):
            inside = (
                np.arctanh(wanted * 3 / 4) * 4 / 3
                if bound == "soft_clamp"
                else np.arctanh((wanted + offset) / half) - np.arctanh(offset / half)
            )
        wanted = inside[np.isfinite(inside)]
    z = np.array([x for edge in wanted for x in neighbours(edge, np.float32)], np.float32)[:, None]
    assert len(z) >= 9
    expected = [oracle(quantizer, row, np.float32)[0] for row in z.tolist()]
    assert quantizer.encode(torch.from_numpy(z)).tolist() == expected
    assert len({row[1] for row in expected}) > 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_latents_are_widened(dtype):
    for bound in BOUNDS:
        quantizer = ResidualFiniteScalarQuantizer([5, 4], 3, bound, "levels")
        z = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(quantizer.encode(z), quantizer.encode(z.float()))


@pytest.mark.parametrize("bound", BOUNDS)
def test_tokens_do_not_depend_on_the_batch_or_the_threads(bound):
    torch.manual_seed(0)
    quantizer = ResidualFiniteScalarQuantizer([8, 5, 5], 4, bound, "levels", groups=2, input_dim=10, output_dim=10)
    frozen, z = freeze(quantizer, device="cpu"), 2 * torch.randn(70_000, 10)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        indices = frozen.encode_rows(z)
        torch.set_num_threads(1)
        assert torch.equal(torch.cat([frozen.encode_rows(part) for part in z.split(9_973)]), indices)
        assert torch.equal(frozen.decode_rows(indices[::7]), frozen.decode_rows(indices)[::7])
    finally:
        torch.set_num_threads(threads)


def test_one_stage_that_is_bounded_once_is_fsq():
    levels, z = [4] * 8, torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    for bound, of_fsq in (("atanh", "atanh"), ("symmetric", "symmetric")):
        one, fsq = ResidualFiniteScalarQuantizer(levels, 1, bound, "levels"), FiniteScalarQuantizer(levels, of_fsq)
        assert torch.equal(one.encode(z)[:, 0], fsq.encode(z))
        assert torch.equal(one.decode(one.encode(z)), fsq.decode(fsq.encode(z)))
    # X-Codec 2's bounds twice, and most of its tokens are others.
    twice = ResidualFiniteScalarQuantizer(levels, 1, "atanh_twice", "levels_minus_one")
    assert (twice.encode(z)[:, 0] != FiniteScalarQuantizer(levels).encode(z)).float().mean() > 0.5
    bounded_once = FirstBound.of([Curve.of_fsq(4)] * 8, CPU)(z)
    assert torch.equal(twice.encode(z)[:, 0], FiniteScalarQuantizer(levels).encode(bounded_once))


def test_finer_stages_come_nearer():
    torch.manual_seed(0)
    # r_0 of "soft_clamp" is within the outermost grid's reach.
    quantizer = ResidualFiniteScalarQuantizer([5, 8], 5, "soft_clamp", "levels")
    z = torch.randn(2000, 2)
    r = FirstBound.of([Curve.of_soft_clamp(5), Curve.of_soft_clamp(8)], CPU)(z)
    indices = quantizer.encode(z)
    errors = [float((quantizer.decode(indices, count) - r).abs().max()) for count in range(1, 6)]
    assert all(finer <= coarser / 4 for coarser, finer in itertools.pairwise(errors))


# Groups, projections, layouts.


@pytest.mark.parametrize("double", [False, True])
def test_projections_are_exact_on_both_sides(double):
    torch.manual_seed(3)
    options = {"levels": [5, 4], "num_quantizers": 4, "bound": "soft_clamp", "scales": "levels", "groups": 2}
    quantizer = ResidualFiniteScalarQuantizer(**options, input_dim=6, output_dim=8)
    plain = ResidualFiniteScalarQuantizer(**options)
    if double:
        quantizer.double()
    rows = torch.randn(30, 6)
    layers = [
        [(layer.weight.tolist(), layer.bias.tolist()) for layer in (part.proj_in, part.proj_out)]
        for part in quantizer.parts
    ]
    projected = [
        [*exact.affine(row[:3], *layers[0][0]), *exact.affine(row[3:], *layers[1][0])] for row in rows.tolist()
    ]
    indices = quantizer.encode(rows)
    assert torch.equal(indices, plain.encode(torch.tensor(projected)))
    sums = plain.decode(indices)
    decoded = quantizer.decode(indices)
    assert decoded.dtype == quantizer.weight_dtype == (torch.float64 if double else torch.float32)
    expected = [[*exact.affine(row[:2], *layers[0][1]), *exact.affine(row[2:], *layers[1][1])] for row in sums.tolist()]
    assert decoded.tolist() == expected
    assert (quantizer.input_dim, quantizer.code_dim, quantizer.output_dim, quantizer.num_codes) == (6, 2, 8, 20)


def test_groups_are_quantizers_of_their_own():
    torch.manual_seed(0)
    options = {"levels": [8, 5], "bound": "atanh_twice", "scales": "levels_minus_one"}
    quantizer = ResidualFiniteScalarQuantizer(num_quantizers=6, groups=2, input_dim=6, output_dim=8, **options)
    z = torch.randn(50, 6)
    indices, decoded = quantizer.encode(z), quantizer.decode(quantizer.encode(z))
    for group, part in enumerate(quantizer.parts):
        alone = ResidualFiniteScalarQuantizer(num_quantizers=3, input_dim=3, output_dim=4, **options)
        alone.parts[0].load_state_dict(part.state_dict())
        assert torch.equal(alone.encode(z[:, 3 * group : 3 * group + 3]), indices[:, group::2])
        assert torch.equal(alone.decode(indices[:, group::2]), decoded[:, 4 * group : 4 * group + 4])


def test_fewer_indices_are_the_first_of_all():
    torch.manual_seed(0)
    quantizer = ResidualFiniteScalarQuantizer(
        [5, 4], 6, "atanh", "levels_minus_one", groups=2, input_dim=6, output_dim=8
    )
    z = torch.randn(3, 6, 5)
    indices = quantizer.encode(z)
    assert indices.shape == (3, 6, 5)
    for count in range(1, 7):
        assert torch.equal(quantizer.encode(z, count), indices[:, :count])
        assert torch.equal(quantizer.decode(indices, count), quantizer.decode(indices[:, :count], count))
    # The second group has no index yet.
    assert not quantizer.decode(indices, 1)[:, 4:].any()
    assert quantizer.decode(indices, 1)[:, :4].all()


@pytest.mark.parametrize("layout", [None, Layout.CHANNELS_LAST, Layout.CHANNELS_FIRST])
@pytest.mark.parametrize("shape", [(7, 2), (3, 2, 5), (3, 2, 4, 5), (2, 2, 3, 4, 5)])
def test_layouts(layout, shape):
    quantizer = ResidualFiniteScalarQuantizer([5, 4], 3, "symmetric", "levels")
    assert quantizer.layout is Layout.CHANNELS_FIRST
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = z.movedim(1, -1)
    expected = quantizer.encode(rows.reshape(-1, 2)).reshape(*rows.shape[:-1], 3)
    quantizer.layout = layout
    is_last = layout is Layout.CHANNELS_LAST or (layout is None and z.ndim == 3)
    indices = quantizer.encode(rows if is_last else z)
    assert torch.equal(indices if is_last or z.ndim == 2 else indices.movedim(1, -1), expected)
    decoded = quantizer.decode(indices)
    assert decoded.shape == (rows if is_last else z).shape
    assert decoded.is_contiguous()


# What is refused.


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"levels": []}, "at least one"),
        ({"levels": [8, 1]}, "levels must be integers in"),
        ({"levels": [65536, 65536, 2]}, "8589934592 codes are more than an index"),
        ({"num_quantizers": 0}, "num_quantizers must be a positive integer"),
        ({"num_quantizers": True}, "num_quantizers must be a positive integer"),
        ({"num_quantizers": 258}, "258 quantizers are more than 256"),
        ({"bound": "tan"}, "bound must be one of atanh_twice, atanh, symmetric, soft_clamp, not 'tan'"),
        ({"bound": ["atanh"]}, "bound must be one of"),
        ({"scales": "1.17"}, "scales must be one of levels_minus_one, levels, not '1.17'"),
        ({"groups": 0}, "groups must be a positive integer"),
        ({"groups": 3}, "3 groups do not divide 4 quantizers"),
        ({"groups": 2, "input_dim": 5}, "2 groups do not divide 5 channels of input_dim"),
        ({"groups": 2, "output_dim": 7}, "2 groups do not divide 7 channels of output_dim"),
        ({"input_dim": 0}, "input_dim must be a positive integer"),
        ({"output_dim": -1}, "output_dim must be a positive integer"),
        ({"levels": [65536], "num_quantizers": 9}, "the last of 9 stages is too fine for a float32 residual"),
        ({"levels": [5, 4], "num_quantizers": 256}, "the last of 256 stages is too fine"),
    ],
)
def test_arguments_are_checked(changes, match):
    given = {"levels": [5, 4], "num_quantizers": 4, "bound": "atanh", "scales": "levels_minus_one"}
    with pytest.raises(InvalidOption, match=match):
        ResidualFiniteScalarQuantizer(**{**given, **changes})


def test_as_many_stages_as_there_may_be():
    # L - 1 = 1: the scales stay 1.
    quantizer = ResidualFiniteScalarQuantizer([2], 256, "symmetric", "levels_minus_one")
    z = torch.tensor([[0.5], [-7.0]])
    assert quantizer.encode(z).tolist() == [oracle(quantizer, row, np.float32)[0] for row in z.tolist()]


def test_latents_and_indices_are_checked():
    quantizer = ResidualFiniteScalarQuantizer([5, 4], 3, "atanh", "levels", input_dim=2, output_dim=2)
    z = torch.zeros(2, 2, 3, 3)
    z[1, 0, 2, 0] = math.nan
    with pytest.raises(NonFiniteLatents, match=r"\[1, 0, 2, 0\]"):
        quantizer.encode(z)
    with pytest.raises(InvalidShape):
        quantizer.encode(torch.zeros(2, 3, 4))
    with pytest.raises(InvalidDtype):
        quantizer.encode(torch.zeros(2, 2, 4, dtype=torch.int64))
    with pytest.raises(InvalidOption, match="num_quantizers"):
        quantizer.encode(torch.zeros(2, 2), 4)
    indices = torch.zeros(2, 3, 4, dtype=torch.int64)
    indices[1, 2, 3] = 20
    with pytest.raises(IndexOutOfRange, match=r"indices\[1, 2, 3\] is 20"):
        quantizer.decode(indices)
    with pytest.raises(InvalidShape):
        quantizer.decode(torch.zeros(2, 2, 4, dtype=torch.int64))
    with pytest.raises(InvalidOption, match="has a code row for each index"):
        freeze(quantizer, device="cpu").decode_rows(torch.zeros(1, 3, dtype=torch.int64), output="code_rows")
    with pytest.raises(InvalidOption, match="no search backend 'faiss'"):
        freeze(quantizer, device="cpu", search="faiss")


def test_large_latents_are_bounded():
    for bound in BOUNDS:
        quantizer = ResidualFiniteScalarQuantizer([5, 4], 3, bound, "levels")
        z = torch.tensor([[3.4e38, -3.4e38]])
        assert quantizer.encode(z).tolist() == [oracle(quantizer, z[0].tolist(), np.float32)[0]]


def test_projections_beyond_float32_are_refused():
    quantizer = ResidualFiniteScalarQuantizer([5, 4], 3, "atanh", "levels", input_dim=2, output_dim=2)
    with torch.no_grad():
        quantizer.parts[0].proj_in.weight.fill_(1e10)
    z = torch.zeros(2, 2, 3, 3)
    z[1, :, 2, 0] = 1e35
    with pytest.raises(NonFiniteLatents, match=r"the projection of token \[1, 2, 0\] leaves the range of float32"):
        quantizer.encode(z)
    with torch.no_grad():
        quantizer.parts[0].proj_out.weight.fill_(3e38)
    with pytest.raises(CodebookError, match="beyond float32's range"):
        freeze(quantizer, device="cpu")
    with torch.no_grad():
        quantizer.parts[0].proj_out.weight[0, 1] = math.nan
    with pytest.raises(CodebookError, match="proj_out holds NaN"):
        freeze(quantizer, device="cpu")


def test_a_stage_that_is_wrong_is_named():
    frozen = freeze(ResidualFiniteScalarQuantizer([8, 5], 3, "soft_clamp", "levels"), device="cpu")
    assert frozen.check_itself() is None
    [part] = frozen._parts
    wrong = replace(part.stages[1], _weights=part.stages[1]._weights.flip(0))
    damaged = replace(part, stages=(part.stages[0], wrong, part.stages[2]))
    with pytest.raises(CodebookError, match=r"part 0, stage 1: index \d+ is not found between its own boundaries"):
        replace(frozen, _parts=(damaged,)).check_itself()
