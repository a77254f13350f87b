"""VectorQuantizerWithInputProjection: what is searched, and what decode gives."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from vqserve_server.errors import NonFiniteLatents
from vqserve_server.quantizers import VectorQuantizerWithInputProjection, freeze


def _rounded_once(rows, weight, bias):
    """rows @ weight.T + bias by rationals, each element rounded once to float32."""
    out = torch.empty(rows.shape[0], weight.shape[0])
    for n, row in enumerate(rows.tolist()):
        for d, (column, offset) in enumerate(zip(weight.tolist(), bias.tolist(), strict=True)):
            exact = sum((Fraction(a) * Fraction(b) for a, b in zip(row, column, strict=True)), Fraction(offset))
            nearest = torch.tensor(float(exact)).float()
            # float() rounds to float64 first: look whether a neighbour is nearer to the rational.
            inf = torch.tensor(float("inf"))
            candidates = [nearest, torch.nextafter(nearest, inf), torch.nextafter(nearest, -inf)]
            out[n, d] = min(candidates, key=lambda value: abs(Fraction(float(value)) - exact))
    return out


def test_encode_searches_the_projection_rounded_once(make, latents, nearest):
    module = make("vq_projection", num_codes=200)
    z = torch.cat([latents(module, 2, seed) for seed in range(10)])
    projected = _rounded_once(z, module.proj_in.weight, module.proj_in.bias)
    assert torch.equal(module.encode(z), nearest(projected, module.embedding.weight))
    assert torch.equal(module.eval()(z)[1]["min_encoding_indices"], module.encode(z))


def test_a_projection_that_cancels_is_exact(make):
    # In float32 the layer gives 0 for both channels: only the exact value separates the codes.
    module = VectorQuantizerWithInputProjection(3, 2, 1)
    with torch.no_grad():
        module.proj_in.weight.copy_(torch.tensor([[1.0, 1.0, 1.0]]))
        module.proj_in.bias.zero_()
        module.embedding.weight.copy_(torch.tensor([[0.0], [1.0]]))
    z = torch.tensor([[2.0**30, 1.0, -(2.0**30)], [2.0**30, 0.25, -(2.0**30)]])
    assert module.encode(z).tolist() == [1, 0]
    assert module.eval()(z)[1]["min_encoding_indices"].tolist() == [1, 0]


def test_training_searches_the_layer_s_own_projection(make, latents, nearest):
    module = make("vq_projection").train()
    z = latents(module, 2)
    seen = []
    module.proj_in.register_forward_hook(lambda _module, _args, out: seen.append(out.detach().clone()))
    _, info = module(z)
    assert torch.equal(info["min_encoding_indices"], nearest(seen[0], module.embedding.weight))
    # A hook that changes the projection changes what is searched: nothing else is.
    module.proj_in.register_forward_hook(lambda _module, _args, _out: module.embedding.weight.detach()[[5] * 7])
    assert module(z)[1]["min_encoding_indices"].tolist() == [5] * 7


@pytest.mark.parametrize("output_dim", [None, 5])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_shapes_of_forward_and_decode(make, latents, rank, output_dim):
    module = make("vq_projection", output_dim=output_dim)
    z = latents(module, rank)
    z_q, _ = module(z)
    channels = 4 if output_dim is None else output_dim
    axis = 1 if rank >= 4 else rank - 1
    as_input = (*z.shape[:axis], channels, *z.shape[axis + 1 :])
    tokens = z[0, 0].numel()
    assert z_q.shape == ((2, tokens, 4) if output_dim is None and rank > 3 else as_input)
    assert z_q.is_contiguous()
    decoded = module.decode(module.encode(z))
    assert decoded.shape == as_input
    by_rows = decoded.movedim(axis, -1).reshape(-1, channels)
    forward_rows = z_q if z_q.shape != as_input else z_q.movedim(axis, -1)
    torch.testing.assert_close(by_rows, forward_rows.reshape(-1, channels))


def test_without_an_output_dim_proj_out_is_an_identity_without_keys(make):
    module = make("vq_projection", output_dim=None)
    assert isinstance(module.proj_out, torch.nn.Identity)
    assert list(module.state_dict()) == ["embedding.weight", "proj_in.weight", "proj_in.bias"]
    assert module.output_dim == 4
    assert VectorQuantizerWithInputProjection(6, 16, 4).beta == 1.0


def test_decode_applies_proj_out_rounded_once(make):
    # The original's decode forgets it.
    module = make("vq_projection")
    expected = _rounded_once(module.embedding.weight, module.proj_out.weight, module.proj_out.bias)
    assert torch.equal(module.decode(torch.arange(16)), expected)
    # Fewer indices than codes take another way to the same bits, and so does the table of the frozen form.
    assert torch.equal(module.decode(torch.tensor([7, 2])), expected[[7, 2]])
    assert torch.equal(freeze(module, device="cpu").decode_rows(torch.arange(16)), expected)
    assert torch.equal(module.get_codebook_entry(torch.tensor([7])), module.embedding.weight[[7]])


def test_keyword_arguments_reach_the_vector_quantizer(make, latents):
    module = make(
        "vq_projection",
        remap=[3, 1],
        unknown_index="extra",
        sane_index_shape=True,
        log_perplexity=True,
        embedding_weight_norm=True,
        loss_key="mine",
    )
    z = latents(module)
    _, info = module.eval()(z)
    assert set(info) == {"mine", "min_encoding_indices", "perplexity", "cluster_usage"}
    assert torch.equal(info["min_encoding_indices"], module.encode(z))
    with pytest.raises(TypeError):
        make("vq_projection", no_such_argument=1)


@pytest.mark.parametrize("arguments", [{"input_dim": 0}, {"output_dim": 0}, {"output_dim": -1}])
def test_impossible_dimensions_are_rejected(arguments):
    with pytest.raises(ValueError, match="must be a positive integer"):
        VectorQuantizerWithInputProjection(**{"input_dim": 6, "n_codes": 4, "codebook_dim": 2, **arguments})


def test_a_projection_beyond_float32_names_its_token(make, latents):
    module = make("vq_projection").eval()
    z = latents(module, 4).double()
    z[1, :, 2, 3] = 1e300
    with pytest.raises(NonFiniteLatents, match=r"token \[1, 2, 3\] leaves the range of float32"):
        module.encode(z)
    # forward looks for nothing: other tokens keep theirs.
    indices = module(z)[1]["min_encoding_indices"].reshape(2, 3, 4)
    indices[1, 2, 3] = 0
    z[1, :, 2, 3] = 0
    expected = module.encode(z)
    expected[1, 2, 3] = 0
    assert torch.equal(indices, expected)
    frozen = freeze(module, device="cpu")
    with pytest.raises(NonFiniteLatents, match=r"token \[1\] leaves"):
        frozen.encode_rows(torch.tensor([[0.0] * 6, [1e300] * 6], dtype=torch.float64))
