"""Every rank, every class: the same rows, the same tokens; anything else is an error that names it."""

from __future__ import annotations

import pytest
import torch

from vqserve.layout import Layout
from vqserve_server.errors import IndexOutOfRange, InvalidDtype, InvalidShape
from vqserve_server.quantizers.tensors import from_rows, to_rows

RANKS = (2, 3, 4, 5)


@pytest.mark.parametrize("rank", RANKS)
def test_rows_are_tokens_in_the_grid_s_order(rank):
    z = torch.arange(2 * 3 * 4 * 5 * 2).reshape({2: (80, 3), 3: (2, 40, 3), 4: (2, 3, 8, 5), 5: (2, 3, 4, 5, 2)}[rank])
    rows = to_rows(z)
    axis = 1 if rank >= 4 else rank - 1
    grid = z.shape[:axis] + z.shape[axis + 1 :]
    for n, position in enumerate(
        torch.cartesian_prod(*(torch.arange(length) for length in grid)).reshape(-1, rank - 1)
    ):
        where = position.tolist()
        where.insert(axis, slice(None))
        assert torch.equal(rows[n], z[tuple(where)])
    assert torch.equal(from_rows(rows, grid), z)
    assert from_rows(rows, grid).is_contiguous()


@pytest.mark.parametrize("rank", RANKS)
def test_all_ranks_give_the_tokens_of_their_rows(make, latents, kind, rank):
    module = make(kind)
    z = latents(module, rank)
    indices = module.encode(z)
    axis = 1 if rank >= 4 else rank - 1
    assert indices.shape == z.shape[:axis] + z.shape[axis + 1 :]
    assert indices.dtype == torch.int64
    assert torch.equal(indices.flatten(), module.encode(to_rows(z)))
    decoded = module.decode(indices)
    assert decoded.shape == (*z.shape[:axis], module.output_dim, *z.shape[axis + 1 :])
    assert decoded.is_contiguous()
    assert torch.equal(to_rows(decoded), module.decode(indices.flatten()))


@pytest.mark.parametrize("rank", RANKS)
def test_forward_of_all_ranks_is_forward_of_their_rows(make, latents, kind, rank):
    module = make(kind).eval()
    z = latents(module, rank)
    if kind == "gumbel":
        # The noise is drawn over the tensor as it lies: only what has none can be compared.
        z_q, info = module(z, return_logits=True)
        _, of_rows = module(to_rows(z), return_logits=True)
        torch.testing.assert_close(to_rows(info["logits"]), of_rows["logits"])
        assert info["indices"].shape == module.encode(z).shape
        torch.testing.assert_close(z_q, module.decode(info["indices"]))
    else:
        z_q, info = module(z)
        of_rows_z_q, of_rows = module(to_rows(z))
        torch.testing.assert_close(to_rows(z_q), of_rows_z_q)
        key = "encoding_indices" if kind == "ema" else "min_encoding_indices"
        assert torch.equal(info[key], of_rows[key])
        assert info[key].shape == (z.numel() // module.input_dim,)
        assert torch.equal(info[key], module.encode(z).flatten())
    assert z_q.is_contiguous()
    torch.testing.assert_close(info["loss/vq"], of_rows["loss/vq"])


@pytest.mark.parametrize("rank", RANKS)
def test_memory_format_does_not_matter(make, latents, kind, rank):
    module = make(kind)
    z = latents(module, rank)
    strided = z.transpose(0, -1).contiguous().transpose(0, -1)
    assert not strided.is_contiguous()
    assert torch.equal(module.encode(strided), module.encode(z))
    assert module(strided)[0].is_contiguous()


@pytest.mark.parametrize("kind", ["vq", "vq_projection"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("remap", [None, [3, 1, 7]])
def test_sane_index_shape_is_the_grid_for_every_rank_and_class(make, latents, kind, rank, remap):
    module = make(kind, sane_index_shape=True, remap=remap).eval()
    z = latents(module, rank)
    assert module(z)[1]["min_encoding_indices"].shape == module.encode(z).shape


@pytest.mark.parametrize("shape", [(), (4,), (1, 4, 1, 1, 1, 1)])
def test_other_ranks_are_rejected(make, kind, shape):
    module = make(kind)
    for verb in (module, module.encode):
        with pytest.raises(InvalidShape, match=f"not {len(shape)}"):
            verb(torch.zeros(shape))


@pytest.mark.parametrize("rank", RANKS)
def test_a_wrong_channel_count_is_rejected_and_named_with_the_right_one(make, latents, kind, rank):
    module = make(kind)
    z = latents(module, rank)
    axis = 1 if rank >= 4 else rank - 1
    wrong = torch.cat([z, z], dim=axis)
    for verb in (module, module.encode):
        with pytest.raises(
            InvalidShape, match=f"{2 * module.input_dim} channels.*the codebook takes {module.input_dim}"
        ):
            verb(wrong)


def test_a_channel_last_image_is_not_reinterpreted(make):
    # The original views the memory of any 4-D input whose size divides by D.
    module = make("vq")
    with pytest.raises(InvalidShape, match="8 channels"):
        module.encode(torch.zeros(2, 8, 8, module.e_dim))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_latents_that_are_not_floating_point_are_rejected(make, kind, dtype):
    module = make(kind)
    z = torch.zeros(3, module.input_dim, dtype=dtype)
    for verb in (module, module.encode):
        with pytest.raises(InvalidDtype, match=str(dtype).removeprefix("torch.")):
            verb(z)


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 1)])
def test_indices_of_other_ranks_are_rejected(make, kind, shape):
    with pytest.raises(InvalidShape, match="1 to 4 axes"):
        make(kind).decode(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_indices_of_any_integer_type(make, kind, dtype):
    module = make(kind)
    indices = torch.tensor([[3, 0], [15, 3]])
    assert torch.equal(module.decode(indices.to(dtype)), module.decode(indices))
    assert torch.equal(module.get_codebook_entry(indices.to(dtype)), module.get_codebook_entry(indices))
    assert module.remap_to_used(indices.to(dtype)).dtype == torch.int64
    assert module.unmap_to_all(indices.to(dtype)).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_indices_that_are_not_integers_are_rejected(make, kind, dtype):
    module = make(kind)
    for verb in (module.decode, module.get_codebook_entry, module.remap_to_used, module.unmap_to_all):
        with pytest.raises(InvalidDtype, match=str(dtype).removeprefix("torch.")):
            verb(torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("value", [-1, 16, 2**40])
@pytest.mark.parametrize("extra", [{}, {"unknown_index": "extra"}])
def test_an_index_out_of_range_is_rejected_with_position_value_and_range(make, kind, value, extra):
    # Without a remap "extra" changes nothing: nothing emits the extra id, and it cannot be decoded.
    module = make(kind, **extra)
    indices = torch.zeros(2, 3, dtype=torch.int64)
    indices[1, 2] = value
    for verb in (module.decode, module.get_codebook_entry, module.remap_to_used, module.unmap_to_all):
        with pytest.raises(IndexOutOfRange, match=rf"indices\[1, 2\] is {value}, not in \[0, 16\)"):
            verb(indices)


def test_a_uint64_index_is_named_by_its_own_value(make):
    with pytest.raises(IndexOutOfRange, match=r"indices\[0\] is 18446744073709551615,"):
        make("vq").decode(torch.tensor([2**64 - 1], dtype=torch.uint64))


def test_entries_by_shape(make, kind):
    module = make(kind)
    d = module.code_dim
    indices = torch.arange(12) % 16
    rows = module.get_codebook_entry(indices)
    assert rows.shape == (12, d)
    assert torch.equal(rows, module.code_rows()[indices])
    for shape, laid_out in {
        (12, d): rows,
        (3, 4, d): rows.reshape(3, 4, d),
        (2, 2, 3, d): rows.reshape(2, 2, 3, d).permute(0, 3, 1, 2),
        (1, 2, 2, 3, d): rows.reshape(1, 2, 2, 3, d).permute(0, 4, 1, 2, 3),
    }.items():
        assert torch.equal(module.get_codebook_entry(indices, shape), laid_out)
        assert torch.equal(module.get_codebook_entry(indices.reshape(shape[:-1]), shape), laid_out)
        assert torch.equal(module.get_codebook_entry(indices.reshape(shape[:-1])), rows.reshape(shape))
    assert module.get_codebook_entry(indices[0]).shape == (d,)


@pytest.mark.parametrize("shape", [(4,), (12, 5), (3, 3, 4), (1, 2, 3, 2, 1, 4), (-3, -4, 4), (-1, 4), ()])
def test_entries_of_a_shape_that_does_not_fit_are_rejected(make, kind, shape):
    with pytest.raises(InvalidShape, match="entries of shape"):
        make(kind).get_codebook_entry(torch.zeros(12, dtype=torch.int64), shape)


def test_entries_are_differentiable(make, kind):
    module = make(kind)
    indices = torch.tensor([[1, 1], [5, 0]])
    if kind == "ema":
        assert not module.get_codebook_entry(indices).requires_grad
        module.embedding.weight.requires_grad_()
    module.get_codebook_entry(indices, (1, 2, 2, module.code_dim)).sum().backward()
    weight = module.embed.weight if kind == "gumbel" else module.embedding.weight
    uses = torch.bincount(indices.flatten(), minlength=16).float()
    assert torch.equal(weight.grad, uses[:, None].expand_as(weight))
    assert all(value.grad is None for value in module.parameters() if value is not weight)


@pytest.mark.parametrize("rank", RANKS)
def test_empty_grids(make, kind, rank):
    module = make(kind)
    for length in range(1, rank):
        shape = [2] * rank
        axis = 1 if rank >= 4 else rank - 1
        shape[axis] = module.input_dim
        shape[length if length != axis else 0] = 0
        grid = shape[:axis] + shape[axis + 1 :]
        indices = module.encode(torch.zeros(shape))
        assert indices.shape == tuple(grid)
        assert indices.dtype == torch.int64
        shape[axis] = module.output_dim
        assert module.decode(indices).shape == tuple(shape)
        assert module.get_codebook_entry(indices).shape == (*grid, module.code_dim)
        assert module.remap_to_used(indices).shape == tuple(grid)
        assert module.unmap_to_all(indices).shape == tuple(grid)


def test_forward_of_nothing_raises_before_any_state_changes(make, kind):
    module = make(kind).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    generator = torch.get_rng_state()
    with pytest.raises(InvalidShape, match="no tokens"):
        module(torch.zeros(0, module.input_dim, 2, 2))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(("layout", "rank"), [("channels_first", 3), ("channels_last", 4), ("channels_last", 5)])
@pytest.mark.parametrize("training", [True, False])
def test_a_layout_of_the_quantizer_s_own(make, latents, kind, layout, rank, training):
    module, plain = (make(kind).train(training) for _ in range(2))
    module.layout = Layout(layout)
    z = latents(plain, rank)
    axis, other = (1, rank - 1) if rank >= 4 else (rank - 1, 1)
    moved = z.movedim(axis, other)
    indices = plain.encode(z)
    assert torch.equal(module.encode(moved), indices)
    assert torch.equal(module.decode(indices), plain.decode(indices).movedim(axis, other))
    entries = [
        quantizer.get_codebook_entry(indices, (*indices.shape, quantizer.code_dim)) for quantizer in (module, plain)
    ]
    assert torch.equal(entries[0], entries[1].movedim(axis, other))
    # Two axes have their channels last, whatever the layout.
    assert torch.equal(module.encode(to_rows(z)), indices.flatten())
    if kind == "gumbel":
        logits = [
            quantizer(latent, return_logits=True)[1]["logits"] for quantizer, latent in ((module, moved), (plain, z))
        ]
        torch.testing.assert_close(logits[0], logits[1].movedim(axis, other))
    else:
        outputs = [quantizer(y) for quantizer, y in ((module, moved), (plain, z))]
        torch.testing.assert_close(outputs[0][0], outputs[1][0].movedim(axis, other))
        torch.testing.assert_close(outputs[0][1]["loss/vq"], outputs[1][1]["loss/vq"])
