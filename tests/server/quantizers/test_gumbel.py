"""GumbelQuantizer: torch's own draws, and the greatest logit in encode."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from vqserve_server.errors import InvalidOption

USED = [9, 3, 12, 3, 0]


@pytest.mark.parametrize("remap", [None, USED])
@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_one_seed_draws_the_numbers_of_torch(make, latents, remap, straight_through, training):
    module = make("gumbel", straight_through=straight_through, remap=remap).train(training)
    z = latents(module).requires_grad_()
    cotangent = torch.randn(2, 4, 3, 4)
    torch.manual_seed(11)
    z_q, info = module(z, temp=0.7)
    ((z_q * cotangent).sum() + info["loss/vq"]).backward()
    gradients = [value.grad for value in (z, *module.parameters())]
    module.zero_grad()

    torch.manual_seed(11)
    reference = z.detach().clone().requires_grad_()
    logits = module.proj(reference)
    used = torch.arange(16) if remap is None else torch.tensor(remap)
    logits = logits[:, used]
    y = functional.gumbel_softmax(logits, 0.7, hard=straight_through or not training, dim=1)
    expected = torch.einsum("bkhw,kd->bdhw", y, module.embed.weight[used])
    q = torch.softmax(logits, dim=1)
    loss = 5e-4 * (q * torch.log(q * 16 + 1e-10)).sum(1).mean()
    ((expected * cotangent).sum() + loss).backward()

    torch.testing.assert_close(z_q, expected)
    torch.testing.assert_close(info["loss/vq"], loss)
    assert torch.equal(info["indices"], y.argmax(dim=1))
    for got, parameter in zip(gradients, (reference, *module.parameters()), strict=True):
        torch.testing.assert_close(got, parameter.grad)


def test_eval_draws_too(make, latents):
    module = make("gumbel").eval()
    z = latents(module)
    draws = {tuple(module(z)[1]["indices"].flatten().tolist()) for _ in range(5)}
    assert len(draws) == 5
    z_q, info = module(z)
    torch.testing.assert_close(z_q, module.decode(info["indices"]))
    assert len({tuple(module.encode(z).flatten().tolist()) for _ in range(5)}) == 1


def test_temperature_is_a_plain_attribute(make, latents):
    module = make("gumbel", straight_through=False, temp_init=0.3).train()
    z = latents(module)
    assert "temperature" not in module.state_dict()

    def drawn(**arguments):
        torch.manual_seed(2)
        return module(z, **arguments)[0]

    first = drawn()
    assert torch.equal(first, drawn(temp=0.3))
    assert not torch.equal(first, drawn(temp=2.0))
    module.temperature = 2.0
    assert torch.equal(drawn(), drawn(temp=2.0))


@pytest.mark.parametrize("temp", [0, 0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_rejected(make, latents, temp):
    # Not taken for "no temperature given".
    module = make("gumbel")
    with pytest.raises(InvalidOption, match="temperature"):
        module(latents(module), temp=temp)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_logits_lie_as_the_input_does(make, latents, rank):
    module = make("gumbel", remap=USED)
    z = latents(module, rank)
    axis = 1 if rank >= 4 else rank - 1
    z_q, info = module(z, return_logits=True)
    assert info["logits"].shape == (*z.shape[:axis], 5, *z.shape[axis + 1 :])
    assert z_q.shape == (*z.shape[:axis], 4, *z.shape[axis + 1 :])
    assert info["indices"].shape == (*z.shape[:axis], *z.shape[axis + 1 :])
    rows = z.movedim(axis, -1)
    expected = rows @ module.proj.weight[USED, :, 0, 0].T + module.proj.bias[USED]
    torch.testing.assert_close(info["logits"].movedim(axis, -1), expected)
    assert set(module(z)[1]) == {"loss/vq", "indices"}


def test_k_stays_n_embed_in_the_loss_under_a_remap(make):
    module = make("gumbel", remap=[1, 4, 6, 7], kl_weight=1.0)
    torch.nn.init.zeros_(module.proj.weight)
    torch.nn.init.zeros_(module.proj.bias)
    _, info = module(torch.randn(3, 6))
    # Even use of the four is ln(16 / 4), not 0.
    assert abs(info["loss/vq"].item() - math.log(4)) < 1e-6


def test_encode_is_the_exact_score_of_the_stored_floats(make):
    # In float32 both logits round to 2^25; the bias decides in exact arithmetic.
    module = make("gumbel", num_codes=3)
    weight = torch.zeros(3, 6, 1, 1)
    weight[:, 0] = 1.0
    module.proj.weight.data = weight
    module.proj.bias.data = torch.tensor([0.0, 0.25, 0.125])
    z = torch.zeros(1, 6)
    z[0, 0] = 2.0**25
    assert module.encode(z).tolist() == [1]
    remapped = make("gumbel", num_codes=3, remap=[0, 2, 1, 1], unknown_index="extra")
    remapped.load_state_dict({**module.state_dict(), "used": remapped.used})
    assert remapped.encode(z).tolist() == [2]


def test_ties_go_to_the_lowest_id_and_under_a_remap_to_the_lowest_position(make):
    module = make("gumbel", num_codes=4)
    module.proj.weight.data[3] = module.proj.weight.data[1]
    module.proj.bias.data[:] = torch.tensor([-50.0, 1.0, -50.0, 1.0])
    z = torch.zeros(2, 6)
    assert module.encode(z).tolist() == [1, 1]
    remapped = make("gumbel", num_codes=4, remap=[0, 3, 1, 3])
    remapped.load_state_dict({**module.state_dict(), "used": remapped.used})
    assert remapped.encode(z).tolist() == [1, 1]
    assert torch.equal(remapped.decode(torch.tensor([1])), module.decode(torch.tensor([3])))


def test_nothing_is_ever_reported_as_unknown(make, latents):
    module = make("gumbel", remap=USED, unknown_index=77)
    z = torch.cat([latents(module, 2, seed) for seed in range(20)])
    for indices in (module.encode(z), module(z)[1]["indices"]):
        assert int(indices.min()) >= 0
        assert int(indices.max()) < 5
        assert module.decode(indices).shape == (140, 4)
