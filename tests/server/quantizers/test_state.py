"""State dicts, copies, and that a module never answers from what its weight was before."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from vqserve_server.quantizers import AbstractQuantizer, VectorQuantizer, freeze, legacy_weight_norm_names

KEYS = {
    "vq": {"embedding.weight": (16, 4)},
    "ema": {"embedding.weight": (16, 4), "embedding.cluster_size": (16,), "embedding.embed_avg": (16, 4)},
    "gumbel": {"proj.weight": (16, 6, 1, 1), "proj.bias": (16,), "embed.weight": (16, 4)},
    "vq_projection": {
        "embedding.weight": (16, 4),
        "proj_in.weight": (4, 6),
        "proj_in.bias": (4,),
        "proj_out.weight": (5, 4),
        "proj_out.bias": (5,),
    },
}
ATTRIBUTES = {
    "vq": ["n_e", "e_dim", "beta", "sane_index_shape", "log_perplexity", "embedding"],
    "ema": ["num_tokens", "codebook_dim", "beta", "embedding"],
    "gumbel": ["n_embed", "embedding_dim", "straight_through", "kl_weight", "temperature", "proj", "embed"],
    "vq_projection": [
        *("n_e", "e_dim", "beta", "sane_index_shape", "log_perplexity", "embedding"),
        *("proj_in", "proj_out", "output_dim"),
    ],
}
WEIGHT_NORM_KEYS = ["embedding.parametrizations.weight.original0", "embedding.parametrizations.weight.original1"]


def test_state_dict_names_order_and_shapes(make, kind):
    state = make(kind).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == KEYS[kind]
    assert list(state) == list(KEYS[kind])
    assert list(make(kind, remap=[1, 2]).state_dict()) == ["used", *KEYS[kind]]


def test_attributes_keep_the_original_s_names(make, kind):
    module = make(kind)
    for name in [*ATTRIBUTES[kind], "used", "remap", "re_embed", "unknown_index", "loss_key"]:
        assert hasattr(module, name)
    assert isinstance(module, AbstractQuantizer)
    assert module.kind == kind
    assert "my loss" in make(kind, loss_key="my loss")(torch.randn(3, module.input_dim))[1]


def test_the_dimensions_of_rows(make, kind):
    module = make(kind)
    assert (module.num_codes, module.code_dim) == (16, 4)
    assert module.input_dim == (6 if kind in {"gumbel", "vq_projection"} else 4)
    assert module.output_dim == (5 if kind == "vq_projection" else 4)
    assert module.weight_dtype == torch.float32


def test_trainable_parameters_are_all_parameters_in_order(make, kind):
    module = make(kind)
    names = {id(value): name for name, value in module.named_parameters()}
    iterator = module.get_trainable_parameters()
    assert iter(iterator) is iterator
    assert [names[id(value)] for value in iterator] == list(KEYS[kind])
    if kind == "ema":
        assert not any(value.requires_grad for value in module.parameters())


def test_initial_values(make):
    torch.manual_seed(0)
    weight = VectorQuantizer(100, 50).embedding.weight
    assert weight.abs().max() <= 0.01
    assert weight.min() < -0.0099
    assert weight.max() > 0.0099
    ema = make("ema", num_codes=200, code_dim=50).embedding
    assert abs(float(ema.weight.std()) - 1) < 0.05
    assert torch.equal(ema.embed_avg, ema.weight)
    assert ema.embed_avg.data_ptr() != ema.weight.data_ptr()
    assert torch.equal(ema.cluster_size, torch.zeros(200))
    norm = make("vq", num_codes=200, code_dim=50, embedding_weight_norm=True).embedding
    assert abs(float(norm.v.detach().std()) - 1) < 0.05
    torch.testing.assert_close(norm.g, norm.v.norm(dim=0, keepdim=True))


@pytest.mark.parametrize("arguments", [{"num_codes": 0}, {"code_dim": 0}, {"num_codes": -1}, {"num_codes": True}])
def test_impossible_sizes_are_rejected(make, kind, arguments):
    with pytest.raises(ValueError, match="must be a positive integer"):
        make(kind, **arguments)


def test_sizes_may_be_numpy_integers(make, kind):
    module = make(kind, num_codes=np.int64(16), code_dim=np.int32(4))
    assert module.decode(torch.tensor([3])).shape == (1, module.output_dim)
    assert all(type(value) is int for value in (module.num_codes, module.code_dim, module.output_dim))


def test_deepcopy_pickle_and_torch_save(make, kind, latents):
    for arguments in ({}, {"remap": [3, 1, 15], "unknown_index": "extra"}):
        module = make(kind, **arguments).eval()
        z = latents(module)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        copies = [
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),  # noqa: S301
            torch.load(file, weights_only=False),
        ]
        for other in copies:
            assert torch.equal(other.encode(z), module.encode(z))
            assert torch.equal(other.decode(other.encode(z)), module.decode(module.encode(z)))
            assert list(other.state_dict()) == list(module.state_dict())
            next(other.parameters()).data.zero_()
        assert next(module.parameters()).abs().sum() > 0


def test_weight_norm_modules_can_be_pickled(make, latents):
    # An error with torch's own parametrization.
    module = make("vq", embedding_weight_norm=True)
    z = latents(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        assert torch.equal(other.encode(z), module.encode(z))
        assert list(other.state_dict()) == WEIGHT_NORM_KEYS


def _fresh(make, module, **arguments):
    other = make(module.kind, seed=5, **arguments).to(next(module.parameters()).dtype)
    other.load_state_dict(module.state_dict())
    return other


def _load(module):
    module.load_state_dict({name: torch.randn_like(value) for name, value in module.state_dict().items()})


def _assign(module):
    module.load_state_dict({name: torch.randn_like(value) for name, value in module.state_dict().items()}, assign=True)


def _data(module):
    for value in module.parameters():
        value.data.copy_(torch.randn_like(value))


def _in_place(module):
    with torch.no_grad():
        for value in module.parameters():
            value.mul_(-1).add_(torch.randn_like(value))


def _inference_mode(module):
    with torch.inference_mode():
        for value in module.parameters():
            value.copy_(torch.randn_like(value))


def _double(module):
    module.double()


def _half(module):
    module.half()


def _replace(module):
    for owner in list(module.modules()):
        for name, value in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(torch.randn_like(value)))


def _optimizer_step(module):
    for value in module.parameters():
        value.requires_grad_()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for value in module.parameters():
        value.grad = torch.randn_like(value)
    optimizer.step()


def _train(module):
    module.train()
    z = torch.randn(40, module.input_dim)
    for _ in range(3):
        module(z)
    module.eval()


CHANGES = [_load, _assign, _data, _in_place, _inference_mode, _double, _half, _replace, _optimizer_step, _train]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("arguments", [{}, {"remap": [3, 1, 15, 8], "unknown_index": 77}])
def test_encode_after_any_change_is_encode_of_a_fresh_module(make, kind, latents, change, arguments):
    module = make(kind, **arguments).eval()
    if "remap" in arguments and change in {_load, _assign}:
        change = _data
    z = torch.cat([latents(module, 2, seed) for seed in range(8)])
    before = module.encode(z)
    module(z)
    change(module)
    fresh = _fresh(make, module, **arguments).eval()
    after = module.encode(z)
    assert torch.equal(after, fresh.encode(z))
    indices = torch.arange(module.decodable)
    assert torch.equal(module.decode(indices), fresh.decode(indices))
    assert torch.equal(module.get_codebook_entry(indices), fresh.get_codebook_entry(indices))
    moves = change not in {_double, _half} and (change is not _train or kind == "ema")
    assert torch.equal(after, before) != moves


@pytest.mark.parametrize("change", CHANGES)
def test_weight_norm_is_never_that_of_an_earlier_call(make, latents, change):
    # The original searches with the weight of its previous call.
    module = make("vq", embedding_weight_norm=True).eval()
    z = torch.cat([latents(module, 2, seed) for seed in range(8)])
    before = module.encode(z)
    module(z)
    change(module)
    fresh = _fresh(make, module, embedding_weight_norm=True).eval()
    assert torch.equal(module.encode(z), fresh.encode(z))
    assert torch.equal(module(z)[1]["min_encoding_indices"], module.encode(z))
    assert torch.equal(module.encode(z), before) != (change not in {_double, _half, _train})


def test_training_of_weight_norm_is_not_one_step_behind(make, latents, nearest):
    module = make("vq", embedding_weight_norm=True).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=30.0)
    z = torch.cat([latents(module, 2, seed) for seed in range(8)])
    seen = []
    for _ in range(4):
        expected = nearest(z, module.embedding.weight)
        _, info = module(z)
        assert torch.equal(info["min_encoding_indices"], expected)
        seen.append(expected)
        optimizer.zero_grad()
        info["loss/vq"].backward()
        optimizer.step()
    assert len({tuple(indices.tolist()) for indices in seen}) > 1


def test_weight_norm_has_torch_s_names_and_values(make):
    module = make("vq", embedding_weight_norm=True)
    assert list(module.state_dict()) == WEIGHT_NORM_KEYS
    torch.manual_seed(0)
    reference = nn.utils.parametrizations.weight_norm(nn.Embedding(16, 4), dim=1)
    assert [f"embedding.{name}" for name in reference.state_dict()] == WEIGHT_NORM_KEYS
    reference.load_state_dict({name.removeprefix("embedding."): v for name, v in module.state_dict().items()})
    torch.testing.assert_close(module.embedding.weight, reference.weight)
    ids = torch.tensor([1, 5])
    torch.testing.assert_close(module.embedding(ids), reference(ids))


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("kind", ["vq", "vq_projection"])
def test_weight_norm_loads_legacy_names_under_any_prefix(make, latents, kind, depth):
    source = make(kind, embedding_weight_norm=True)
    target = make(kind, embedding_weight_norm=True, seed=8)
    z = latents(source)
    expected = source.encode(z)
    assert not torch.equal(target.encode(z), expected)
    inner = target
    for _ in range(depth):
        source, target = nn.ModuleDict({"quantize": source}), nn.ModuleDict({"quantize": target})
    legacy = legacy_weight_norm_names(source.state_dict())
    prefix = "quantize." * depth
    assert {f"{prefix}embedding.weight_g", f"{prefix}embedding.weight_v"} <= set(legacy)
    assert not any("parametrizations" in name for name in legacy)
    before = dict(legacy)
    target.load_state_dict(legacy, strict=True)
    assert list(legacy) == list(before)
    assert torch.equal(inner.encode(z), expected)
    # What torch's old implementation writes is the same.
    if depth == 0 and kind == "vq":
        old = nn.Module()
        with pytest.warns(FutureWarning):
            old.embedding = nn.utils.weight_norm(nn.Embedding(16, 4), dim=1)
        assert {n: v.shape for n, v in old.state_dict().items()} == {n: v.shape for n, v in legacy.items()}


def test_half_a_legacy_pair_is_an_error(make):
    module = make("vq", embedding_weight_norm=True)
    state = legacy_weight_norm_names(module.state_dict())
    del state["embedding.weight_g"]
    with pytest.raises(RuntimeError, match="weight_v"):
        module.load_state_dict(state)


def test_the_legacy_helper_leaves_other_names_alone():
    state = {"decoder.conv.parametrizations.weight.original0": 0, "embedding.weight": 1, "my_embedding.bias": 2}
    assert legacy_weight_norm_names(state) == state


def test_weight_norm_is_exact_in_encode_and_decode(make):
    module = make("vq", num_codes=40, code_dim=3, embedding_weight_norm=True)
    g, v = module.embedding.g.detach().double(), module.embedding.v.detach().double()
    # Float64's own error is far below a float32's: all but ties between two float32 numbers round as they should.
    expected = (g * v / v.norm(dim=0, keepdim=True)).float()
    assert torch.equal(module.decode(torch.arange(40)), expected)
    assert torch.equal(module.get_codebook_entry(torch.arange(40)), expected)
    assert torch.equal(freeze(module, device="cpu").decode_rows(torch.arange(40)), expected)
    assert torch.equal(module.encode(expected), torch.arange(40))


def test_weight_norm_reset(make):
    module = make("vq", embedding_weight_norm=True)
    before = module.embedding.v.clone()
    module.embedding.reset_parameters()
    assert not torch.equal(module.embedding.v, before)
    torch.testing.assert_close(module.embedding.g, module.embedding.v.norm(dim=0, keepdim=True))
    assert isinstance(module.embedding, nn.Embedding)


@pytest.mark.parametrize("arguments", [{}, {"remap": [3, 1, 15]}])
def test_a_module_without_memory_loads_by_assignment(make, latents, kind, arguments):
    source = make(kind, **arguments)
    with torch.device("meta"):
        module = make(kind)
    module.load_state_dict(source.state_dict(), strict=True, assign=True)
    z = latents(source)
    assert torch.equal(module.encode(z), source.encode(z))


def test_deterministic_algorithms_are_enough(make, latents, kind):
    module = make(kind, remap=[3, 1, 15]).train()
    torch.use_deterministic_algorithms(True)
    try:
        z = latents(module).requires_grad_()
        z_q, info = module(z)
        (z_q.sum() + info["loss/vq"]).backward()
        module.decode(module.encode(z))
    finally:
        torch.use_deterministic_algorithms(False)
