"""Rows that a search gets wrong first: near-ties, rows whose sums overflow or underflow, zeros."""

from __future__ import annotations

import torch

# Of a thousand rows: this many of each kind. The others are random, and half of these near a code.
NEAR_TIES = 30
EXTREME = 4
# Scores that are computed to find the two best codes of rows.
_MOST_SCORES = 1 << 24


def hard_rows(codes: torch.Tensor, bias: torch.Tensor | None, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return (count, D) float32 rows, on the device of the codes.

    Args:
        codes: (K, D) float32.
        bias: (K,), for the objective DOT; None for L2.
        count: number of rows.
        generator: on the same device.
    """
    device, dim = codes.device, codes.shape[1]

    def noise(n: int) -> torch.Tensor:
        return torch.randn(n, dim, generator=generator, device=device)

    ties, extreme = count * NEAR_TIES // 1000, count * EXTREME // 1000
    plain = count - ties - extreme
    near = codes[torch.randint(len(codes), (plain // 2,), generator=generator, device=device)]
    near_ties = moved_to_ties(noise(ties), codes, bias)
    # By up to two units in the last place to either side.
    steps = torch.randint(-2, 3, near_ties.shape, generator=generator, device=device)
    for _ in range(2):
        towards = torch.where(steps > 0, torch.inf, -torch.inf)
        near_ties = torch.where(steps == 0, near_ties, torch.nextafter(near_ties, towards))
        steps -= steps.sign()
    # Squares of the largest overflow float32; the smallest are subnormal numbers.
    scales = torch.tensor([1e4, 1e18, 3e30, 1e-20, 1e-42, 0.0], device=device)
    extremes = noise(extreme) * scales[torch.arange(extreme, device=device) % len(scales), None]
    rows = torch.cat([noise(plain - len(near)), near + 0.05 * noise(len(near)), near_ties, extremes])
    return rows[torch.randperm(count, generator=generator, device=device)]


def moved_to_ties(rows: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Move rows (n, D) to where the scores of their two best codes are equal, as nearly as float32 has such rows."""
    if len(codes) < 2:
        return rows
    wide = codes.double()
    offset = -0.5 * (wide**2).sum(1) if bias is None else bias.double()
    moved = []
    for part in rows.double().split(max(1, _MOST_SCORES // len(codes))):
        first, second = torch.addmm(offset, part, wide.T).topk(2, dim=1).indices.T
        away = wide[first] - wide[second]
        lead = (part * away).sum(1) + offset[first] - offset[second]
        moved.append(part - (lead / (away**2).sum(1))[:, None] * away)
    return torch.cat([rows[:0].double(), *moved]).float()
