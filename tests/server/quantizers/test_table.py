"""Looking up rows, also in narrower types: against the exact rational rounding of every value."""

from __future__ import annotations

import pickle
from fractions import Fraction

import pytest
import torch

from vqserve.dtypes import BY_NAME, to_numpy
from vqserve_server.quantizers.inference.host import HostTable
from vqserve_server.quantizers.inference.lookup import Table

WIDE = [torch.float32, torch.float64]
NARROW = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rows_of(dtype: torch.dtype) -> torch.Tensor:
    """Rows with ties of every narrower type, their neighbours, subnormals and zeros among random ones."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    special = [0.0, -0.0, 1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-12, -(1 + 2**-11), 2.0**-25, 2.0**-24 * 1.5, 2.0**-140]
    special += [1 + 2**-9 + 2**-22, 1 + 2**-9 - 2**-22, 1 + 2**-9 + 2**-40, 1 + 2**-11 - 2**-40, 1 + 2**-24 + 2**-50]
    rows[: len(special), 0] = torch.tensor(special, dtype=torch.float64)
    return rows.to(dtype)


def is_nearest_even(value: float, rounded: torch.Tensor) -> bool:
    """Whether no neighbour is closer, and of two that are as close the even one was taken."""
    limits = torch.tensor([-torch.inf, torch.inf], dtype=rounded.dtype)
    error = abs(Fraction(rounded.item()) - Fraction(value))
    for neighbour in torch.nextafter(rounded.expand(2), limits):
        other = abs(Fraction(neighbour.item()) - Fraction(value))
        bits = rounded.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rounded.dtype.itemsize])
        if other < error or (other == error and int(bits) & 1):
            return False
    return True


@pytest.mark.parametrize("wanted", NARROW)
@pytest.mark.parametrize("dtype", WIDE)
def test_rows_are_rounded_once(dtype, wanted):
    rows = rows_of(dtype)
    indices = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    taken = Table(rows).take(indices, wanted)
    assert taken.dtype == (wanted if wanted.itemsize < dtype.itemsize else dtype)
    assert taken.shape == (200, 5)
    for value, rounded in zip(rows[indices].flatten(), taken.flatten(), strict=True):
        assert is_nearest_even(value.item(), rounded)
        assert torch.signbit(value) == torch.signbit(rounded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *WIDE])
def test_as_they_are(dtype):
    rows = rows_of(torch.float64).to(dtype)
    taken = Table(rows).take(torch.tensor([3, 3, 0]))
    assert taken.dtype == dtype
    assert torch.equal(taken, rows[[3, 3, 0]])
    assert Table(rows).take(torch.empty(0, dtype=torch.int64)).shape == (0, 5)


def test_what_is_beyond_the_range_leaves_the_table_as_it_is():
    """Then the code that rounds can name the index, and the other codes are served."""
    rows = rows_of(torch.float32)
    rows[17, 2] = 65520.0
    table = Table(rows)
    for _ in range(2):
        taken = table.take(torch.tensor([17, 0]), torch.float16)
        assert taken.dtype == torch.float32
        assert torch.equal(taken, rows[[17, 0]])
    assert table.take(torch.tensor([17]), torch.bfloat16).dtype == torch.bfloat16


def test_taken_rows_are_a_copy():
    table = Table(rows_of(torch.float32))
    for dtype in (None, torch.bfloat16):
        before = table.take(torch.arange(200), dtype)
        table.take(torch.arange(200), dtype).zero_()
        assert torch.equal(table.take(torch.arange(200), dtype), before)


def test_it_pickles_without_what_can_be_made_again():
    table = Table(rows_of(torch.float32))
    pickled = pickle.dumps(table)
    expected = table.take(torch.arange(200), torch.float16)
    assert len(pickle.dumps(table)) == len(pickled)
    again = pickle.loads(pickled)  # noqa: S301
    assert torch.equal(again.take(torch.arange(200), torch.float16), expected)


@pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("largest", [1.0, 65520.0])
def test_a_table_of_arrays_is_the_same(wanted, largest):
    rows = rows_of(torch.float32)
    rows[17, 2] = largest
    indices = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    expected = to_numpy(Table(rows).take(indices, getattr(torch, wanted)))
    table = HostTable(rows.numpy())
    for again in (table, pickle.loads(pickle.dumps(table))):  # noqa: S301
        taken = again.take(indices.numpy(), BY_NAME[wanted].storage)
        assert taken.dtype == expected.dtype
        assert taken.tobytes() == expected.tobytes()
        taken[:] = 0
        assert again.take(indices.numpy(), BY_NAME[wanted].storage).tobytes() == expected.tobytes()
