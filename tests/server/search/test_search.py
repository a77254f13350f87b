"""Every backend against rational arithmetic, near-ties above all."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqserve_server.errors import InvalidOption
from vqserve_server.search import Objective, available, prepare
from vqserve_server.search.native import fits

BACKENDS = available("cpu")


def exact_winner(row, codes, bias, objective) -> int:
    """The lowest index of the best code, in rationals."""
    z = [Fraction(x) for x in row.tolist()]

    def cost(j):
        a = [Fraction(x) for x in codes[j].tolist()]
        if objective is Objective.L2:
            return sum((x - y) ** 2 for x, y in zip(z, a, strict=True))
        return -sum((x * y for x, y in zip(z, a, strict=True)), Fraction(0 if bias is None else bias[j].item()))

    return min(range(len(codes)), key=lambda j: (cost(j), j))


def check(rows, codes, *, objective=Objective.L2, bias=None):
    expected = [exact_winner(row, codes, bias, objective) for row in rows]
    for backend in BACKENDS:
        if backend == "native" and not fits(codes, bias, objective):
            continue
        searcher = prepare(codes, objective=objective, bias=bias, backend=backend)
        assert searcher.backend == backend
        got = searcher.search(rows)
        assert got.dtype == torch.int64
        assert got.tolist() == expected, backend
        alone = [int(searcher.search(row[None])) for row in rows]
        assert alone == expected, backend


def midpoints(codes: torch.Tensor, pairs: int, seed: int) -> torch.Tensor:
    """Midpoints of pairs of codes, each moved by 0, 1 and 2 ulp in one coordinate, both ways."""
    rng = np.random.default_rng(seed)
    array = codes.numpy()
    i, j = rng.integers(0, len(array), (2, pairs))
    middle = ((array[i].astype(np.float64) + array[j]) / 2).astype(array.dtype)
    rows = [middle]
    column = rng.integers(0, array.shape[1], pairs)
    for direction in (-np.inf, np.inf):
        moved = middle.copy()
        for _ in range(2):
            at = moved[np.arange(pairs), column]
            moved[np.arange(pairs), column] = np.nextafter(at, array.dtype.type(direction))
            rows.append(moved.copy())
    return torch.from_numpy(np.concatenate(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "d"), [(2, 1), (40, 1), (40, 3), (30, 8), (12, 64)])
def test_midpoints_moved_by_ulps(k, d, dtype):
    g = torch.Generator().manual_seed(k * d)
    codes = torch.randn(k, d, generator=g, dtype=dtype)
    check(midpoints(codes, 20, seed=k), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lattice_codes_where_exact_ties_abound(dtype):
    axis = torch.arange(4, dtype=torch.float32)
    codes = torch.cartesian_prod(axis, axis, axis)
    g = torch.Generator().manual_seed(0)
    codes = codes[torch.randperm(len(codes), generator=g)]
    rows = (torch.randint(0, 13, (60, 3), generator=g) / 4).to(dtype).float()
    check(rows, codes)
    check(rows, codes, objective=Objective.DOT)


@pytest.mark.parametrize("objective", list(Objective))
def test_duplicated_and_permuted_codes_give_the_lowest_index(objective):
    g = torch.Generator().manual_seed(5)
    distinct = torch.randn(9, 4, generator=g)
    distinct[3] = 0.0
    codes = torch.cat([distinct, distinct[torch.randperm(9, generator=g)], distinct[:2]])
    codes[12, 0] += 0.0
    codes[-1] = -codes[3]  # -0.0: equal to 0.0
    bias = None if objective is Objective.L2 else torch.randn(20, generator=g).sign()
    rows = torch.cat([codes, torch.randn(10, 4, generator=g), torch.zeros(1, 4)])
    check(rows, codes, objective=objective, bias=bias)


def test_a_codebook_of_one_repeated_code():
    assert prepare(torch.ones(5000, 3)).search(torch.randn(7, 3)).tolist() == [0] * 7


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e4, 1e18])
@pytest.mark.parametrize("objective", list(Objective))
def test_magnitudes(scale, objective):
    g = torch.Generator().manual_seed(1)
    codes = torch.randn(20, 5, generator=g) * scale
    rows = torch.cat([midpoints(codes, 5, seed=1), torch.zeros(1, 5), torch.randn(5, 5, generator=g)])
    check(rows, codes, objective=objective, bias=None if objective is Objective.L2 else torch.randn(20, generator=g))


def test_codes_of_mixed_magnitudes():
    g = torch.Generator().manual_seed(2)
    codes = torch.randn(30, 4, generator=g) * torch.logspace(-20, 18, 30)[:, None]
    check(torch.cat([midpoints(codes, 10, seed=2), codes]), codes)


@pytest.mark.parametrize("scale", [1e-200, 1e-310, 1e160, 1e300])
def test_float64_beyond_what_squares_hold(scale):
    g = torch.Generator().manual_seed(3)
    codes = torch.randn(6, 3, generator=g, dtype=torch.float64) * scale
    check(torch.cat([midpoints(codes, 4, seed=3), codes]), codes)


def test_float64_codes_beyond_float32_whose_scores_are_not():
    codes = torch.tensor([[0.0, 3e38], [4e38, 0.0], [0.0, -1e60]], dtype=torch.float64)
    rows = torch.tensor([[0.01, 0.02], [0.02, 0.01], [1e-30, -1e-40], [0.0, 0.0]])
    for dtype in (torch.float32, torch.float64):
        check(rows.to(dtype), codes[:2], objective=Objective.DOT)
        check(rows.to(dtype), codes, objective=Objective.DOT)


@given(
    k=st.integers(1, 12),
    d=st.integers(1, 6),
    seed=st.integers(0, 2**32),
    objective=st.sampled_from(list(Objective)),
    grain=st.sampled_from([None, 1.0, 0.25, 2.0**-12]),
    row_dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=80)
def test_random_codebooks_against_rationals(k, d, seed, objective, grain, row_dtype):
    g = torch.Generator().manual_seed(seed)
    codes, rows = torch.randn(k, d, generator=g), torch.randn(8, d, generator=g, dtype=row_dtype)
    if grain is not None:
        codes, rows = (torch.round(x / grain) * grain for x in (codes, rows))
    bias = torch.round(torch.randn(k, generator=g)) if objective is Objective.DOT else None
    check(rows, codes, objective=objective, bias=bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "d"), [(1, 1), (1, 300), (5000, 2), (300, 1024)])
def test_shapes(backend, k, d):
    g = torch.Generator().manual_seed(k + d)
    codes = torch.randn(k, d, generator=g)
    searcher = prepare(codes, backend=backend)
    assert searcher.search(codes[:0]).shape == (0,)
    assert torch.equal(searcher.search(codes[:500]), torch.arange(min(k, 500)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gets_some_index_and_harms_no_other(backend, value):
    codes = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    rows = codes.clone()
    rows[7, 2] = value
    got = prepare(codes, backend=backend).search(rows)
    assert 0 <= int(got[7]) < 50
    assert torch.equal(got[8:], torch.arange(8, 50))


def test_an_unknown_backend_is_rejected_by_name():
    with pytest.raises(InvalidOption, match=r"no search backend .hnsw. on cpu: choose one of auto, .*reference"):
        prepare(torch.zeros(2, 2), backend="hnsw")


@pytest.mark.parametrize(
    ("objective", "codes", "row"),
    [
        (Objective.L2, [[-1, 1], [-1.9, 1.91]], [2.4e38, 2.4e38]),
        (Objective.DOT, [[1, -1], [-1e10, 1.001e10]], [1e30, 1e30]),
        (Objective.DOT, [[-1e10, 1.001e10], [1, -1]], [1e30, 1e30]),
        (Objective.DOT, [[1e30, -1e30], [1e29, 2e29]], [1e10, 1e10]),
    ],
)
def test_partial_sums_that_overflow_and_would_cancel(objective, codes, row):
    check(torch.tensor([row, [1.0, 2.0]]), torch.tensor(codes), objective=objective)


@pytest.mark.long
def test_wide_rows_whose_scores_overflow_here_and_there():
    g = torch.Generator().manual_seed(1)
    codes = torch.randn(64, 256, generator=g)
    rows = torch.randn(40, 256, generator=g) * (2e38 / 16)
    check(rows, codes, objective=Objective.DOT)
    check(rows, codes)


@pytest.mark.parametrize(
    ("objective", "codes", "row"),
    [
        (
            Objective.L2,
            [[2.0**30, 2, 2.0**30, 0], [2.0**30, 2, 2.0**30, 2.0**-60]],
            [0, 0, 2.0**30, 2.0**-57],
        ),
        (
            Objective.DOT,
            [[2.0**40, 2.0**-14, -(2.0**40), 0], [2.0**40, 2.0**-14, -(2.0**40), 0.9 * 2.0**-68]],
            [1.0, 1.0, 1.0, 1.0],
        ),
    ],
)
def test_a_difference_beyond_the_bits_that_cancellation_leaves(objective, codes, row):
    check(torch.tensor([row]), torch.tensor(codes), objective=objective)


@pytest.mark.parametrize("objective", list(Objective))
def test_float64_rows_below_float32_s_normal_numbers(objective):
    g = torch.Generator().manual_seed(0)
    small = torch.randint(-4, 5, (40, 9), generator=g) * 2.0**-147
    codes = torch.cat([torch.randn(300, 9, generator=g) * 2.0**-100, small.float()])
    rows = torch.randn(60, 9, generator=g, dtype=torch.float64) * 2.0**-146
    check(rows, codes, objective=objective)
    codes = torch.randn(60, 3, generator=g) * 2.0**38
    check(torch.randn(60, 3, generator=g, dtype=torch.float64) * 2.0**-148, codes, objective=objective)
