"""EMAVectorQuantizer: when and how its codebook moves."""

from __future__ import annotations

import pytest
import torch

from vqserve_server.quantizers import EmbeddingEMA


def _state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def _unchanged(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def _expected_step(before, z, ids, decay, eps):
    """The formulas of quantizers.md in float64, with the dense one-hot that the module avoids."""
    one_hot = torch.nn.functional.one_hot(ids, before["embedding.weight"].shape[0]).double()
    cluster_size = decay * before["embedding.cluster_size"].double() + (1 - decay) * one_hot.sum(0)
    embed_avg = decay * before["embedding.embed_avg"].double() + (1 - decay) * one_hot.T @ z.double()
    total = cluster_size.sum()
    smoothed = (cluster_size + eps) / (total + len(cluster_size) * eps) * total
    return {
        "embedding.weight": embed_avg / smoothed[:, None],
        "embedding.cluster_size": cluster_size,
        "embedding.embed_avg": embed_avg,
    }


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_training_takes_the_documented_step(make, latents, nearest, assert_close, rank):
    module = make("ema", decay=0.8, eps=1e-3).train()
    for seed in range(3):
        z = latents(module, rank, seed)
        rows = (z.movedim(1, -1) if rank > 3 else z).reshape(-1, 4)
        before = _state(module)
        ids = nearest(rows, module.embedding.weight)
        z_q, info = module(z)
        # z_q and loss are those of the old weight.
        codes = before["embedding.weight"][ids]
        torch.testing.assert_close((z_q.movedim(1, -1) if rank > 3 else z_q).reshape(-1, 4), codes)
        torch.testing.assert_close(info["loss/vq"], 0.25 * ((codes - rows) ** 2).mean())
        assert torch.equal(info["encoding_indices"], ids)
        for name, value in _expected_step(before, rows, ids, 0.8, 1e-3).items():
            assert_close(module.state_dict()[name], value)


def test_only_the_commitment_loss_has_a_gradient(make, latents):
    module = make("ema", beta=0.6).double().train()
    z = latents(module, 2).double().requires_grad_()
    codes = module.embedding.weight.clone()[module.encode(z)]
    z_q, info = module(z)
    info["loss/vq"].backward(retain_graph=True)
    torch.testing.assert_close(z.grad, 0.6 * 2 * (z.detach() - codes) / z.numel())
    z.grad = None
    z_q.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
    assert all(value.grad is None for value in module.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_update_happens_in_every_grad_mode(make, latents, mode):
    module, reference = make("ema").train(), make("ema").train()
    z = latents(module)
    reference(z)
    with mode():
        module(z)
    assert _unchanged(module, reference.state_dict())


def test_no_update_in_eval_or_when_switched_off(make, latents):
    module = make("ema")
    before = _state(module)
    module.eval()(latents(module))
    assert _unchanged(module, before)
    module.train().embedding.update = False
    module(latents(module))
    assert _unchanged(module, before)
    module.embedding.update = True
    module(latents(module))
    assert not _unchanged(module, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_batch_that_is_not_finite_leaves_all_three_tensors_alone(make, latents, value, dtype):
    # In the original one NaN token poisons every row of the codebook.
    module = make("ema").train()
    module(latents(module))
    before = _state(module)
    z = latents(module, seed=2).to(dtype)
    z[1, 2, 0, 3] = value
    module(z)
    assert _unchanged(module, before)
    module(latents(module, seed=2))
    assert not _unchanged(module, before)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_the_update_does_not_wait_for_a_device():
    # A meta tensor has no values: whatever looks at one on the host (.item(), bool, int) raises.
    embedding = EmbeddingEMA(5, 3).to("meta")
    embedding.update_from(torch.zeros(7, 3, device="meta"), torch.zeros(7, dtype=torch.int64, device="meta"))


def test_sums_that_overflow_the_averages_skip_the_update_too(make):
    module = make("ema").train()
    before = _state(module)
    module(torch.full((4, 4), 1e300, dtype=torch.float64))
    assert _unchanged(module, before)
    module(torch.full((40, 4), 3e38))
    assert _unchanged(module, before)


def test_the_update_does_not_touch_graphs_in_flight(make, latents):
    module = make("ema").train()
    z = latents(module).requires_grad_()
    first, first_info = module(z)
    second, _ = module(z)
    (first.sum() + second.sum() + first_info["loss/vq"]).backward()
    assert torch.isfinite(z.grad).all()


def test_encodings_are_reported_only_when_asked_for(make, latents):
    module = make("ema", remap=[3, 1], unknown_index=-1).eval()
    z = latents(module).double()
    assert set(module(z)[1]) == {"loss/vq", "encoding_indices", "perplexity"}
    info = module(z, return_encodings=True)[1]
    assert set(info) == {"loss/vq", "encoding_indices", "perplexity", "encodings"}
    ids = make("ema").encode(z).flatten()
    assert torch.equal(info["encodings"], torch.eye(16, dtype=torch.float64)[ids])


def test_the_first_step_s_jump_is_kept(make):
    # Trained checkpoints depend on the formula: an unreached code goes to about decay * |w0| / eps.
    module = make("ema").train()
    w0 = module.embedding.weight.clone()
    module(w0[:1].repeat(5, 1))
    torch.testing.assert_close(module.embedding.weight[1:], 0.99 * w0[1:] / 1e-5, rtol=0.01, atol=0)


def test_the_updates_by_themselves(assert_close):
    torch.manual_seed(0)
    embedding = EmbeddingEMA(3, 2, decay=0.5, eps=0.25)
    average = embedding.embed_avg.clone()
    embedding.cluster_size_ema_update(torch.tensor([4, 0, 2]))
    assert embedding.cluster_size.tolist() == [2.0, 0.0, 1.0]
    embedding.embed_avg_ema_update(torch.ones(3, 2))
    torch.testing.assert_close(embedding.embed_avg.detach(), 0.5 * average + 0.5)
    embedding.weight_update(3)
    smoothed = torch.tensor([2.25, 0.25, 1.25]) / 3.75 * 3
    torch.testing.assert_close(embedding.weight.detach(), embedding.embed_avg / smoothed[:, None])
    assert torch.equal(embedding(torch.tensor([[2, 0]])), embedding.weight[[2, 0]][None])
    assert (embedding.decay, embedding.eps, embedding.update) == (0.5, 0.25, True)


def test_an_optimizer_checkpoint_counts_the_three_parameters(make):
    # They are parameters, not buffers, for the sake of such checkpoints.
    module = make("ema")
    assert [name for name, _ in module.named_parameters()] == [
        "embedding.weight",
        "embedding.cluster_size",
        "embedding.embed_avg",
    ]
    assert not list(module.buffers())
    assert len(torch.optim.Adam(module.parameters()).state_dict()["param_groups"][0]["params"]) == 3
