"""A codebook's figures on latents, against numpy in float64 on the whole array."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.figures import encode, state_of, to_bfloat16, to_float16
from vqserve.layout import Layout
from vqserve_server.errors import InvalidShape, NonFiniteLatents
from vqserve_server.quantizers import CosineQuantizer, VectorQuantizer, VectorQuantizerWithInputProjection
from vqserve_server.search import SearchCounts, prepare
from vqserve_tools.inspection import inspect
from vqserve_tools.latents.array import ArrayRows

DTYPES = {"float16": to_float16, "bfloat16": to_bfloat16}


def fit_of(codebook, latents, **options):
    return inspect(codebook, ArrayRows(latents, keeps_float64=True, **options)).report.fit


@pytest.fixture(params=[np.float32, np.float64, np.float16], ids=lambda dtype: dtype.__name__)
def dtype(request):
    return request.param


@pytest.mark.usefixtures("in_pieces")
def test_usage(quantizer, saved, latents_of):
    latents = latents_of(quantizer)
    fit = fit_of(saved(quantizer), latents)
    ids = encode(quantizer, state_of(quantizer), latents).ids
    num_codes = 4 if quantizer.kind == "gumbel" and quantizer.used is not None else quantizer.num_codes
    assert len(fit.usage) == ids.shape[1] == quantizer.num_quantizers
    for place, usage in enumerate(fit.usage):
        counts = np.unique(ids[:, place], return_counts=True)[1]
        p = counts / len(latents)
        assert (usage.codes, usage.used, usage.dead) == (num_codes, len(counts), num_codes - len(counts))
        assert usage.perplexity == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-12)
        assert usage.share == pytest.approx(usage.perplexity / num_codes, rel=1e-12)
        assert usage.largest_share == p.max()
        for one in usage.histogram[1:]:
            assert one.codes == ((counts >= one.least) & (counts <= one.most)).sum()
        assert sum(one.codes for one in usage.histogram) == num_codes


@pytest.mark.usefixtures("in_pieces")
def test_error(quantizer, saved, latents_of):
    latents = latents_of(quantizer)
    error = fit_of(saved(quantizer), latents).error
    expected = encode(quantizer, state_of(quantizer), latents)
    if not quantizer.is_approximate:
        assert quantizer.kind in {"gumbel", "residual_fsq"}
        assert error is None
        return
    wanted = expected.wanted
    # What was searched is the exact projection as float32 rounds it, and the oracle's is not rounded.
    near = 1e-5
    variance = wanted.var(axis=0).mean()
    assert error.variance == pytest.approx(variance, rel=near)
    steps = error.by_stages or [error]
    assert len(steps) == len(expected.found)
    for step, found in zip(steps, expected.found, strict=True):
        mean_squared = ((found - wanted) ** 2).mean()
        assert step.mean_squared == pytest.approx(mean_squared, rel=near)
        assert step.relative == pytest.approx(mean_squared / variance, rel=near)
        assert step.snr_db == pytest.approx(10 * np.log10(variance / mean_squared), rel=near)
    if error.by_stages:
        assert [step.num_quantizers for step in steps[:-1]] == [2**k for k in range(len(steps) - 1)]
        assert steps[-1].num_quantizers == quantizer.num_quantizers
        assert (error.mean_squared, error.snr_db) == (steps[-1].mean_squared, steps[-1].snr_db)
    distances = np.sqrt(((expected.found[-1] - wanted) ** 2).sum(axis=1))
    for percent in (50, 90, 99):
        exact = np.percentile(distances, percent, method="inverted_cdf")
        assert getattr(error.distance, f"p{percent}") == pytest.approx(exact, rel=1e-4)
    assert error.distance.max == pytest.approx(distances.max(), rel=near)


COMPARED = {
    "projection": "projected latents",
    "projection_out": "projected latents",
    "projection_back": "latents",
    "cosine": "directions",
    "cosine_normalized": "directions",
    "cosine_back": "latents",
    "dot": "latents",
    "dot_out": "projected latents",
    "rvq_dac": "latents",
    "fsq": "bounded latents",
    "fsq_tan": "bounded latents",
    "fsq_back": "latents",
    "residual_fsq_back": "latents",
    "lfq": "latents",
    "lfq_spherical": "directions",
}


@pytest.mark.parametrize("name", COMPARED)
def test_what_is_compared(name, make_quantizer, saved, latents_of):
    quantizer = make_quantizer(name)
    assert fit_of(saved(quantizer), latents_of(quantizer)).error.compared == COMPARED[name]


@pytest.mark.usefixtures("in_pieces")
def test_rounding(quantizer, saved, latents_of, dtype):
    latents = latents_of(quantizer, dtype=dtype)
    fit = fit_of(saved(quantizer), latents)
    wide = latents.astype(np.float64 if dtype == np.float64 else np.float32)
    state = state_of(quantizer)
    ids = encode(quantizer, state, wide).ids
    for name, to in DTYPES.items():
        rounded_state = {key: to(array) if array.dtype.kind == "f" else array for key, array in state.items()}
        changes = {
            "latents": encode(quantizer, state, to(wide)).ids != ids,
            "codebook": encode(quantizer, rounded_state, wide).ids != ids,
            "both": encode(quantizer, rounded_state, to(wide)).ids != ids,
        }
        for what, is_changed in changes.items():
            found = getattr(fit.rounded[name], what)
            assert found.tokens == is_changed.any(axis=1).sum()
            assert found.indices == tuple(is_changed.sum(axis=0))
            assert found.share == found.tokens / len(latents)
            assert found.lost == 0


def test_rounding_changes_some_tokens(make_quantizer, saved, latents_of):
    quantizer = make_quantizer("rvq")
    both = fit_of(saved(quantizer), latents_of(quantizer)).rounded["bfloat16"].both
    assert both.tokens > 10
    assert min(both.indices) > 0


def test_tokens_beyond_float16_are_lost(saved):
    codes = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    quantizer = VectorQuantizer(20, 2)
    quantizer.embedding.weight.data = codes
    latents = np.random.default_rng(0).standard_normal((90, 2)).astype(np.float32)
    latents[[3, 80]] = 1e5
    latents[5, 1] = -7e4
    fit = fit_of(saved(quantizer), latents)
    assert (fit.rounded["float16"].latents.lost, fit.rounded["bfloat16"].latents.lost) == (3, 0)
    assert fit.rounded["float16"].latents.tokens >= 3
    # A codebook that leaves the range cannot be searched at all.
    codes[0, 0] = 1e6
    fit = fit_of(saved(quantizer), latents)
    assert (fit.rounded["float16"].codebook, fit.rounded["float16"].both) == (None, None)
    assert fit.rounded["bfloat16"].codebook is not None


def test_tokens_that_leave_float32_when_rounded_are_lost(saved):
    quantizer = VectorQuantizerWithInputProjection(1, 4, 1)
    quantizer.proj_in.weight.data.fill_(1.0)
    quantizer.proj_in.bias.data.fill_(1.6e36)
    latents = np.ones((50, 1), np.float32)
    # As bfloat16 the largest number below infinity, to which the bias is too much.
    latents[[7, 30]] = np.float32(3.384e38)
    rounded = fit_of(saved(quantizer), latents).rounded["bfloat16"]
    assert (rounded.latents.lost, rounded.latents.tokens) == (2, 2)


@pytest.mark.parametrize("name", ["vq", "vq_float64", "gumbel", "dot", "cosine"])
def test_rechecked_rows_are_the_search_s(name, make_quantizer, saved, latents_of):
    quantizer = make_quantizer(name)
    latents = latents_of(quantizer)
    # Half of the tokens lie half-way between two codes.
    codes = quantizer.search_problem().codes.numpy()
    if name in {"vq", "vq_float64"}:
        latents[:250] = (codes[:1] + codes[1:2]) / 2
    fit = fit_of(saved(quantizer), latents)
    problem, counts = quantizer.search_problem(), SearchCounts()
    prepare(problem.codes, objective=problem.objective, bias=problem.bias).search(torch.from_numpy(latents), counts)
    [found] = fit.rechecked
    assert (found.rows, found.float64, found.beyond_float64) == (500, counts.rechecked, counts.arbitrated)
    assert fit.backend == prepare(problem.codes, objective=problem.objective, bias=problem.bias).backend


def test_each_stage_counts_its_own_rechecked_rows(make_quantizer, saved):
    quantizer = make_quantizer("rvq")
    codes = quantizer.codebooks()[2].code_rows()
    with torch.no_grad():
        for stage in (0, 1, 3, 4):
            quantizer.codebooks()[stage].embedding.weight.zero_()
        codes.zero_()
        codes[0], codes[1], codes[2:] = 1, -1, 50
    # Only the third stage has two codes that are equally near.
    rechecked = fit_of(saved(quantizer), np.zeros((30, 3), np.float32)).rechecked
    assert [one.rows for one in rechecked] == [30] * 5
    assert [one.float64 for one in rechecked] == [0, 0, 30, 0, 0]
    assert [one.beyond_float64 for one in rechecked] == [0, 0, 30, 0, 0]


def test_nothing_is_searched_in_a_grid(make_quantizer, saved, latents_of):
    quantizer = make_quantizer("fsq")
    fit = fit_of(saved(quantizer), latents_of(quantizer))
    assert (fit.backend, fit.rechecked) == ("none", ())


@pytest.mark.parametrize(("name", "used"), [("vq_remap", [7, 2, 0]), ("vq_sentinel", [7, 2, 5])])
def test_figures_are_about_codes_whatever_a_remap_reports(name, used, make_quantizer, saved, latents_of):
    quantizer = make_quantizer(name)
    latents = latents_of(quantizer)
    fit = fit_of(saved(quantizer), latents)
    ids = encode(quantizer, state_of(quantizer), latents).ids[:, 0]
    assert fit.outside_remap == (~np.isin(ids, used)).sum()
    plain = make_quantizer("vq")
    plain.load_state_dict({"embedding.weight": quantizer.embedding.weight})
    without = fit_of(saved(plain), latents)
    assert (fit.usage, fit.error, fit.rounded) == (without.usage, without.error, without.rounded)
    assert without.outside_remap is None


@pytest.mark.parametrize(
    ("shape", "layout", "default"),
    [
        ((60, 3), None, None),
        ((3, 20, 3), None, None),
        ((3, 3, 20), "channels_first", None),
        ((3, 3, 20), None, "channels_first"),
        ((2, 3, 5, 6), None, None),
        ((2, 5, 6, 3), "channels_last", "channels_first"),
        ((2, 3, 2, 5, 3), None, None),
    ],
)
def test_figures_do_not_depend_on_how_tokens_lie(shape, layout, default, make_quantizer, saved):
    quantizer = make_quantizer("vq")
    quantizer.layout = default
    rows = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
    first = (layout or default) == "channels_first" or (layout is None and default is None and len(shape) > 3)
    grid = (shape[0], *shape[2:]) if first else shape[:-1]
    latents = np.moveaxis(rows.reshape(*grid, 3), -1, 1 if first else -1)
    assert latents.shape == shape
    codebook = saved(quantizer)
    default = None if default is None else Layout(default)
    fit = fit_of(codebook, np.ascontiguousarray(latents), layout=layout, default=default)
    flat = fit_of(codebook, rows)
    assert fit.latents.shape == shape
    assert fit.latents.tokens == 60
    assert fit.latents.layout == ("channels_first" if first else "channels_last")
    assert (fit.usage, fit.error, fit.rounded, fit.rechecked) == (flat.usage, flat.error, flat.rounded, flat.rechecked)


def test_latents_that_equal_codes_have_no_error(make_quantizer, saved):
    quantizer = make_quantizer("vq")
    fit = fit_of(saved(quantizer), quantizer.code_rows().numpy())
    assert (fit.error.mean_squared, fit.error.relative, fit.error.snr_db) == (0, 0, None)
    assert (fit.error.distance.p99, fit.error.distance.max) == (0, 0)
    assert fit.usage[0].dead == 0


def test_latents_without_variance_have_no_relative_error(make_quantizer, saved):
    error = fit_of(saved(make_quantizer("vq")), np.ones((9, 3), np.float32)).error
    assert error.mean_squared > 0
    assert (error.variance, error.relative, error.snr_db) == (0, None, None)


def test_variance_does_not_cancel(make_quantizer, saved):
    latents = np.random.default_rng(0).standard_normal((500, 3)) + 1e6
    error = fit_of(saved(make_quantizer("vq_float64")), latents).error
    assert error.variance == pytest.approx(latents.var(axis=0).mean(), rel=1e-9)


def test_a_latent_of_zeros_has_no_direction(saved):
    quantizer = CosineQuantizer(4, 2)
    quantizer.embedding.weight.data = torch.tensor([[1.0, 0], [0, 2], [-3, 0], [0, 0]])
    error = fit_of(saved(quantizer), np.array([[0, 0], [5, 0]], np.float32)).error
    assert error.mean_squared == pytest.approx(1 / 4)


def test_latents_that_do_not_fit_are_rejected(make_quantizer, saved):
    codebook = saved(make_quantizer("vq"))
    with pytest.raises(InvalidShape, match=r'have 4 channels .* takes 3: should it be layout="channels_first"\?'):
        fit_of(codebook, np.zeros((2, 3, 4), np.float32))
    with pytest.raises(InvalidShape, match="hold no tokens"):
        fit_of(codebook, np.zeros((0, 3), np.float32))
    latents = np.zeros((9, 3))
    latents[4, 1] = np.nan
    with pytest.raises(NonFiniteLatents, match=r"latents\[4, 1\] is nan"):
        fit_of(codebook, latents)


@pytest.mark.usefixtures("in_pieces")
def test_a_token_whose_projection_overflows_is_named(saved):
    quantizer = VectorQuantizerWithInputProjection(1, 4, 1)
    quantizer.proj_in.weight.data.fill_(1e10)
    latents = np.ones((200, 1), np.float32)
    latents[130] = 1e30
    with pytest.raises(NonFiniteLatents, match=r"the projection of token \[130\]"):
        fit_of(saved(quantizer), latents)
