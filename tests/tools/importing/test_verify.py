"""`vqserved import --verify`: a known pair is checked before a file is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kinds import with_every_kind
from support.brute_force import nearest
from vqserve_server.errors import ForeignCheckpointError
from vqserve_server.quantizers import (
    CosineQuantizer,
    DotQuantizer,
    FiniteScalarQuantizer,
    GumbelQuantizer,
    LookupFreeQuantizer,
    ResidualFiniteScalarQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
)
from vqserve_tools import cli
from vqserve_tools.importing.verify import verify

RNG = np.random.default_rng(0)
CODES = RNG.standard_normal((16, 4)).astype(np.float32)


@pytest.fixture
def run(tmp_path: Path, capsys):
    """Import CODES with latents and indices beside them; return status, stdout, stderr and whether a file was made."""

    def verified(latents: np.ndarray, indices: np.ndarray, *flags: str, codes: np.ndarray = CODES):
        for name, array in (("codes", codes), ("z", latents), ("i", indices)):
            np.save(tmp_path / f"{name}.npy", array)
        out = tmp_path / "out.safetensors"
        paths = [str(tmp_path / f"{name}.npy") for name in ("codes", "z", "i")]
        args = ["import", paths[0], "-o", str(out), *(flags or ("--metric", "l2")), "--verify", *paths[1:]]
        status = cli.main(args)
        text, err = capsys.readouterr()
        return status, text, err, out.exists()

    return verified


def test_a_pair_that_agrees(run):
    z = RNG.standard_normal((100, 4)).astype(np.float32)
    status, text, err, there = run(z, nearest(z, CODES).astype(np.uint8))
    assert (status, err, there) == (0, "", True)
    assert "verified  100 of 100 indices agree\n" in text


def test_a_pair_over_a_grid(run):
    z = RNG.standard_normal((2, 4, 3, 5)).astype(np.float16)
    indices = nearest(np.moveaxis(z, 1, -1).reshape(-1, 4), CODES).reshape(2, 3, 5)
    assert run(z, indices)[0] == 0
    last = np.ascontiguousarray(np.moveaxis(z, 1, -1))
    assert run(last, indices, "--metric", "l2", "--layout", "channels_last", "--force")[0] == 0


def test_an_empty_pair_is_no_verification(run):
    status, _, err, _ = run(np.zeros((0, CODES.shape[1]), np.float32), np.zeros(0, np.int64))
    assert status == 1
    assert "nothing would be compared" in err


def test_indices_beyond_int64_stay_large(run):
    _, _, err, _ = run(CODES[:5], np.arange(5, dtype=np.uint64) + 2**63)
    assert "is 0 here and 9223372036854775807 there" in err


def test_one_wrong_index_is_found(run):
    z = RNG.standard_normal((100, 4)).astype(np.float32)
    indices = nearest(z, CODES)
    right, indices[41] = indices[41], (indices[41] + 1) % 16
    status, text, err, there = run(z, indices)
    assert (status, text, there) == (1, "", False)
    assert err.count("\n") == 1
    assert "99 of 100 indices agree; of the 1 others 0 are near-ties" in err
    assert f"[41] is {right} here and {indices[41]} there" in err
    assert "nothing was written" in err


def test_the_wrong_metric_is_found(run):
    z = RNG.standard_normal((1000, 4)).astype(np.float32)
    status, _, err, there = run(z, nearest(z, CODES), "--metric", "cosine", "--decode", "raw")
    assert (status, there) == (1, False)
    assert "the metric is l2: --metric l2 (1000 of 1000 tokens would agree); nothing was written" in err


def test_another_layout_is_found(run):
    z = RNG.standard_normal((2, 4, 4, 4)).astype(np.float32)
    indices = nearest(np.moveaxis(z, 1, -1).reshape(-1, 4), CODES).reshape(2, 4, 4)
    _, _, err, _ = run(z, indices, "--metric", "l2", "--layout", "channels_last")
    assert "the latents are channels_first: --layout channels_first (32 of 32 tokens would agree)" in err


def test_columns_that_were_read_as_rows_are_found(run):
    codes = RNG.standard_normal((8, 8)).astype(np.float32)
    z = RNG.standard_normal((100, 8)).astype(np.float32)
    _, _, err, _ = run(z, nearest(z, codes.T), codes=codes)
    assert "the codes are the columns of the array: --transpose (100 of 100 tokens would agree)" in err


def test_no_known_reason(run):
    z = RNG.standard_normal((100, 4)).astype(np.float32)
    _, _, err, _ = run(z, nearest(z @ RNG.standard_normal((4, 4)), CODES))
    assert "a projection or a norm of the model may be left out" in err


@pytest.mark.parametrize("shape", [(60,), (60, 1), (3, 20)])
def test_indices_without_the_grid_are_taken(run, shape):
    z = RNG.standard_normal((3, 20, 4)).astype(np.float32)
    status, text, _, there = run(z, nearest(z.reshape(-1, 4), CODES).reshape(shape))
    assert (status, there) == (0, True)
    assert "verified  60 of 60 indices agree" in text


def stages(count: int, **options: object) -> ResidualQuantizer:
    quantizer = ResidualQuantizer(count, 16, 4, **options)
    generator = torch.Generator().manual_seed(1)
    for place, codebook in enumerate(quantizer.codebooks()):
        codebook.embedding.weight.data.normal_(generator=generator).mul_(0.7**place)
    return quantizer


Z_STAGES = RNG.standard_normal((5, 4, 40)).astype(np.float32)


def test_stages_of_different_sizes_in_the_reversed_order():
    right, reversed_ = ResidualQuantizer(3, [16, 5, 9], 4), ResidualQuantizer(3, [9, 5, 16], 4)
    for ours, theirs in zip(reversed_.codebooks(), right.codebooks()[::-1], strict=True):
        ours.embedding.weight.data = theirs.embedding.weight.data.normal_(generator=torch.Generator().manual_seed(2))
    outcome = verify(reversed_, Z_STAGES, right.encode(torch.from_numpy(Z_STAGES)).numpy())
    assert str(outcome.reason) == "the stages are in the reversed order (200 of 200 tokens would agree)"


def reordered(order: list[int]) -> ResidualQuantizer:
    right, other = stages(len(order)), stages(len(order))
    for codebook, place in zip(other.codebooks(), order, strict=True):
        codebook.embedding.weight.data = right.codebooks()[place].embedding.weight.data
    return other


@pytest.mark.parametrize(
    ("imported", "what"),
    [
        (stages(3, metric="dot"), "the metric is l2: --metric l2"),
        (reordered([2, 1, 0]), "the stages are in the reversed order"),
    ],
)
def test_a_reason_of_a_residual_codebook(imported, what):
    theirs = stages(3).encode(torch.from_numpy(Z_STAGES)).numpy()
    outcome = verify(imported, Z_STAGES, theirs)
    assert str(outcome.reason) == f"{what} (200 of 200 tokens would agree)"
    assert sum(outcome.by_stage) == outcome.different - outcome.near_ties


def test_stages_in_the_order_of_their_names_as_text():
    right = sorted(range(12), key=str)
    outcome = verify(reordered(right), Z_STAGES, stages(12).encode(torch.from_numpy(Z_STAGES)).numpy())
    # The importer's stage 2 is the model's stage 10.
    assert outcome.reason is None or "order" in outcome.reason.what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda ids: ids + 3, "the model's indices are more than ours by stage: 3, 3, 3: subtract that from them"),
        (lambda ids: ids + 16 * np.arange(3)[:, None], "more than ours by stage: 0, 16, 32"),
        (lambda ids: ids[:, [1, 2, 0]], "stages in another order: our stages are its 2, 0, 1"),
    ],
)
def test_indices_that_are_written_in_another_way(change, what):
    quantizer = stages(3)
    outcome = verify(quantizer, Z_STAGES, change(quantizer.encode(torch.from_numpy(Z_STAGES)).numpy()))
    assert what in str(outcome.reason)


def test_stages_on_another_axis_are_pointed_out():
    quantizer = stages(3)
    theirs = np.moveaxis(quantizer.encode(torch.from_numpy(Z_STAGES)).numpy(), 1, 0)
    with pytest.raises(ForeignCheckpointError, match=r"axis 0: save numpy.moveaxis\(indices, 0, 1\)"):
        verify(quantizer, Z_STAGES, theirs)


@pytest.mark.parametrize(
    ("ours", "theirs", "what"),
    [
        (FiniteScalarQuantizer([8, 6]), FiniteScalarQuantizer([8, 6], "symmetric"), "--bound symmetric"),
        (LookupFreeQuantizer(5, "big"), LookupFreeQuantizer(5, "little"), "--bit-order little"),
        (
            ResidualFiniteScalarQuantizer([5, 5], 3, "atanh", "levels_minus_one"),
            ResidualFiniteScalarQuantizer([5, 5], 3, "soft_clamp", "levels"),
            "--bound soft_clamp --scales levels",
        ),
    ],
)
def test_a_reason_of_scalars(ours, theirs, what):
    z = RNG.standard_normal((500, ours.input_dim)).astype(np.float32)
    outcome = verify(ours, z, theirs.encode(torch.from_numpy(z)).numpy())
    assert outcome.reason is not None
    assert what in outcome.reason.what
    assert outcome.reason.agree == 500


def test_near_ties_of_float32_are_forgiven_and_counted(run):
    # Half-way between two codes, a hair nearer to the first.
    z = ((CODES[2:3].astype(np.float64) + CODES[5:6]) / 2).astype(np.float32)
    codes = CODES.copy()
    codes[[i for i in range(16) if i not in (2, 5)]] += 100
    ours = nearest(z, codes)
    status, text, _, there = run(z, 7 - ours, codes=codes)
    assert (status, there) == (0, True)
    assert "verified  0 of 1 indices agree; of the 1 others 1 are near-ties" in text


@pytest.mark.parametrize(
    ("latents", "indices", "match"),
    [
        (np.zeros((3, 4), np.float32), np.zeros(2, int), "i.npy has shape (2,), the latents' indices have (3,)"),
        (np.zeros((3, 4), np.float32), np.zeros(3), "i.npy is float64: indices are integers"),
        (np.zeros((3, 4), int), np.zeros(3, int), "z.npy is int64: latents are floating-point numbers"),
        (np.zeros((3, 5), np.float32), np.zeros(3, int), "z.npy: latents of shape (3, 5) have 5 channels"),
        (np.full((1, 4), np.nan, np.float32), np.zeros(1, int), "z.npy: latents[0, 0] is nan"),
        (np.ones((1, 4), np.float32), np.array([-1]), "0 of 1 indices agree"),
        (np.ones((1, 4), np.float32), np.array([1 << 40]), "0 of 1 indices agree"),
        (np.zeros((3, 4), np.float32), np.zeros(3, int), "z.npy holds only zeros, which do not tell one code from"),
        (np.array([{}]), np.zeros(1, int), "Python objects"),
    ],
)
def test_pairs_that_do_not_fit(run, latents, indices, match):
    status, text, err, there = run(latents, indices)
    assert (status, text, there) == (1, "", False)
    assert err.count("\n") == 1
    assert match in err


def test_a_file_that_is_not_there_or_holds_names(run, tmp_path, capsys):
    np.save(tmp_path / "codes.npy", CODES)
    np.savez(tmp_path / "z.npz", z=CODES)
    args = ["import", str(tmp_path / "codes.npy"), "-o", str(tmp_path / "out.safetensors"), "--metric", "l2"]
    assert cli.main([*args, "--verify", str(tmp_path / "none.npy"), str(tmp_path / "codes.npy")]) == 1
    assert "none.npy: there is no such file" in capsys.readouterr()[1]
    assert cli.main([*args, "--verify", str(tmp_path / "z.npz"), str(tmp_path / "codes.npy")]) == 1
    assert "z.npz holds arrays by name" in capsys.readouterr()[1]


QUANTIZERS = with_every_kind(
    {
        "vq": lambda: VectorQuantizer(16, 4),
        "remap": lambda: VectorQuantizer(16, 4, remap=[3, 1, 8]),
        "projection": lambda: VectorQuantizerWithInputProjection(4, 16, 3),
        "cosine": lambda: CosineQuantizer(16, 4),
        "dot": lambda: DotQuantizer(16, 4),
        "gumbel": lambda: GumbelQuantizer(4, 2, 16),
        "fsq": lambda: FiniteScalarQuantizer([8, 5, 3, 4]),
        "lfq": lambda: LookupFreeQuantizer(4, "big"),
        "rvq": lambda: ResidualQuantizer(4, 16, 4),
        "grouped": lambda: ResidualQuantizer(4, 16, 2, 4, groups=2),
        "dac": lambda: ResidualQuantizer(4, 16, 2, 4, "cosine", stage_projections=True),
        "mimi": lambda: ResidualQuantizer(4, 16, 3, 4, inner_dim=3, first_quantizers=1),
        "sizes": lambda: ResidualQuantizer(4, [16, 9, 5, 16], 4),
        "normalized_residuals": lambda: ResidualQuantizer(4, 16, 4, normalize_residuals=True),
    }
)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_kind_tells_wrong_indices(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantizer = QUANTIZERS[name]()
        quantizer.layout = "channels_last"
        z = torch.randn(3, 5, quantizer.input_dim)
    for parameter in quantizer.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    indices = quantizer.encode(z).numpy()
    assert verify(quantizer, z.numpy(), indices).holds
    wrong = indices.copy()
    wrong[1] = (wrong[1] + 1) % quantizer.vocab_size
    outcome = verify(quantizer, z.numpy(), wrong)
    assert (outcome.total, outcome.different) == (indices.size, indices[1].size)
    assert not outcome.holds
    assert outcome.first.startswith("[1, ")


def test_what_follows_from_a_near_tie_is_one():
    first, second = CODES[:8] * 10, CODES[8:] / 10
    quantizer = ResidualQuantizer(2, 8, 4)
    for stage, codes in zip(quantizer.parts[0].stages, (first, second), strict=True):
        stage.embedding.weight.data = torch.from_numpy(codes)
    z = ((first[:1] + first[1:2]) / 2).astype(np.float32)
    first[2:] += 1000
    quantizer.parts[0].stages[0].embedding.weight.data = torch.from_numpy(first)
    ours = quantizer.encode(torch.from_numpy(z)).numpy()
    other = 1 - ours[0, 0]
    theirs = np.array([[other, nearest(z - first[other], second)[0]]])
    outcome = verify(quantizer, z, theirs)
    assert outcome.different >= 1
    assert outcome.holds
    # After a difference that is none, nothing is forgiven.
    assert not verify(quantizer, z, np.array([[5, theirs[0, 1]]])).holds


def test_near_ties_of_normalised_residuals():
    """In two dimensions, rows a hair beside the boundary of two codes, searched as GRID does in float32."""
    quantizer = ResidualQuantizer(2, 8, 2, normalize_residuals=True)
    generator = torch.Generator().manual_seed(3)
    for stage in quantizer.codebooks():
        stage.embedding.weight.data.normal_(generator=generator)
    angles = torch.linspace(0, 6.28, 200_001, dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    ids = quantizer.encode(circle)
    edges = torch.nonzero((ids[1:] != ids[:-1]).any(dim=1))[:, 0]
    low, high = angles[edges], angles[edges + 1]
    for _ in range(40):
        middle = (low + high) / 2
        same = (quantizer.encode(torch.stack([middle.cos(), middle.sin()], dim=1)) == ids[edges]).all(dim=1)
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    z = (torch.stack([low.cos(), low.sin()], dim=1) * 7.3).float()
    z = torch.cat([z, torch.nextafter(z, torch.tensor(9.0)), torch.nextafter(z, torch.tensor(-9.0))])
    residual, theirs = z, []
    for stage in quantizer.codebooks():
        residual = torch.nn.functional.normalize(residual, dim=-1)
        codes = stage.code_rows()
        distances = residual.square().sum(1, keepdim=True) - 2 * residual @ codes.T + codes.square().sum(1)
        theirs.append(distances.argmin(dim=1))
        residual = residual - codes[theirs[-1]]
    outcome = verify(quantizer, z.numpy(), torch.stack(theirs, dim=1).numpy())
    assert outcome.different > 5
    assert outcome.holds


def test_scalars_next_to_a_jump():
    quantizer = FiniteScalarQuantizer([5, 5])
    jump = float(quantizer.channels()[0].boundaries[1])
    z = np.array([[np.nextafter(np.float32(jump), np.float32(1)), 0.3]], np.float32)
    ours = quantizer.encode(torch.from_numpy(z)).numpy()
    outcome = verify(quantizer, z, ours - 1)
    assert (outcome.different, outcome.near_ties) == (1, 1)
    assert not verify(quantizer, z, ours - 5).holds


@pytest.mark.parametrize("bound", ["atanh", "atanh_twice", "soft_clamp", "symmetric"])
@pytest.mark.parametrize("groups", [1, 2])
def test_near_ties_of_residual_grids(bound, groups):
    quantizer = ResidualFiniteScalarQuantizer([5, 5], 3 * groups, bound, "levels_minus_one", groups=groups)
    at_jump = RNG.standard_normal((400, 2 * groups)).astype(np.float32)
    digit = quantizer.encode(torch.from_numpy(at_jump))[:, 0].numpy()
    # Two latents with adjacent numbers in one channel, on the two sides of a jump: rounding confuses them.
    beyond = at_jump.copy()
    beyond[:, 0] += 2
    for _ in range(40):
        middle = at_jump.copy()
        middle[:, 0] = (at_jump[:, 0] + beyond[:, 0]) / 2
        is_before = quantizer.encode(torch.from_numpy(middle))[:, 0].numpy() == digit
        at_jump[is_before], beyond[~is_before] = middle[is_before], middle[~is_before]
    here, there = (quantizer.encode(torch.from_numpy(rows)).numpy() for rows in (at_jump, beyond))
    assert (here[:, 0] != there[:, 0]).mean() > 0.5
    outcome = verify(quantizer, at_jump, there)
    assert outcome.different > 100
    assert outcome.holds
    assert not verify(quantizer, at_jump, (here + 7) % 25).holds


def test_very_many_differences_are_not_all_looked_at():
    quantizer = VectorQuantizer(16, 4)
    quantizer.embedding.weight.data = torch.from_numpy(CODES)
    z = RNG.standard_normal((20_000, 4)).astype(np.float32)
    outcome = verify(quantizer, z, (nearest(z, CODES) + 1) % 16)
    assert (outcome.total, outcome.different) == (20_000, 20_000)
    assert not outcome.holds


def test_words_are_refused_in_process_too():
    with pytest.raises(ForeignCheckpointError, match="--verify: latents is"):
        verify(VectorQuantizer(3, 2), np.array([["a"]]), np.zeros(1, int))
