"""Residual quantizers: stage by stage the winner in exact arithmetic on what float32 leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import exact
from vqserve.layout import Layout
from vqserve_server.errors import (
    CodebookError,
    IndexOutOfRange,
    InvalidDtype,
    InvalidOption,
    InvalidShape,
    NonFiniteLatents,
)
from vqserve_server.quantizers import ResidualQuantizer, freeze
from vqserve_server.search import available

# The arrangements of trained models, small.
ENCODEC = {"num_quantizers": 4, "n_e": 6, "e_dim": 3}
LUCIDRAINS = {"num_quantizers": 3, "n_e": 6, "e_dim": 2, "input_dim": 4, "metric": "cosine", "inner_dim": 2}
GROUPED = {"num_quantizers": 6, "n_e": 5, "e_dim": 2, "groups": 2}
GROUPED_INNER = {"num_quantizers": 6, "n_e": 5, "e_dim": 1, "groups": 3, "input_dim": 6, "inner_dim": 1}
DAC = {"num_quantizers": 3, "n_e": 6, "e_dim": 2, "input_dim": 5, "metric": "cosine", "stage_projections": True}
DAC_L2 = {**DAC, "metric": "l2"}
MIMI = {"num_quantizers": 4, "n_e": 6, "e_dim": 2, "input_dim": 5, "inner_dim": 2, "first_quantizers": 1}
SPLIT = {"num_quantizers": 5, "n_e": 6, "e_dim": 3, "first_quantizers": 2}
DOT = {"num_quantizers": 3, "n_e": 6, "e_dim": 3, "metric": "dot"}
NORMALIZED = {**ENCODEC, "metric": "cosine", "decode_normalized": True}
# Stages of different K; fish-speech's, of one chain; UniTok's, one stage for each group of channels.
SIZES = {**ENCODEC, "n_e": [7, 3, 1, 6]}
FISH = {**DAC, "num_quantizers": 5, "n_e": [9, 4, 4, 4, 4]}
UNITOK = {**NORMALIZED, "num_quantizers": 3, "n_e": [5, 2, 7], "e_dim": 2, "groups": 3}
GROUPED_SIZES = {**GROUPED, "n_e": [5, 2, 7, 3, 1, 4]}
MIMI_SIZES = {**MIMI, "n_e": [9, 4, 4, 4]}
# GRID's semantic ids, and the same with everything else.
GRID = {**ENCODEC, "normalize_residuals": True}
GRID_DAC = {**DAC_L2, "normalize_residuals": True}
GRID_GROUPED = {**GROUPED_INNER, "normalize_residuals": True}
GRID_MIMI = {**MIMI_SIZES, "normalize_residuals": True}
GRID_COSINE = {**NORMALIZED, "normalize_residuals": True}
CASES = {
    "encodec": ENCODEC,
    "lucidrains": LUCIDRAINS,
    "grouped": GROUPED,
    "grouped_inner": GROUPED_INNER,
    "dac": DAC,
    "dac_l2": DAC_L2,
    "mimi": MIMI,
    "split": SPLIT,
    "dot": DOT,
    "normalized": NORMALIZED,
    "sizes": SIZES,
    "fish": FISH,
    "unitok": UNITOK,
    "grouped_sizes": GROUPED_SIZES,
    "mimi_sizes": MIMI_SIZES,
    "grid": GRID,
    "grid_dac": GRID_DAC,
    "grid_grouped": GRID_GROUPED,
    "grid_mimi": GRID_MIMI,
    "grid_cosine": GRID_COSINE,
}


def made(case: str, seed: int = 0, *, integers: bool = False) -> ResidualQuantizer:
    quantizer = ResidualQuantizer(**CASES[case])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((2 * drawn).round() if integers else drawn)
    return quantizer.eval()


def lists(layer) -> tuple[list, list]:
    return layer.weight.tolist(), layer.bias.tolist()


def oracle(quantizer: ResidualQuantizer, row: list[float]) -> tuple[list[int], list[list[float] | None]]:
    """The indices of one latent, and what every stage decodes to, by rationals and Python's floats."""
    arguments = quantizer.structure
    indices, outputs = [-1] * arguments.num_quantizers, [None] * arguments.num_quantizers
    for part, chain in zip(arguments.parts, quantizer.parts, strict=True):
        residual = row[part.start : part.stop]
        if arguments.inner_dim is not None:
            residual = exact.affine(residual, *lists(chain.proj_in))
        for place, stage in zip(part.places, chain.stages, strict=True):
            if arguments.normalize_residuals:
                residual = exact.unit_row(residual, float(np.float32(1e-12)))
            codes = stage.embedding.weight.tolist()
            unit = [exact.unit_row(code) for code in codes]
            z = exact.affine(residual, *lists(stage.proj_in)) if arguments.stage_projections else residual
            match arguments.metric:
                case "l2":
                    winner = exact.nearest(z, codes)
                case "cosine":
                    winner = exact.greatest(z, unit)
                case "dot":
                    winner = exact.greatest(z, codes)
            q = (unit if arguments.decode_normalized else codes)[winner]
            if arguments.stage_projections:
                q = exact.affine(q, *lists(stage.proj_out))
            indices[place], outputs[place] = winner, q
            residual = [float(np.float32(r) - np.float32(x)) for r, x in zip(residual, q, strict=True)]
    return indices, outputs


def summed(quantizer: ResidualQuantizer, outputs: list[list[float]], count: int) -> list[float]:
    """What the first `count` stages' outputs decode to, by numpy's float32."""
    arguments = quantizer.structure
    results = []
    for part, chain in zip(arguments.parts, quantizer.parts, strict=True):
        used = [np.array(outputs[place], np.float32) for place in part.places if place < count]
        if not used:
            results.append(np.zeros(part.stop - part.start, np.float32))
            continue
        total = used[0]
        for output in used[1:]:
            total = total + output
        if arguments.inner_dim is not None:
            total = np.array(exact.affine(total.tolist(), *lists(chain.proj_out)), np.float32)
        results.append(total)
    if arguments.first_quantizers:
        total = results[0]
        for output in results[1:]:
            total = total + output
        return total.tolist()
    return np.concatenate(results).tolist()


@pytest.mark.parametrize("case", CASES)
@given(seed=st.integers(0, 2**32 - 1), integers=st.booleans(), data=st.data())
@settings(max_examples=12, derandomize=True, database=None)
def test_every_stage_is_exact(case, seed, integers, data):
    quantizer = made(case, seed, integers=integers)
    drawn = torch.randn(7, quantizer.input_dim, generator=torch.Generator().manual_seed(seed + 1))
    rows = (3 * drawn).round() if integers else 2 * drawn
    rows[3] = 0
    expected, outputs = zip(*(oracle(quantizer, row) for row in rows.tolist()), strict=True)
    assert quantizer.encode(rows).tolist() == list(expected)
    frozen = freeze(quantizer, device="cpu", search=data.draw(st.sampled_from(available("cpu"))))
    assert frozen.encode_rows(rows).tolist() == list(expected)
    for count in range(1, quantizer.num_quantizers + 1):
        coarse = [row[:count] for row in expected]
        assert frozen.encode_rows(rows, num_quantizers=count).tolist() == coarse
        decoded = [summed(quantizer, output, count) for output in outputs]
        assert frozen.decode_rows(torch.tensor(coarse)).tolist() == decoded
        assert quantizer.decode(torch.tensor(expected), count).tolist() == decoded


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_its_tokens(case):
    quantizer = made(case)
    rows = torch.randn(40, quantizer.input_dim, generator=torch.Generator().manual_seed(1))
    indices = quantizer.encode(rows)
    frozen = freeze(quantizer, device="cpu")
    assert torch.equal(torch.cat([frozen.encode_rows(row[None]) for row in rows]), indices)
    decoded = quantizer.decode(indices)
    assert torch.equal(torch.cat([frozen.decode_rows(row[None]) for row in indices]), decoded)
    order = torch.randperm(40)
    assert torch.equal(quantizer.encode(rows[order]), indices[order])


def test_residuals_are_float32_differences_also_where_they_cancel():
    # The residuals of the first stage are rounding errors, which the codes of the second stage distinguish.
    first = torch.tensor([[1.0], [0.1]])
    rows = torch.tensor([[1.0 + 2.0**-23], [1.0 - 2.0**-24], [1.0]])
    second = torch.tensor([[-(2.0**-24)], [0.0], [2.0**-23]])
    quantizer = ResidualQuantizer(2, 3, 1)
    with torch.no_grad():
        quantizer.parts[0].stages[0].embedding.weight.copy_(torch.cat([first, first[1:]]))
        quantizer.parts[0].stages[1].embedding.weight.copy_(second)
    assert quantizer.encode(rows).tolist() == [[0, 2], [0, 0], [0, 1]]
    assert torch.equal(quantizer.decode(quantizer.encode(rows)), rows)


def test_float64_latents_and_codebooks():
    quantizer = made("encodec")
    rows = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    residual, expected = rows, []
    for stage in quantizer.parts[0].stages:
        codes = stage.embedding.weight.detach()
        won = torch.tensor([exact.nearest(row, codes.tolist()) for row in residual.tolist()])
        expected.append(won)
        residual = residual - codes[won]
        assert residual.dtype == torch.float64
    assert torch.equal(quantizer.encode(rows), torch.stack(expected, dim=1))
    assert quantizer.decode(quantizer.encode(rows)).dtype == torch.float32
    wide = made("mimi").double()
    indices = wide.encode(torch.randn(5, 5))
    assert wide.decode(indices).dtype == torch.float64


# Layouts.


@pytest.mark.parametrize("case", ["encodec", "mimi", "grouped"])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_indices_stand_where_the_channels_are(case, rank):
    quantizer = made(case)
    channels, count = quantizer.input_dim, quantizer.num_quantizers
    shape = {2: (12,), 3: (2, 6), 4: (2, 2, 3), 5: (2, 2, 3, 1)}[rank]
    rows = torch.randn(12, channels, generator=torch.Generator().manual_seed(3))
    expected = quantizer.encode(rows)
    decoded = quantizer.decode(expected)
    assert decoded.is_contiguous()
    last = rows.reshape(*shape, channels)
    z = last.movedim(-1, 1) if rank > 2 else last
    indices = quantizer.encode(z)
    assert indices.shape == (shape[0], count, *shape[1:])
    assert indices.dtype == torch.int64
    assert torch.equal(indices.movedim(1, -1).reshape(12, count), expected)
    assert torch.equal(quantizer.decode(indices).movedim(1, -1).reshape(12, channels), decoded)
    assert torch.equal(quantizer.encode(z, 2), indices[:, :2])
    for layout in (Layout.CHANNELS_LAST, None) if rank < 4 else (Layout.CHANNELS_LAST,):
        quantizer.layout = layout
        assert torch.equal(quantizer.encode(last), expected.reshape(*shape, count))
        assert torch.equal(quantizer.decode(expected.reshape(*shape, count)), decoded.reshape(*shape, channels))


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (0, 3, 2, 2), (2, 3, 2, 0, 1)])
def test_no_tokens(shape):
    quantizer = made("encodec")
    indices = quantizer.encode(torch.zeros(shape))
    assert indices.shape == (shape[0], 4, *shape[2:])
    assert quantizer.decode(indices).shape == shape
    assert quantizer.encode(torch.zeros(shape), 2).shape == (shape[0], 2, *shape[2:])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint32])
def test_indices_of_any_integer_type(dtype):
    quantizer = made("encodec")
    indices = torch.tensor([[3, 0, 5, 1]])
    assert torch.equal(quantizer.decode(indices.to(dtype)), quantizer.decode(indices))


# What goes wrong.


def test_indices_are_checked_where_they_are():
    quantizer = made("encodec")
    indices = torch.zeros(2, 4, 3, dtype=torch.int64)
    indices[1, 3, 2] = 6
    # Those that are not decoded as well.
    for count in (None, 2):
        with pytest.raises(IndexOutOfRange, match=r"indices\[1, 3, 2\] is 6, not in \[0, 6\)"):
            quantizer.decode(indices, count)
    with pytest.raises(InvalidDtype, match="must be integers"):
        quantizer.decode(indices.float())


@pytest.mark.parametrize(
    ("shape", "count", "match"),
    [
        ((2, 3, 4), None, r"have 3 for a token in layout channels_first, expected 4: pass num_quantizers"),
        ((2, 5, 4), None, r"have 5 for a token in layout channels_first, expected 4$"),
        ((4, 5), None, r"have 5 for a token in layout channels_last, expected 4$"),
        ((2, 2, 4), 3, "have 2 for a token in layout channels_first, expected 3 to 4$"),
        ((2, 5, 4), 3, "have 5 .* expected 3 to 4$"),
        ((4,), None, "2 to 5 axes"),
        ((1, 4, 1, 1, 1, 1), None, "2 to 5 axes"),
    ],
)
def test_another_number_of_indices_is_not_guessed_at(shape, count, match):
    with pytest.raises(InvalidShape, match=match):
        made("encodec").decode(torch.zeros(shape, dtype=torch.int64), count)


@pytest.mark.parametrize("count", [0, 5, -1, 1.0, True, "2"])
def test_how_many_is_an_integer_of_those_there_are(count):
    quantizer = made("encodec")
    for verb in (quantizer.encode, quantizer.decode):
        with pytest.raises(InvalidOption, match=r"num_quantizers must be an integer (in \[1, 4\]|of 1 or more)"):
            verb(torch.zeros(2, 3), count)


def test_code_rows_are_no_token_s():
    with pytest.raises(InvalidOption, match="a code row for each index"):
        freeze(made("encodec"), device="cpu").decode_rows(torch.zeros(1, 4, dtype=torch.int64), output="code_rows")


@pytest.mark.parametrize("case", ["encodec", "dac", "mimi"])
def test_latents_that_leave_float32_on_their_way_are_named(case):
    quantizer = made(case)
    z = torch.zeros(2, quantizer.input_dim, 3)
    z[1, :, 2] = 3.4028e38
    z[1, ::2, 2] *= -1
    for count in (None, 1):
        with pytest.raises(NonFiniteLatents, match=r"token \[1, 2\] (may leave|leaves) the range of float32"):
            quantizer.encode(z, count)


def test_a_latent_s_own_error_does_not_touch_others():
    quantizer = made("encodec")
    rows = torch.randn(5, 3)
    expected = quantizer.encode(rows)
    large = torch.cat([rows, torch.full((1, 3), 3.4028e38)])
    frozen = freeze(quantizer, device="cpu")
    with pytest.raises(NonFiniteLatents, match=r"token \[5\]"):
        frozen.encode_rows(large)
    assert torch.equal(frozen.encode_rows(large[:5]), expected)


@pytest.mark.parametrize("case", ["encodec", "grouped", "mimi", "split"])
def test_codes_that_may_add_up_to_infinity_are_rejected_at_once(case):
    quantizer = made(case)
    with torch.no_grad():
        for stage in quantizer.parts[-1].stages:
            stage.embedding.weight[2] = 2e38
    with pytest.raises(CodebookError, match=r"codes of part [01] may add up to values beyond float32's range"):
        freeze(quantizer, device="cpu")


def test_parts_that_may_add_up_to_infinity_are_rejected():
    quantizer = ResidualQuantizer(2, 3, 2, first_quantizers=1)
    for part in quantizer.parts:
        part.stages[0].embedding.weight.data[1] = 2e38
    with pytest.raises(CodebookError, match="codes of part 1 may add up"):
        freeze(quantizer, device="cpu")


def test_an_output_projection_beyond_float32_is_rejected():
    quantizer = made("dac")
    quantizer.parts[0].stages[1].proj_out.weight.data.fill_(3e38)
    with pytest.raises(CodebookError, match=r"takes index \d beyond float32's range"):
        freeze(quantizer, device="cpu")
    quantizer = made("lucidrains")
    quantizer.parts[0].proj_out.weight.data.fill_(3e38)
    with pytest.raises(CodebookError, match="codes of part 0"):
        freeze(quantizer, device="cpu")


def test_a_nan_in_a_stage_is_rejected():
    quantizer = made("encodec")
    quantizer.parts[0].stages[2].embedding.weight.data[1, 0] = torch.nan
    with pytest.raises(CodebookError, match="code 1 holds NaN"):
        quantizer.encode(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_quantizers": 0}, "num_quantizers must be a positive integer"),
        ({"num_quantizers": 257}, "257 quantizers are more than 256"),
        ({"n_e": 0}, "num_codes must be"),
        ({"n_e": [6, 6, 6]}, "num_codes must have 4 numbers, one for each stage, not 3"),
        ({"n_e": [6] * 5}, "num_codes must have 4 numbers, one for each stage, not 5"),
        ({"n_e": []}, "num_codes must have 4 numbers, one for each stage, not 0"),
        ({"n_e": [6, 6, 0, 6]}, "num_codes must be a positive integer, not 0"),
        ({"n_e": [6, 6, True, 6]}, "num_codes must be a positive integer, not True"),
        ({"n_e": [6, 6, [6], 6]}, r"num_codes must be a positive integer, not \[6\]"),
        ({"n_e": "6666"}, "num_codes must be a positive integer, not '6666'"),
        ({"n_e": {6}}, "num_codes must be a positive integer"),
        ({"e_dim": True}, "code_dim must be"),
        ({"groups": 0}, "groups must be"),
        ({"groups": 3}, "3 groups do not divide 4 quantizers"),
        ({"groups": 2, "input_dim": 5}, "2 groups do not divide 4 quantizers and 5 channels"),
        ({"first_quantizers": 4}, r"first_quantizers must be an integer in \[0, 4\)"),
        ({"first_quantizers": -1}, "first_quantizers must be"),
        ({"first_quantizers": 1.0}, "first_quantizers must be"),
        ({"groups": 2, "first_quantizers": 1}, "exclude each other"),
        ({"metric": "l1"}, "metric must be one of l2, cosine, dot"),
        ({"decode_normalized": True}, "decode_normalized is for metric 'cosine'"),
        ({"input_dim": 5}, "codes of width 3 cannot be subtracted from 5 channels"),
        ({"inner_dim": 4}, "codes of width 3 cannot be subtracted from 4 channels"),
        ({"inner_dim": 0}, "inner_dim must be"),
    ],
)
def test_arrangements_are_checked(changes, match):
    with pytest.raises(InvalidOption, match=match):
        ResidualQuantizer(**{**ENCODEC, **changes})


def test_the_order_of_a_token_s_indices():
    grouped = ResidualQuantizer(**GROUPED).structure.parts
    assert [(part.start, part.stop, part.places) for part in grouped] == [(0, 2, (0, 2, 4)), (2, 4, (1, 3, 5))]
    split = ResidualQuantizer(**MIMI).structure.parts
    assert [(part.start, part.stop, part.places) for part in split] == [(0, 5, (0,)), (0, 5, (1, 2, 3))]


def test_one_stage_has_an_axis_too():
    quantizer = ResidualQuantizer(1, 6, 3)
    assert quantizer.encode(torch.zeros(2, 3, 5)).shape == (2, 1, 5)
    assert quantizer.decode(torch.zeros(2, 1, 5, dtype=torch.int64)).shape == (2, 3, 5)


def test_a_residual_of_its_own_code_is_reported_at_the_first_stage():
    quantizer = made("encodec")
    codes = quantizer.parts[0].stages[0].embedding.weight.detach()
    assert quantizer.encode(codes, 1)[:, 0].tolist() == list(range(6))
    assert torch.equal(quantizer.decode(torch.tensor([[i, 0, 0, 0] for i in range(6)]), 1), codes)
