"""Residual quantizers whose stages differ in their number of codes: arrangements of trained models, and the checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vqserve_server.errors import IndexOutOfRange
from vqserve_server.quantizers import CosineQuantizer, ResidualQuantizer, freeze


def drawn(quantizer, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.normal_(generator=generator)
    return quantizer.eval()


def rows_of(count: int, channels: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


def test_the_sizes_in_every_form():
    quantizer = ResidualQuantizer(3, [12, 5, 7], 2)
    assert [book.num_codes for book in quantizer.codebooks()] == [12, 5, 7]
    assert (quantizer.n_e, quantizer.num_codes, quantizer.vocab_size) == ([12, 5, 7], 12, 12)
    frozen = freeze(quantizer, device="cpu")
    assert quantizer.stage_vocab_sizes == frozen.stage_vocab_sizes == (12, 5, 7)
    assert frozen.vocab_size == frozen.decodable == 12
    for equal in (7, [7, 7, 7], (7, np.int64(7), 7)):
        same = ResidualQuantizer(3, equal, 2)
        assert (same.n_e, type(same.n_e), same.num_codes, same.stage_vocab_sizes) == (7, int, 7, ())
    assert ResidualQuantizer(1, [7], 2).n_e == 7


def test_the_sizes_are_in_the_order_of_a_token_s_indices():
    quantizer = ResidualQuantizer(6, [1, 2, 3, 4, 5, 6], 2, groups=2)
    assert [[book.num_codes for book in part.codebooks()] for part in quantizer.chains()] == [[1, 3, 5], [2, 4, 6]]
    assert [book.num_codes for book in quantizer.codebooks()] == [1, 2, 3, 4, 5, 6]
    quantizer = ResidualQuantizer(3, [9, 4, 5], 2, first_quantizers=1)
    assert [[book.num_codes for book in part.codebooks()] for part in quantizer.chains()] == [[9], [4, 5]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint32, torch.uint64])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_an_index_is_checked_against_its_own_stage(dtype, layout):
    # The first stage has more codes than uint8 holds.
    quantizer = drawn(ResidualQuantizer(3, [300, 5, 7], 2))
    quantizer.layout = layout
    last = torch.tensor([[[299, 4, 6], [0, 0, 0]], [[7, 4, 0], [1, 2, 3]]]).clamp(
        max=255 if dtype.itemsize == 1 else 299
    )

    def laid(indices):
        return (indices if layout == "channels_last" else indices.movedim(-1, 1)).to(dtype)

    decoded = quantizer.decode(laid(last))
    for count in (1, 2):
        assert torch.isfinite(quantizer.decode(laid(last[..., :count]), count)).all()
    assert torch.isfinite(decoded).all()
    for stage, bound in enumerate((300, 5, 7)):
        if bound == 300 and dtype.itemsize == 1:
            continue
        wrong = last.clone()
        wrong[1, 0, stage] = bound
        position = [1, 0, stage] if layout == "channels_last" else [1, stage, 0]
        match = rf"indices\{position} is {bound}, not in \[0, {bound}\), the vocabulary of stage {stage}"
        with pytest.raises(IndexOutOfRange, match=match) as caught:
            quantizer.decode(laid(wrong))
        assert caught.value.position == tuple(position)


def test_the_first_offender_in_the_array_s_order_is_named():
    quantizer = drawn(ResidualQuantizer(3, [9, 5, 7], 2))
    with pytest.raises(IndexOutOfRange, match=r"indices\[0, 2\] is 8, not in \[0, 7\), the vocabulary of stage 2"):
        quantizer.decode(torch.tensor([[8, 4, 8], [8, 5, 7]]))
    with pytest.raises(IndexOutOfRange, match=r"indices\[1, 1\] is -1, not in \[0, 5\), the vocabulary of stage 1"):
        quantizer.decode(torch.tensor([[8, 4, 6], [8, -1, -1]]))


def test_product_quantization_is_a_cosine_quantizer_for_each_slice_of_channels():
    """UniTok: 8 groups of 8 channels, each with 4096 normalised codes; here one group has fewer."""
    sizes = [4096] * 5 + [1000, 4096, 17]
    product = drawn(ResidualQuantizer(8, sizes, 8, 64, "cosine", decode_normalized=True, groups=8))
    rows = rows_of(200, 64)
    found, decoded = product.encode(rows), []
    for group, stage in enumerate(product.codebooks()):
        single = CosineQuantizer(sizes[group], 8, decode_normalized=True)
        single.embedding.weight.data.copy_(stage.embedding.weight)
        channels = rows[:, 8 * group : 8 * group + 8]
        assert torch.equal(single.encode(channels), found[:, group])
        decoded.append(single.decode(found[:, group]))
    assert torch.equal(product.decode(found), torch.cat(decoded, dim=1))
    assert torch.equal(product.decode(found[:, :3], 3), torch.cat([*decoded[:3], torch.zeros(200, 40)], dim=1))


def test_fish_speech_s_arrangement_at_its_size():
    """One chain: a semantic stage of 4096 codes, then nine of 1024, each with DAC's projections and cosine search."""
    quantizer = drawn(ResidualQuantizer(10, [4096] + [1024] * 9, 8, 1024, "cosine", stage_projections=True))
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.mul_(0.03)
    z = rows_of(6, 1024)
    found = quantizer.encode(z[None].movedim(-1, 1))
    assert found.shape == (1, 10, 6)
    residual, total = z.double().numpy(), np.zeros((6, 1024))
    for place, stage in enumerate(quantizer.codebooks()):
        state = {name: value.double().numpy() for name, value in stage.state_dict().items()}
        inner = residual @ state["proj_in.weight"].T + state["proj_in.bias"]
        codes = state["embedding.weight"]
        scores = inner @ (codes / np.linalg.norm(codes, axis=1, keepdims=True)).T
        assert found[0, place].tolist() == scores.argmax(axis=1).tolist()
        q = codes[scores.argmax(axis=1)] @ state["proj_out.weight"].T + state["proj_out.bias"]
        residual, total = residual - q, total + q
    decoded = quantizer.decode(found)[0].T.double().numpy()
    np.testing.assert_allclose(decoded, total, atol=1e-6)
