"""Codes that are placed do not jump, and dead ones are found and moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vqserve_server.quantizers import EMAVectorQuantizer, VectorQuantizer
from vqserve_tools.training.learners import CodeUsage, draw_seeds, place_ema_codes, place_vq_codes


def ema_at(codes: torch.Tensor, tokens_per_step: float) -> EMAVectorQuantizer:
    quantizer = EMAVectorQuantizer(*codes.shape, 0.25).train()
    place_ema_codes(quantizer, torch.arange(len(codes)), codes, tokens_per_step)
    return quantizer


@pytest.mark.parametrize("tokens", [2, 256])
def test_placed_ema_codes_stay_where_no_token_comes(tokens: int) -> None:
    codes = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) + 10 * torch.arange(32)[:, None]
    quantizer = ema_at(codes, tokens)
    for _ in range(30):
        quantizer(codes[:1].expand(tokens, -1))
    moved = (quantizer.embedding.weight - codes).abs().amax(dim=1) / codes.abs().amax(dim=1)
    # The drift that is left is the formula's own eps, 1e-5 of K / tokens a step, as cluster_size decays.
    assert moved.max() < 1e-5 * 32 / tokens * 3


def test_without_placing_the_original_jump_is_there() -> None:
    quantizer = EMAVectorQuantizer(32, 4, 0.25).train()
    quantizer(torch.zeros(256, 4))
    assert quantizer.embedding.weight.abs().max() > 1e3


def test_a_placed_code_moves_to_its_tokens_by_the_share_of_one_step() -> None:
    codes = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    quantizer = ema_at(codes, 10)
    quantizer(torch.tensor([[1.0, 0.0]] * 5 + [[100.0, 0.0]] * 5))
    torch.testing.assert_close(
        quantizer.embedding.weight.data, torch.tensor([[0.01, 0.0], [100.0, 0.0]]), atol=1e-3, rtol=0
    )


def test_a_re_seeded_ema_code_lies_at_its_row_after_the_next_step() -> None:
    codes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e6, 0.0]])
    quantizer = ema_at(codes, 8)
    batch = torch.tensor([[0.0, 0.1], [1.0, 0.1], [5.0, 5.0], [5.0, 5.0]] * 2)
    place_ema_codes(quantizer, torch.tensor([2]), batch[2:3], 8)
    quantizer(batch)
    torch.testing.assert_close(quantizer.embedding.weight.data[2], batch[2], atol=1e-3, rtol=0)


def test_adam_forgets_a_re_seeded_code_and_no_other() -> None:
    quantizer = VectorQuantizer(4, 2)
    optimizer = torch.optim.Adam(quantizer.parameters())
    z_q, info = quantizer(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))
    del z_q
    info["loss/vq"].backward()
    optimizer.step()
    state = optimizer.state[quantizer.embedding.weight]
    before = state["exp_avg"].clone()
    place_vq_codes(quantizer, torch.tensor([1]), torch.tensor([[7.0, 8.0]]), optimizer)
    assert quantizer.embedding.weight[1].tolist() == [7.0, 8.0]
    before[1] = 0
    torch.testing.assert_close(state["exp_avg"], before, rtol=0, atol=0)
    assert (state["exp_avg_sq"][1] == 0).all()


def test_usage_names_the_codes_that_were_not_used_since_the_last_check() -> None:
    usage = CodeUsage(5, torch.device("cpu"))
    usage.add(torch.tensor([0, 0, 3]))
    usage.add(torch.tensor([4]))
    assert usage.take_dead().tolist() == [1, 2]
    assert usage.take_dead().tolist() == [0, 1, 2, 3, 4]


def test_seeds_are_distinct_rows_with_an_error() -> None:
    batch = torch.tensor([[0.0], [0.0], [2.0], [2.0], [3.0]])
    z_q = torch.zeros(5, 1)
    seeds = draw_seeds(batch, z_q, 4, np.random.default_rng(0))
    assert sorted(seeds.flatten().tolist()) == [2.0, 3.0]
    assert draw_seeds(batch, batch, 4, np.random.default_rng(0)).shape == (0, 1)
