"""Random shapes, codebooks and remaps against a brute force in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqserve_server.quantizers import EMAVectorQuantizer, GumbelQuantizer, VectorQuantizer, freeze
from vqserve_server.quantizers.tensors import to_rows

FAST = settings(max_examples=40, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)


def _splitmix64(value):
    mask = 2**64 - 1
    x = (value + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@st.composite
def grids(draw, max_tokens=40):
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    while torch.Size(shape).numel() > max_tokens:
        shape[shape.index(max(shape))] -= 1
    return tuple(shape)


@st.composite
def codebooks(draw):
    """Codes and a latents' generator: of small integers, so that exact ties and equal codes are common, or normal."""
    num_codes, dim = draw(st.integers(1, 30)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    is_integer = draw(st.booleans())

    def numbers(*shape):
        if is_integer:
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    return numbers(num_codes, dim), numbers


def _latents(numbers, grid, channels):
    return numbers(*grid, channels) if len(grid) < 3 else numbers(grid[0], channels, *grid[1:])


def _remapped(ids, used, unknown_index):
    stand_in = {"random": lambda i: _splitmix64(i) % len(used), "extra": lambda _: len(used)}.get(
        unknown_index, lambda _: unknown_index
    )
    return [used.index(i) if i in used else stand_in(i) for i in ids]


@pytest.mark.parametrize("kind", ["vq", "ema"])
@given(codebook=codebooks(), grid=grids(), data=st.data())
@FAST
def test_encode_and_decode_are_the_brute_force(nearest, kind, codebook, grid, data):
    codes, numbers = codebook
    num_codes, dim = codes.shape
    remap = data.draw(st.none() | st.lists(st.integers(0, num_codes - 1), min_size=1, max_size=12))
    unknown_index = data.draw(st.sampled_from(["random", "extra", 0, -3, 1000]))
    arguments = {"remap": remap, "unknown_index": unknown_index}
    if kind == "vq":
        module = VectorQuantizer(num_codes, dim, **arguments)
    else:
        module = EMAVectorQuantizer(num_codes, dim, 0.25, **arguments)
    module.embedding.weight.data = codes
    z = _latents(numbers, grid, dim)

    ids = nearest(to_rows(z), codes).tolist() if z.numel() else []
    expected = ids if remap is None else _remapped(ids, remap, unknown_index)
    indices = module.encode(z)
    assert indices.shape == grid
    assert indices.flatten().tolist() == expected
    assert freeze(module, device="cpu").encode_rows(to_rows(z)).tolist() == expected

    decodable = num_codes if remap is None else len(remap) + (unknown_index == "extra")
    assert module.decodable == decodable
    positions = torch.randint(0, decodable, grid)
    full = positions.flatten().tolist()
    if remap is not None:
        full = [remap[i] if i < len(remap) else remap[0] for i in full]
    assert torch.equal(to_rows(module.decode(positions)), codes[full])


@given(codebook=codebooks(), grid=grids(), data=st.data())
@FAST
def test_gumbel_encode_is_the_greatest_score(codebook, grid, data):
    weight, numbers = codebook
    num_codes, dim = weight.shape
    remap = data.draw(st.none() | st.lists(st.integers(0, num_codes - 1), min_size=1, max_size=12))
    module = GumbelQuantizer(dim, 3, num_codes, remap=remap)
    module.proj.weight.data = weight[:, :, None, None]
    module.proj.bias.data = bias = numbers(num_codes)
    z = _latents(numbers, grid, dim)
    scores = to_rows(z).double() @ weight.double().T + bias.double()
    if remap is not None:
        scores = scores[:, remap]
    expected = torch.from_numpy(scores.numpy().argmax(axis=1)).reshape(grid)
    assert torch.equal(module.encode(z), expected)
    assert torch.equal(freeze(module, device="cpu").encode_rows(to_rows(z)), expected.flatten())


@pytest.mark.parametrize("kind", ["vq", "ema"])
@given(codebook=codebooks())
@FAST
def test_decode_then_encode_is_the_identity_up_to_equal_codes(kind, codebook):
    codes, _ = codebook
    num_codes, dim = codes.shape
    module = VectorQuantizer(num_codes, dim) if kind == "vq" else EMAVectorQuantizer(num_codes, dim, 0.25)
    module.embedding.weight.data = codes
    indices = torch.arange(num_codes)
    found = module.encode(module.decode(indices))
    lowest = (codes[:, None] == codes[None]).all(-1).int().argmax(dim=1)
    assert torch.equal(found, lowest)
    assert torch.equal(module.decode(found), codes)


@given(codebook=codebooks(), seed=SEEDS)
@FAST
def test_any_layout_and_any_batch_give_the_same_tokens(codebook, seed):
    codes, numbers = codebook
    module = VectorQuantizer(*codes.shape)
    module.embedding.weight.data = codes
    rows = numbers(24, codes.shape[1])
    expected = module.encode(rows)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(module.encode(rows[order]), expected[order])
    assert torch.equal(module.encode(rows.reshape(4, 6, -1)).flatten(), expected)
    assert torch.equal(module.encode(rows.reshape(2, 3, 4, -1).permute(0, 3, 1, 2)).flatten(), expected)
    assert torch.equal(module.encode(rows.reshape(2, 2, 3, 2, -1).permute(0, 4, 1, 2, 3)).flatten(), expected)
    assert torch.equal(torch.stack([module.encode(row[None])[0] for row in rows]), expected)


@given(
    num_codes=st.integers(1, 50),
    data=st.data(),
    shape=st.lists(st.integers(0, 4), max_size=4),
    unknown_index=st.sampled_from(["extra", 0, 7, -1]),
)
@FAST
def test_remap_laws(num_codes, data, shape, unknown_index):
    used = data.draw(st.lists(st.integers(0, num_codes - 1), min_size=1, max_size=60))
    module = VectorQuantizer(num_codes, 1, remap=used, unknown_index=unknown_index)
    ids = torch.randint(0, num_codes, shape)
    positions = module.remap_to_used(ids)
    assert positions.shape == ids.shape
    assert positions.flatten().tolist() == _remapped(ids.flatten().tolist(), used, unknown_index)
    # What is in use comes back; positions of a list without repetition too.
    known = torch.isin(ids, torch.tensor(used))
    assert torch.equal(module.unmap_to_all(positions[known]), ids[known])
    everything = torch.arange(len(used))
    again = module.remap_to_used(module.unmap_to_all(everything))
    assert again.tolist() == [used.index(i) for i in used]


@given(codebook=codebooks(), grid=grids(), decay=st.floats(0.1, 0.99), eps=st.sampled_from([1e-5, 1e-2]))
@FAST
def test_an_ema_step_is_the_dense_formula(assert_close, nearest, codebook, grid, decay, eps):
    codes, numbers = codebook
    num_codes, dim = codes.shape
    z = _latents(numbers, grid, dim)
    if z.numel() == 0:
        return
    module = EMAVectorQuantizer(num_codes, dim, 0.25, decay=decay, eps=eps).train()
    module.embedding.weight.data = codes.clone()
    module.embedding.embed_avg.data = codes.clone()
    module.embedding.cluster_size.data = numbers(num_codes).abs()
    cluster_size = module.embedding.cluster_size.double()
    rows = to_rows(z).double()
    one_hot = torch.nn.functional.one_hot(nearest(rows, codes), num_codes).double()
    cluster_size = decay * cluster_size + (1 - decay) * one_hot.sum(0)
    embed_avg = decay * codes.double() + (1 - decay) * one_hot.T @ rows
    smoothed = (cluster_size + eps) / (cluster_size.sum() + num_codes * eps) * cluster_size.sum()
    module(z)
    assert_close(module.embedding.cluster_size, cluster_size)
    assert_close(module.embedding.embed_avg, embed_avg)
    assert_close(module.embedding.weight, embed_avg / smoothed[:, None])
