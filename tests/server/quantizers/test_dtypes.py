"""Half, double and autocast: which numbers are searched, and what type comes back."""

from __future__ import annotations

import pytest
import torch

from vqserve_server import search
from vqserve_server.quantizers import freeze

HALVES = (torch.float16, torch.bfloat16)
ALL = (*HALVES, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_latents_are_widened_before_the_search(make, latents, kind, dtype):
    module = make(kind, num_codes=64).eval()
    z = torch.cat([latents(module, 2, seed) for seed in range(8)]).to(dtype)
    assert torch.equal(module.encode(z), module.encode(z.float()))
    assert torch.equal(module.encode(z), module.encode(z.double()))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_search_keeps_its_tokens_at_large_norms(make, dtype):
    # EMA codebooks reach norms of 4000: distances in half precision overflow or lose every digit.
    module = make("ema", num_codes=64, code_dim=8)
    module.embedding.weight.mul_(1500)
    z = (module.embedding.weight + torch.randn(64, 8)).to(dtype)
    assert torch.isfinite(z).all()
    assert torch.equal(module.encode(z), torch.arange(64))
    assert torch.equal(module.eval()(z)[1]["encoding_indices"], torch.arange(64))


@pytest.mark.parametrize("weight", ALL)
@pytest.mark.parametrize("dtype", ALL)
def test_result_types(make, latents, kind, dtype, weight):
    # With the default eps the codes that no row chose leave float16's range in the first step.
    arguments = {"eps": 1.0} if kind == "ema" else {"log_perplexity": True} if "vq" in kind else {}
    module = make(kind, **arguments).to(weight).train()
    z = latents(module).to(dtype)
    z_q, info = module(z)
    promoted = torch.promote_types(dtype, weight)
    assert z_q.dtype == promoted
    wide = torch.float64 if torch.float64 in {dtype, weight} else torch.float32
    assert info["loss/vq"].dtype == wide
    assert info["loss/vq"].shape == ()
    if "perplexity" in info:
        assert info["perplexity"].dtype == wide
        assert info["perplexity"].shape == ()
    for name in ("min_encoding_indices", "encoding_indices", "indices"):
        if name in info:
            assert info[name].dtype == torch.int64
    indices = module.encode(z)
    assert indices.dtype == torch.int64
    assert module.decode(indices).dtype == weight
    assert module.weight_dtype == weight
    assert module.get_codebook_entry(indices).dtype == weight


@pytest.mark.parametrize("weight", ALL)
@pytest.mark.parametrize("dtype", ALL)
def test_forward_searches_what_encode_searches_in_every_type(make, kind, latents, nearest, dtype, weight):
    module = make(kind, num_codes=64).to(weight).eval()
    z = torch.cat([latents(module, 2, seed) for seed in range(8)]).to(dtype)
    if kind == "gumbel":
        scores = z.double() @ module.proj.weight.double()[:, :, 0, 0].T + module.proj.bias.double()
        assert torch.equal(module.encode(z), scores.argmax(dim=1))
        return
    key = "encoding_indices" if kind == "ema" else "min_encoding_indices"
    assert torch.equal(module(z)[1][key], module.encode(z))
    if kind != "vq_projection":
        assert torch.equal(module.encode(z), nearest(z, module.embedding.weight))


def test_gradients_reach_half_inputs_and_weights(make, latents, kind):
    module = make(kind).half().train()
    z = latents(module).half().requires_grad_()
    z_q, info = module(z)
    (z_q.float().square().sum() + info["loss/vq"]).backward()
    assert z.grad.dtype == torch.float16
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().sum() > 0
    for value in module.parameters():
        assert not value.requires_grad or value.grad.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_narrows_only_the_projection_layers(make, latents, kind, dtype):
    module = make(kind, num_codes=64).eval()
    z = torch.cat([latents(module, 2, seed) for seed in range(8)]).to(dtype)
    torch.manual_seed(0)
    plain_z_q, plain = module(z)
    indices = module.encode(z)
    decoded = module.decode(indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.encode(z), indices)
        assert torch.equal(module.decode(indices), decoded)
        torch.manual_seed(0)
        z_q, info = module(z)
    assert info["loss/vq"].dtype == plain["loss/vq"].dtype
    if kind in {"vq", "ema"}:
        assert torch.equal(z_q, plain_z_q)
        assert all(torch.equal(info[name], value) for name, value in plain.items())
    elif kind == "vq_projection":
        # proj_out follows autocast, which leaves float64 alone; eval's search does not.
        assert z_q.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
        assert torch.equal(info["min_encoding_indices"], indices)
        torch.testing.assert_close(info["loss/vq"], plain["loss/vq"], rtol=0.05, atol=0)
    else:
        assert z_q.dtype == plain_z_q.dtype
        torch.testing.assert_close(z_q, module.decode(info["indices"]).to(z_q.dtype))
        torch.testing.assert_close(info["loss/vq"], plain["loss/vq"], rtol=0.05, atol=1e-4)


def test_no_search_runs_under_autocast(make, latents, kind, monkeypatch):
    # A backend that multiplies in float32 would be narrowed.
    seen = []
    prepare = search.prepare

    def spy(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return prepare(*args, **kwargs)

    monkeypatch.setattr(search, "prepare", spy)
    module = make(kind)
    z = latents(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module.encode(z)
        module.train()(z)
        freeze(module, device="cpu")
    assert seen == [False] * (2 if kind == "gumbel" else 3)


def test_training_under_autocast_follows_the_narrowed_projection(make, latents):
    module = make("vq_projection").train()
    z = latents(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_q, info = module(z)
        z_q.float().sum().backward()
        info["loss/vq"].item()
        rows = module.proj_in(z.movedim(1, -1).reshape(-1, module.input_dim))
    assert rows.dtype == torch.bfloat16
    distances = ((rows.double()[:, None] - module.embedding.weight.double()[None]) ** 2).sum(-1)
    assert torch.equal(info["min_encoding_indices"], distances.argmin(1))
    assert module.proj_in.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_half_ema_sums_accumulate_in_float32(make, dtype):
    # 3072 tokens of 1.0 sum to 3072 in float32; in float16 the sum stops at 2048, in bfloat16 at 256.
    module = make("ema", num_codes=2, code_dim=1, decay=0.0, eps=0.0).to(dtype)
    module.load_state_dict({**module.state_dict(), "embedding.weight": torch.tensor([[1.0], [-1.0]])})
    z = torch.cat([torch.ones(3072, 1), -torch.ones(1024, 1)]).to(dtype)
    module.train()(z)
    assert module.embedding.cluster_size.float().tolist() == [3072, 1024]
    assert module.embedding.embed_avg.float().flatten().tolist() == [3072, -1024]
    assert module.embedding.weight.dtype == dtype
    torch.testing.assert_close(module.embedding.weight.float(), torch.tensor([[1.0], [-1.0]]))


def test_half_latents_sum_in_float32_into_float32_averages(make):
    module = make("ema", num_codes=1, code_dim=1, decay=0.0, eps=0.0)
    module.train()(torch.full((5000, 1), 1.0 + 2**-7, dtype=torch.bfloat16))
    assert module.embedding.embed_avg.item() == 5000 * (1 + 2**-7)


def test_double_latents_are_searched_in_double(make):
    module = make("vq", num_codes=2, code_dim=1)
    with torch.no_grad():
        module.embedding.weight.copy_(torch.tensor([[1.0], [3.0]]))
    z = torch.tensor([[2.0 - 2**-40], [2.0 + 2**-40], [2.0]], dtype=torch.float64)
    assert module.encode(z).tolist() == [0, 1, 0]
    assert module(z)[1]["min_encoding_indices"].tolist() == [0, 1, 0]


def test_the_default_dtype_does_not_matter(make, latents, kind):
    module = make(kind).eval()
    z = latents(module)
    torch.manual_seed(0)
    z_q, info = module(z)
    indices, decoded = module.encode(z), module.decode(module.encode(z))
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        other_z_q, other = module(z)
        assert torch.equal(other_z_q, z_q)
        assert all(torch.equal(other[name], value) and other[name].dtype == value.dtype for name, value in info.items())
        assert torch.equal(module.encode(z), indices)
        assert torch.equal(module.decode(indices), decoded)
    finally:
        torch.set_default_dtype(torch.float32)
