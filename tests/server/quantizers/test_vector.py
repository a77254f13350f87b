"""VectorQuantizer: the formulas of quantizers.md, and the errors of all classes."""

from __future__ import annotations

import pytest
import torch

from vqserve_server.errors import CodebookError, NonFiniteLatents


def test_loss_and_gradients_are_the_formulas(make, latents, nearest):
    module = make("vq", beta=0.7).double()
    z = latents(module, 2).double().requires_grad_()
    cotangent = torch.randn_like(z)
    z_q, info = module(z)
    ((z_q * cotangent).sum() + info["loss/vq"]).backward()
    ids = nearest(z, module.embedding.weight)
    codes = module.embedding.weight.detach()[ids]
    difference = codes - z.detach()
    torch.testing.assert_close(info["loss/vq"], 1.7 * (difference**2).mean())
    torch.testing.assert_close(z_q, codes)
    torch.testing.assert_close(z.grad, cotangent - 0.7 * 2 * difference / z.numel())
    expected = torch.zeros_like(module.embedding.weight).index_add_(0, ids, 2 * difference / z.numel())
    torch.testing.assert_close(module.embedding.weight.grad, expected)


def test_z_q_is_z_plus_the_difference(make, latents):
    # Bit for bit: training scripts compare losses across implementations.
    module = make("vq")
    z = latents(module, 2)
    codes = module.embedding.weight.detach()[module.encode(z)]
    assert torch.equal(module(z)[0], z + (codes - z))


def test_decode_is_bit_for_bit_the_weight_that_was_searched(make, kind, latents):
    module = make(kind)
    indices = torch.arange(16)
    if kind == "vq_projection":
        assert torch.equal(module.get_codebook_entry(indices), module.embedding.weight)
    else:
        weight = module.embed.weight if kind == "gumbel" else module.embedding.weight
        assert torch.equal(module.decode(indices), weight)
    assert not module.decode(indices).requires_grad
    assert not module.encode(latents(module).requires_grad_()).requires_grad


def test_decode_does_not_share_memory_with_the_codebook(make, kind):
    module = make(kind)
    before = module.code_rows().clone()
    module.decode(torch.arange(16)).zero_()
    assert torch.equal(module.code_rows(), before)


def test_equal_codes_go_to_the_lowest_id(make):
    for kind, arguments in (("vq", {}), ("ema", {})):
        module = make(kind, **arguments)
        weight = module.embedding.weight.data
        weight[7], weight[9] = weight[2], weight[2]
        assert module.encode(weight).tolist() == [2 if i in (7, 9) else i for i in range(16)]
        # Ties are settled on full ids, before the remap: 2 is not in use although its equals are.
        remapped = make(kind, remap=[9, 7], unknown_index=-1)
        remapped.load_state_dict({**remapped.state_dict(), **module.state_dict()})
        assert remapped.encode(weight[[7, 9]]).tolist() == [-1, -1]


def test_an_exact_tie_goes_to_the_lowest_id(make):
    module = make("vq", num_codes=3, code_dim=2)
    module.embedding.weight.data = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert module.encode(torch.tensor([[0.5, 0.5], [2.0, 0.0]])).tolist() == [1, 0]


def test_perplexity_is_reported_only_when_asked_for(make, latents):
    assert set(make("vq")(torch.randn(5, 4))[1]) == {"loss/vq", "min_encoding_indices"}
    module = make("vq", log_perplexity=True, remap=[1, 2], unknown_index="extra")
    z = latents(module)
    _, info = module(z)
    assert set(info) == {"loss/vq", "min_encoding_indices", "perplexity", "cluster_usage"}
    ids = make("vq").encode(z)
    # On full ids, whatever is reported.
    assert int(info["cluster_usage"]) == ids.unique().numel() > 3
    p = torch.bincount(ids.flatten(), minlength=16) / ids.numel()
    torch.testing.assert_close(info["perplexity"], torch.exp(-(p * torch.log(p + 1e-10)).sum()))
    assert not info["perplexity"].requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_encode_rejects_non_finite_latents_and_names_the_position(make, latents, kind, value, dtype):
    module = make(kind)
    for rank, position in {2: (3, 1), 3: (1, 4, 2), 4: (1, 3, 2, 0), 5: (0, 2, 1, 2, 1)}.items():
        z = latents(module, rank).to(dtype)
        z[position] = value
        with pytest.raises(NonFiniteLatents, match=rf"latents\[{', '.join(map(str, position))}\] is {value}"):
            module.encode(z)


def test_forward_does_not_look_for_nan_and_keeps_other_tokens(make, latents, kind):
    for training in (True, False):
        module = make(kind, **({"sane_index_shape": True} if "vq" in kind else {})).train(training)
        z = latents(module, 2)
        torch.manual_seed(0)
        clean, clean_info = module(z)
        module = make(kind, **({"sane_index_shape": True} if "vq" in kind else {})).train(training)
        for value in (float("nan"), float("inf")):
            broken = z.clone()
            broken[2, 1] = value
            torch.manual_seed(0)
            z_q, info = module(broken)
            others = torch.arange(7) != 2
            torch.testing.assert_close(z_q[others], clean[others])
            for name in ("min_encoding_indices", "encoding_indices", "indices"):
                if name in info:
                    assert torch.equal(info[name][others], clean_info[name][others])
                    assert 0 <= int(info[name][2]) < 16


def test_batch_is_singles(make, latents, kind):
    module = make(kind, num_codes=50)
    z = torch.cat([latents(module, 2, seed) for seed in range(5)])
    together = module.encode(z)
    assert torch.equal(together, torch.cat([module.encode(row[None]) for row in z]))
    rows = module.decode(together)
    assert torch.equal(rows, torch.cat([module.decode(index[None]) for index in together]))


def _parameters_of_search(module):
    if module.kind == "gumbel":
        return [module.proj.weight, module.proj.bias]
    if module.kind == "vq_projection":
        return [module.embedding.weight, module.proj_in.weight, module.proj_in.bias]
    return [module.embedding.weight]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_codebook_encodes_nothing_but_trains_on(make, latents, kind, value):
    for number in range(len(_parameters_of_search(make(kind)))):
        for training in (True, False):
            module = make(kind).train(training)
            z = latents(module)
            _parameters_of_search(module)[number].data.view(-1)[3] = value
            with pytest.raises(CodebookError, match="NaN or infinity"):
                module.encode(z)
            # Training sees it in the loss, if at all, and not as a crash of the search.
            _, info = module(z)
            assert info["loss/vq"].shape == ()


def test_codes_that_are_not_finite_never_win_in_training(make, latents, nearest):
    module = make("vq")
    z = latents(module, 2)
    module.embedding.weight.data[[0, 5]] = float("nan")
    kept = torch.tensor([i for i in range(16) if i not in (0, 5)])
    expected = kept[nearest(z, module.embedding.weight[kept])]
    assert torch.equal(module(z)[1]["min_encoding_indices"], expected)
    module.embedding.weight.data[:] = float("nan")
    assert module(z)[1]["min_encoding_indices"].tolist() == [0] * 7


@pytest.mark.parametrize("part", ["g", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_weight_norm_encodes_nothing_but_trains_on(make, latents, part, value):
    module = make("vq", embedding_weight_norm=True)
    getattr(module.embedding, part).data[0, 1] = value
    z = latents(module)
    module(z)
    with pytest.raises(CodebookError, match="NaN or infinity"):
        module.encode(z)


def test_a_column_of_zeros_has_no_norm(make, latents):
    module = make("vq", embedding_weight_norm=True)
    module.embedding.v.data[:, 2] = 0
    with pytest.raises(CodebookError, match="code 0"):
        module.encode(latents(module))
