"""The tokenizer with the kinds that only infer: layouts, stages, and the errors that go with them."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kinds import bounds, with_every_kind
from vqserve_server.codebooks import codebook_digest, save_codebook
from vqserve_server.errors import (
    CodebookError,
    IndexOutOfRange,
    InvalidDtype,
    InvalidOption,
    InvalidShape,
    NonFiniteLatents,
)
from vqserve_server.quantizers import (
    CosineQuantizer,
    DotQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    ResidualFiniteScalarQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
)
from vqserve_server.search import available
from vqserve_server.tokenizer import Tokenizer

PLAIN = {
    "cosine": lambda: CosineQuantizer(40, 6),
    "cosine_all": lambda: CosineQuantizer(40, 3, True, input_dim=6, output_dim=5, remap=[4, 9], unknown_index="extra"),
    "dot": lambda: DotQuantizer(40, 6),
    "fsq": lambda: FiniteScalarQuantizer([8, 5, 4, 3, 2, 2]),
    "fsq_projected": lambda: FiniteScalarQuantizer([8, 5, 5], input_dim=6, output_dim=6),
    "lfq": lambda: LookupFreeQuantizer(6, "little"),
    "lfq_projected": lambda: LookupFreeQuantizer(17, "big", spherical=True, input_dim=6, output_dim=4),
}
RESIDUAL = {
    "rvq": lambda: ResidualQuantizer(5, 40, 6),
    "rvq_grouped": lambda: ResidualQuantizer(6, 300, 2, groups=3),
    "rvq_dac": lambda: ResidualQuantizer(5, 40, 2, 6, "cosine", stage_projections=True),
    "rvq_mimi": lambda: ResidualQuantizer(5, 40, 2, 6, inner_dim=2, first_quantizers=1),
    "rvq_double": lambda: ResidualQuantizer(5, 40, 6).double(),
    "rvq_single": lambda: ResidualQuantizer(1, 40, 6),
    "rvq_sizes": lambda: ResidualQuantizer(4, [40, 300, 7, 1], 6),
    "residual_fsq": lambda: ResidualFiniteScalarQuantizer([3, 2, 3, 2, 4, 3], 5, "atanh", "levels_minus_one"),
    "residual_fsq_grouped": lambda: ResidualFiniteScalarQuantizer(
        [8, 5], 6, "soft_clamp", "levels", groups=3, input_dim=6, output_dim=6
    ),
    "residual_fsq_single": lambda: ResidualFiniteScalarQuantizer(
        [4] * 8, 1, "atanh_twice", "levels_minus_one", input_dim=6, output_dim=6
    ),
}
QUANTIZERS = with_every_kind(PLAIN | RESIDUAL)
GRIDS = [(12,), (2, 6), (2, 2, 3), (2, 2, 3, 1)]


def made(name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        quantizer = QUANTIZERS[name]()
        with torch.no_grad():
            for parameter in quantizer.parameters():
                parameter.normal_()
        return quantizer.eval()


@pytest.fixture(params=QUANTIZERS)
def quantizer(request):
    return made(request.param)


@pytest.fixture(params=RESIDUAL)
def residual(request):
    return made(request.param)


@pytest.fixture(scope="module")
def rvq():
    return Tokenizer(made("rvq"), name="rvq", device="cpu")


def latents_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def index_grid(quantizer, grid):
    """Indices of a grid, channels last."""
    shape = (*grid, quantizer.num_quantizers) if quantizer.has_stages else grid
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % bounds(quantizer)


def first(array, quantizer):
    return array.movedim(-1, 1) if quantizer.has_stages and array.ndim > 2 else array


@pytest.mark.parametrize("grid", GRIDS)
def test_agrees_with_the_quantizer(quantizer, grid):
    tokenizer = Tokenizer(quantizer, device="cpu")
    is_first = len(grid) >= 3 or (quantizer.has_stages and len(grid) == 2)
    channels = quantizer.input_dim
    latents = latents_of(*((grid[0], channels, *grid[1:]) if is_first else (*grid, channels)))
    expected = quantizer.encode(latents)
    indices = tokenizer.encode(latents)
    assert indices.dtype == torch.int64
    assert indices.is_contiguous()
    assert torch.equal(indices, expected)
    array = tokenizer.encode(latents.numpy())
    assert array.dtype == np.min_scalar_type(tokenizer.info.vocab_size - 1)
    assert np.array_equal(array, expected.numpy())
    ids = first(index_grid(quantizer, grid), quantizer)
    decoded = tokenizer.decode(ids)
    assert decoded.is_contiguous()
    assert torch.equal(decoded, quantizer.decode(ids).to(torch.float32))
    for dtype in (np.uint16, np.int64):
        assert np.array_equal(tokenizer.decode(ids.numpy().astype(dtype)), decoded.numpy())
    assert torch.equal(tokenizer.decode(ids, dtype="float64"), quantizer.decode(ids).double())


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_layouts_are_two_views_of_the_same_tokens(quantizer, rank):
    tokenizer = Tokenizer(quantizer, device="cpu")
    last = latents_of(2, *range(3, rank + 1), quantizer.input_dim)
    expected = tokenizer.encode(last, layout="channels_last")
    assert torch.equal(tokenizer.encode(last.movedim(-1, 1), layout="channels_first"), first(expected, quantizer))
    assert np.array_equal(
        tokenizer.encode(last.movedim(-1, 1).numpy(), layout="channels_first"), first(expected, quantizer).numpy()
    )
    decoded = tokenizer.decode(expected, layout="channels_last")
    again = tokenizer.decode(first(expected, quantizer), layout="channels_first")
    assert torch.equal(again.movedim(1, -1), decoded)
    assert np.array_equal(tokenizer.decode(expected.numpy(), layout="channels_last"), decoded.numpy())


@pytest.mark.parametrize("layout", ["channels_first", "channels_last", None])
def test_the_codebook_s_layout_is_the_default(quantizer, layout):
    quantizer.layout = layout
    tokenizer = Tokenizer(quantizer, device="cpu")
    assert tokenizer.info.layout == layout
    plain = latents_of(2, quantizer.input_dim, quantizer.input_dim)
    indices = tokenizer.encode(plain)
    assert torch.equal(indices, quantizer.encode(plain))
    assert torch.equal(indices, tokenizer.encode(plain, layout=layout or "channels_last"))
    assert torch.equal(tokenizer.decode(indices), quantizer.decode(indices).float())


def test_info(quantizer):
    info = Tokenizer(quantizer, name="book", device="cpu").info
    assert (info.kind, info.num_codes, info.input_dim) == (quantizer.kind, quantizer.num_codes, quantizer.input_dim)
    assert (info.code_dim, info.output_dim) == (quantizer.code_dim, quantizer.output_dim)
    assert info.digest == codebook_digest(quantizer)
    assert info.num_quantizers == quantizer.num_quantizers
    assert info.has_stages == (quantizer.has_stages)
    assert info.layout == ("channels_first" if info.has_stages else None)


@pytest.mark.parametrize("name", available("cpu"))
def test_every_search_backend(quantizer, name):
    if name == "native" and quantizer.weight_dtype == torch.float64:
        with pytest.raises(InvalidOption, match="can't take this codebook"):
            Tokenizer(quantizer, device="cpu", search=name)
        return
    tokenizer = Tokenizer(quantizer, device="cpu", search=name)
    assert tokenizer.search == ("none" if quantizer.kind in {"fsq", "lfq", "residual_fsq"} else name)
    latents = latents_of(20, quantizer.input_dim)
    assert torch.equal(tokenizer.encode(latents), quantizer.encode(latents))


def test_an_unknown_backend_is_named(quantizer):
    with pytest.raises(InvalidOption, match="psychic"):
        Tokenizer(quantizer, device="cpu", search="psychic")


def test_rows(quantizer):
    tokenizer = Tokenizer(quantizer, device="cpu")
    rows = latents_of(9, quantizer.input_dim).numpy()
    indices = tokenizer.encode_rows(rows)
    assert indices.dtype == np.int64
    assert np.array_equal(indices, tokenizer.encode(rows))
    assert np.array_equal(np.concatenate([tokenizer.encode_rows(row[None]) for row in rows]), indices)
    decoded = tokenizer.decode_rows(indices)
    assert np.array_equal(decoded, tokenizer.decode(indices, dtype="float64").astype(decoded.dtype))
    assert np.array_equal(np.concatenate([tokenizer.decode_rows(row[None]) for row in indices]), decoded)
    assert tokenizer.encode_rows(rows[:0]).shape == indices[:0].shape
    assert tokenizer.decode_rows(indices[:0]).shape == (0, tokenizer.info.output_dim)


def test_rows_of_fewer_stages(residual):
    tokenizer = Tokenizer(residual, device="cpu")
    rows = latents_of(9, 6).numpy()
    indices = tokenizer.encode_rows(rows)
    for count in range(1, residual.num_quantizers + 1):
        assert np.array_equal(tokenizer.encode_rows(rows, num_quantizers=count), indices[:, :count])
        expected = residual.decode(torch.from_numpy(indices), count)
        assert np.array_equal(tokenizer.decode_rows(np.ascontiguousarray(indices[:, :count])), expected.numpy())


@pytest.mark.parametrize("clone", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])  # noqa: S301
def test_a_clone_is_equal(quantizer, clone):
    tokenizer = Tokenizer(quantizer, device="cpu")
    other = clone(tokenizer)
    latents = latents_of(2, quantizer.input_dim, 3, 3)
    indices = tokenizer.encode(latents)
    assert repr(other) == repr(tokenizer)
    assert torch.equal(other.encode(latents), indices)
    assert torch.equal(other.decode(indices), tokenizer.decode(indices))


def test_many_threads(quantizer):
    tokenizer = Tokenizer(quantizer, device="cpu")
    batches = [torch.randn(30, quantizer.input_dim, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    expected = [tokenizer.encode(batch) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        assert all(map(torch.equal, pool.map(tokenizer.encode, batches), expected))


def test_later_changes_have_no_effect(quantizer):
    tokenizer = Tokenizer(quantizer, device="cpu")
    latents = latents_of(50, quantizer.input_dim)
    indices = tokenizer.encode(latents)
    decoded = tokenizer.decode(indices)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.data.normal_()
    assert torch.equal(tokenizer.encode(latents), indices)
    assert torch.equal(tokenizer.decode(indices), decoded)
    decoded.zero_()
    assert tokenizer.decode(indices).abs().sum() > 0


def test_loaded_from_a_file(tmp_path, quantizer):
    save_codebook(quantizer, tmp_path / "book.safetensors")
    tokenizer = Tokenizer.load(tmp_path / "book.safetensors", device="cpu")
    latents = latents_of(2, quantizer.input_dim, 3, 3)
    assert tokenizer.info.layout == quantizer.layout
    assert torch.equal(tokenizer.encode(latents), quantizer.encode(latents))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(quantizer, dtype):
    tokenizer = Tokenizer(quantizer, device="cpu")
    latents = latents_of(30, quantizer.input_dim, dtype=dtype)
    assert torch.equal(tokenizer.encode(latents), quantizer.encode(latents))
    if dtype != torch.float64:
        assert torch.equal(tokenizer.encode(latents), tokenizer.encode(latents.float()))
    indices = tokenizer.encode(latents)
    assert torch.equal(tokenizer.decode(indices, dtype=dtype), quantizer.decode(indices).to(dtype))


# Stages.


def test_fewer_stages_are_the_first_of_all(rvq):
    latents = latents_of(2, 6, 3, 3)
    indices = rvq.encode(latents)
    for count in range(1, 6):
        coarse = rvq.encode(latents, num_quantizers=count)
        assert torch.equal(coarse, indices[:, :count])
        decoded = rvq.decode(coarse, num_quantizers=count)
        assert torch.equal(rvq.decode(indices, num_quantizers=count), decoded)
        assert np.array_equal(rvq.decode(indices.numpy(), num_quantizers=np.int32(count)), decoded.numpy())
        [many] = rvq.encode_many([latents], num_quantizers=count)
        assert torch.equal(many, coarse)
        [many] = rvq.decode_many([coarse], num_quantizers=count)
        assert torch.equal(many, decoded)
    assert torch.equal(rvq.decode(indices, num_quantizers=5), rvq.decode(indices))


@pytest.mark.parametrize("count", [0, 6, -1, 2.0, True, "2"])
def test_how_many_is_checked_before_anything_else(rvq, count):
    for call in (rvq.encode, rvq.decode, rvq.encode_many, rvq.decode_many):
        with pytest.raises(InvalidOption, match=r"num_quantizers must be an integer (in \[1, 5\]|of 1 or more)"):
            call(None if call in (rvq.encode, rvq.decode) else [], num_quantizers=count)


def test_one_index_is_what_other_codebooks_have():
    tokenizer = Tokenizer(VectorQuantizer(40, 6), device="cpu")
    latents = latents_of(5, 6)
    assert torch.equal(tokenizer.encode(latents, num_quantizers=1), tokenizer.encode(latents))
    with pytest.raises(InvalidOption, match="num_quantizers must be 1, not 2: a token of this codebook has one index"):
        tokenizer.encode(latents, num_quantizers=2)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_indices_are_checked_where_they_are(rvq, make):
    indices = np.zeros((2, 5, 3), np.int64)
    indices[1, 4, 2] = 40
    for count in (None, 5):
        with pytest.raises(IndexOutOfRange, match=r"indices\[1, 4, 2\] is 40, not in \[0, 40\)"):
            rvq.decode(make(indices), num_quantizers=count)
    # What is not used is not looked at.
    assert rvq.decode(make(indices), num_quantizers=4).shape[2] == 3
    for shape, match in (
        ((2, 3, 5), r"have 3 for a token in layout channels_first, expected 5: pass num_quantizers"),
        ((5, 6), r"have 6 for a token in layout channels_last, expected 5 \(codebook 'rvq'\)$"),
        ((5,), "2 to 5 axes, not 1"),
        ((1, 5, 1, 1, 1, 1), "2 to 5 axes, not 6"),
    ):
        with pytest.raises(InvalidShape, match=match):
            rvq.decode(make(np.zeros(shape, np.int64)))
    with pytest.raises(InvalidShape, match="3 to 5"):
        rvq.decode(make(np.zeros((2, 2, 7), np.int64)), num_quantizers=3)
    with pytest.raises(InvalidDtype, match="indices must be integers"):
        rvq.decode(make(np.zeros((2, 5))))


def test_code_rows_are_no_token_s(rvq):
    with pytest.raises(InvalidOption, match="'rvq' has stages: its tokens have latents, but no code rows"):
        rvq.decode(torch.zeros(1, 5, dtype=torch.int64), output="code_rows")
    with pytest.raises(InvalidOption, match="no code rows"):
        rvq.decode_many([], output="code_rows")


@pytest.mark.parametrize("name", PLAIN)
def test_code_rows_are_the_codes_before_any_projection(name):
    quantizer = made(name)
    ids = torch.arange(12).reshape(2, 6) % quantizer.decodable
    rows = Tokenizer(quantizer, device="cpu").decode(ids, output="code_rows")
    assert torch.equal(rows, quantizer.get_codebook_entry(ids))


@pytest.mark.parametrize("shape", [(0, 6), (2, 6, 0), (0, 6, 3, 3), (1, 6, 0, 2, 2)])
def test_no_tokens_are_no_error(residual, shape):
    tokenizer = Tokenizer(residual, device="cpu")
    indices = tokenizer.encode(torch.empty(shape))
    assert indices.shape == (shape[0], residual.num_quantizers, *shape[2:])
    assert tokenizer.decode(indices).shape == shape
    assert tokenizer.decode(tokenizer.encode(np.empty(shape, np.float32))).shape == shape


@pytest.mark.parametrize("name", ["rvq", "rvq_dac", "rvq_mimi", "lfq_projected"])
def test_latents_that_leave_float32_on_their_way_are_named(name):
    tokenizer = Tokenizer(made(name), device="cpu")
    latents = torch.zeros(2, 6, 3, 3)
    latents[1, :, 2, 0] = 3.4e38
    latents[1, ::2, 2, 0] *= -1
    for given in (latents, latents.numpy()):
        with pytest.raises(NonFiniteLatents, match=r"token \[1, 2, 0\] (may leave|leaves) the range of float32"):
            tokenizer.encode(given)


def test_codes_beyond_float32_are_rejected_at_once():
    quantizer = made("rvq")
    quantizer.parts[0].stages[0].embedding.weight.data[3] = 3e38
    quantizer.parts[0].stages[1].embedding.weight.data[3] = 3e38
    with pytest.raises(CodebookError, match="may add up"):
        Tokenizer(quantizer, device="cpu")


def test_values_beyond_a_type_are_named_by_their_token():
    quantizer = made("rvq")
    with torch.no_grad():
        for stage in quantizer.parts[0].stages:
            stage.embedding.weight[3] = 3e4
    tokenizer = Tokenizer(quantizer, device="cpu")
    indices = torch.zeros(2, 5, 4, dtype=torch.int64)
    indices[1, :, 2] = 3
    with pytest.raises(InvalidOption, match=r"token \[1, 2\] decodes to a value beyond the range of float16"):
        tokenizer.decode(indices, dtype="float16")


def test_layouts_have_names():
    quantizer = made("rvq")
    with pytest.raises(InvalidOption, match="layout must be one of"):
        quantizer.layout = "nchw"
    assert quantizer.layout == "channels_first"
