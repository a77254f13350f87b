"""Which rows are held out, and that neither they nor the curve change the codebook."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vqserve.errors import InvalidOption
from vqserve_tools.latents.array import ArrayRows
from vqserve_tools.latents.dataset import DataSet
from vqserve_tools.latents.options import SourceOptions
from vqserve_tools.latents.rows import RandomRows, Subset
from vqserve_tools.latents.sample import SampledRows
from vqserve_tools.training.held_out import split
from vqserve_tools.training.options import TrainingOptions
from vqserve_tools.training.trainer import Trained, train


def numbered(count: int) -> np.ndarray:
    return np.stack([np.arange(count)] * 2, axis=1).astype(np.float32)


def sample(items: np.ndarray, entries: np.ndarray) -> SampledRows:
    """Return rows that are numbered, of these items and entries of the batch axis."""
    origins = np.stack([items, entries, np.arange(len(items))], axis=1)
    return SampledRows(DataSet([], SourceOptions(), channels=2), numbered(len(items)), origins)


def numbers(rows: RandomRows) -> set[int]:
    return set(rows.take(np.arange(len(rows)))[:, 0].astype(int).tolist())


def test_items_are_held_out_as_a_whole() -> None:
    items = np.repeat(np.arange(200), np.arange(200) % 7 + 1)
    rows = sample(items, np.zeros_like(items))
    parts = split(rows, 0.05, seed=0)
    assert (parts.unit, parts.held_out_units, parts.units) == ("items", 10, 200)
    held_out, training = numbers(parts.held_out), numbers(parts.training)
    assert held_out | training == set(range(len(items)))
    assert not held_out & training
    assert len(set(items[sorted(held_out)])) == 10
    assert not set(items[sorted(held_out)]) & set(items[sorted(training)])
    assert numbers(split(rows, 0.05, seed=0).held_out) == held_out
    assert numbers(split(rows, 0.05, seed=1).held_out) != held_out


def test_entries_of_the_batch_axis_are_held_out_if_there_are_few_items() -> None:
    rows = sample(np.repeat([0, 1], 300), np.tile(np.repeat(np.arange(100), 3), 2))
    parts = split(rows, 0.05, seed=0)
    assert (parts.unit, parts.held_out_units, parts.units) == ("entries of the batch axis", 10, 200)
    assert len(parts.held_out) == 30
    held_out, training = ({number // 3 for number in numbers(part)} for part in (parts.held_out, parts.training))
    assert not held_out & training


def test_rows_are_held_out_if_there_are_few_of_both() -> None:
    parts = split(sample(np.repeat([0, 1], 100), np.tile([0, 1], 100)), 0.1, seed=0)
    assert (parts.unit, parts.held_out_units, parts.units) == ("rows", 20, 200)


def test_of_one_array_entries_or_rows_are_held_out() -> None:
    pictures = ArrayRows(np.repeat(np.arange(120, dtype=np.float32), 2 * 6).reshape(120, 2, 2, 3))
    parts = split(pictures, 0.05, seed=0)
    assert (parts.unit, parts.held_out_units, len(parts.held_out)) == ("entries of the batch axis", 6, 36)
    assert len(numbers(parts.held_out)) == 6
    assert split(ArrayRows(numbered(100)), 0.05, seed=0).unit == "rows"
    assert split(ArrayRows(np.zeros((20, 2, 8, 8), np.float32)), 0.05, seed=0).unit == "rows"


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_share_that_leaves_nothing_is_an_error(share: float) -> None:
    with pytest.raises(InvalidOption, match=r"held_out 0\.\d+ of 100 rows is (0|100)$"):
        split(ArrayRows(numbered(100)), share, seed=0)


def test_a_subset_has_its_rows() -> None:
    some = Subset(ArrayRows(numbered(10)), np.array([1, 4, 7, 8]))
    np.testing.assert_array_equal(np.concatenate(list(some.chunks(3)))[:, 0], [1, 4, 7, 8])
    np.testing.assert_array_equal(some.take(np.array([3, 0]))[:, 0], [8, 1])
    assert (len(some), some.dim, some.describe().tokens) == (4, 2, 4)


@pytest.mark.parametrize("kind", ["ema", "vq"])
def test_what_is_measured_does_not_change_the_codebook(kind: str) -> None:
    rng = np.random.default_rng(0)
    rows, new = ArrayRows(rng.normal(size=(600, 4))), ArrayRows(rng.normal(size=(300, 4)))
    options = TrainingOptions(kind=kind, num_codes=64, steps=60, batch_size=200, reseed_every=10, device="cpu")

    def run(**measured: object) -> Trained:
        return train(rows, options, **measured)  # type: ignore[arg-type]

    plain, measured = run(), run(held_out=new, with_curve=True)
    assert torch.equal(plain.quantizer.code_rows(), measured.quantizer.code_rows())
    assert plain.quality == measured.quality
    assert (plain.held_out, plain.curve) == (None, [])

    assert measured.held_out is not None
    # 64 codes of 600 rows are more about these rows than about the distribution.
    assert measured.held_out.mean_squared_error > 1.1 * measured.quality.mean_squared_error
    first, last = measured.curve[0], measured.curve[-1]
    assert [point.step for point in measured.curve] == list(range(61))
    assert last.training.error < first.training.error
    # All rows are few enough to be measured each time.
    assert last.training.error == pytest.approx(measured.quality.mean_squared_error)
    assert last.training.perplexity == pytest.approx(measured.quality.perplexity)
    assert last.held_out is not None
    assert last.held_out.error == pytest.approx(measured.held_out.mean_squared_error)
