"""What winners are worth, against rationals."""

from fractions import Fraction

import pytest
import torch

from vqserve_server.search import Objective, margins, prepare


def exact(row, code, bias, objective):
    pairs = [(Fraction(x), Fraction(y)) for x, y in zip(row.tolist(), code.tolist(), strict=True)]
    if objective is Objective.L2:
        return sum((x - y) ** 2 for x, y in pairs)
    return sum((x * y for x, y in pairs), Fraction(bias))


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gap_are_those_of_exact_arithmetic(objective, dtype):
    g = torch.Generator().manual_seed(0)
    codes = torch.cat([torch.randn(30, 5, generator=g), torch.randn(10, 5, generator=g) * 1e3])
    bias = torch.randn(40, generator=g) if objective is Objective.DOT else None
    rows = torch.cat([torch.randn(20, 5, generator=g), codes[-3:] + 1e-3]).to(dtype)
    winners = prepare(codes, objective=objective, bias=bias).search(rows)
    found = margins(codes, rows, winners, objective=objective, bias=bias)
    for r, row in enumerate(rows):
        worth = [exact(row, code, 0 if bias is None else bias[j].item(), objective) for j, code in enumerate(codes)]
        best = worth.pop(int(winners[r]))
        gap = min(worth) - best if objective is Objective.L2 else best - max(worth)
        assert found.value[r].item() == pytest.approx(float(best), rel=1e-12)
        assert found.gap[r].item() == pytest.approx(float(gap), rel=1e-9, abs=1e-9)


def test_equal_codes_leave_no_gap_and_a_single_code_has_no_rival():
    codes = torch.tensor([[1.0, 2.0], [1.0, 2.0], [5.0, 5.0]])
    rows = torch.tensor([[1.0, 1.0], [5.0, 6.0]])
    found = margins(codes, rows, torch.tensor([0, 2]))
    assert found.value.tolist() == [1.0, 1.0]
    assert found.gap.tolist() == [0.0, 31.0]
    assert margins(codes[:1], rows, torch.tensor([0, 0])).gap.tolist() == [torch.inf, torch.inf]


def test_many_rows_are_cut_into_tiles():
    g = torch.Generator().manual_seed(1)
    codes, rows = torch.randn(70000, 2, generator=g), torch.randn(40, 2, generator=g)
    winners = prepare(codes).search(rows)
    together = margins(codes, rows, winners)
    alone = [margins(codes, rows[i : i + 1], winners[i : i + 1]).gap.item() for i in range(40)]
    assert together.gap.tolist() == pytest.approx(alone)
    assert margins(codes, rows[:0], winners[:0]).value.shape == (0,)
