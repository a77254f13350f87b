"""The tokenizer: one codebook, frozen; numpy and torch in, the same kind out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqserve_server import device
from vqserve_server.codebooks import codebook_digest, load_codebook, save_codebook
from vqserve_server.errors import (
    Closed,
    CodebookError,
    CodebookFileError,
    CodebookNotFound,
    DigestMismatch,
    IndexOutOfRange,
    InvalidDtype,
    InvalidOption,
    InvalidShape,
    NonFiniteLatents,
    NotAnArray,
)
from vqserve_server.quantizers import (
    EMAVectorQuantizer,
    GumbelQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
)
from vqserve_server.quantizers.tensors import narrow
from vqserve_server.search import available
from vqserve_server.tokenizer import Tokenizer

QUANTIZERS = {
    "vq": lambda: VectorQuantizer(40, 6),
    "vq_extra": lambda: VectorQuantizer(40, 6, remap=[4, 9, 30], unknown_index="extra"),
    "vq_sentinel": lambda: VectorQuantizer(40, 6, remap=[4, 9, 30], unknown_index=70000),
    "vq_random": lambda: VectorQuantizer(40, 6, remap=[4, 9, 30]),
    "ema": lambda: EMAVectorQuantizer(40, 6, 0.25),
    "gumbel": lambda: GumbelQuantizer(6, 3, 40, remap=[7, 1, 8]),
    "projection": lambda: VectorQuantizerWithInputProjection(6, 40, 3, output_dim=5),
}


def made(name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return QUANTIZERS[name]().eval()


@pytest.fixture(params=QUANTIZERS)
def quantizer(request):
    return made(request.param)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(made("vq"), name="plain", device="cpu")


def latents_of(*shape, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) / 40).to(dtype)


GRIDS = [(5,), (2, 5), (2, 3, 2), (2, 2, 3, 2)]


@pytest.mark.parametrize("grid", GRIDS)
def test_agrees_with_the_quantizer(quantizer, grid):
    tokenizer = Tokenizer(quantizer, device="cpu")
    first = len(grid) >= 3
    latents = latents_of(*((grid[0], 6, *grid[1:]) if first else (*grid, 6)))
    expected = quantizer.encode(latents)
    indices = tokenizer.encode(latents)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, expected)
    assert np.array_equal(tokenizer.encode(latents.numpy()), expected.numpy())
    ids = torch.arange(expected.numel()).reshape(grid) % tokenizer.decodable
    assert torch.equal(tokenizer.decode(ids), quantizer.decode(ids))
    assert torch.equal(
        tokenizer.decode(ids, output="code_rows", layout="channels_last" if first else None),
        quantizer.get_codebook_entry(ids).detach(),
    )
    assert tokenizer.decode(ids).is_contiguous()
    assert np.array_equal(tokenizer.decode(ids.numpy().astype(np.uint8)), quantizer.decode(ids).numpy())


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_layouts_are_two_views_of_the_same_tokens(tokenizer, rank):
    last = latents_of(2, *range(3, rank + 1), 6)
    first = last.movedim(-1, 1)
    expected = tokenizer.encode(last, layout="channels_last")
    assert torch.equal(tokenizer.encode(first, layout="channels_first"), expected)
    assert np.array_equal(tokenizer.encode(first.numpy(), layout="channels_first"), expected.numpy())
    decoded = tokenizer.decode(expected, layout="channels_first")
    assert torch.equal(decoded.movedim(1, -1), tokenizer.decode(expected, layout="channels_last"))


def test_info_is_what_a_client_may_know():
    info = Tokenizer(made("projection"), name="p", device="cpu").info
    assert (info.name, info.kind, info.num_codes, info.vocab_size) == ("p", "vq_projection", 40, 40)
    assert (info.input_dim, info.code_dim, info.output_dim, info.num_quantizers) == (6, 3, 5, 1)
    assert info.digest == codebook_digest(made("projection"))
    assert Tokenizer(made("vq_sentinel"), device="cpu").info.vocab_size == 70001
    assert Tokenizer(made("vq_extra"), device="cpu").info.vocab_size == 4


@pytest.mark.parametrize(
    ("codes", "options", "dtype"),
    [
        (256, {}, np.uint8),
        (257, {}, np.uint16),
        (65536, {}, np.uint16),
        (65537, {}, np.uint32),
        (300, {"remap": [1, 2], "unknown_index": "extra"}, np.uint8),
        (300, {"remap": [1, 2], "unknown_index": 255}, np.uint8),
        (300, {"remap": [1, 2], "unknown_index": 256}, np.uint16),
        (300, {"remap": [1, 2], "unknown_index": 65536}, np.uint32),
        (300, {"remap": [1, 2], "unknown_index": (1 << 32) - 1}, np.uint32),
    ],
)
def test_numpy_indices_are_of_the_smallest_type_that_holds_the_vocabulary(codes, options, dtype):
    tokenizer = Tokenizer(VectorQuantizer(codes, 1, **options), device="cpu")
    weight = np.linspace(-1, 1, 7, dtype=np.float32)[:, None]
    indices = tokenizer.encode(weight)
    assert indices.dtype == dtype
    assert np.array_equal(indices, tokenizer.encode(torch.from_numpy(weight)).numpy())


def test_a_sentinel_is_reported_and_not_decoded():
    tokenizer = Tokenizer(made("vq_sentinel"), device="cpu")
    indices = tokenizer.encode(made("vq_sentinel").embedding.weight.detach().numpy())
    assert indices[0] == 70000
    with pytest.raises(IndexOutOfRange, match=r"indices\[0\] is 70000, not in \[0, 3\)"):
        tokenizer.decode(indices)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", ">f8"])
def test_numpy_types(tokenizer, dtype):
    latents = latents_of(4, 6).numpy().astype(dtype)
    expected = tokenizer.encode(torch.from_numpy(latents.astype(np.float64)))
    assert np.array_equal(tokenizer.encode(latents), expected.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_types(tokenizer, dtype):
    latents = latents_of(4, 6, dtype=dtype)
    assert torch.equal(tokenizer.encode(latents), tokenizer.encode(latents.double()))


def test_any_memory_will_do(tokenizer):
    latents = np.ascontiguousarray(latents_of(2, 6, 4, 4).numpy())
    expected = tokenizer.encode(latents)
    read_only = np.frombuffer(latents.tobytes(), np.float32).reshape(latents.shape)
    assert np.array_equal(tokenizer.encode(read_only), expected)
    assert np.array_equal(
        tokenizer.encode_rows(read_only.reshape(-1, 4, 4).transpose(1, 2, 0)[..., :6].reshape(-1, 6)),
        tokenizer.encode(latents[:1].copy()).reshape(-1),
    )
    assert np.array_equal(tokenizer.encode(latents[::-1, :, ::-1]), expected[::-1, ::-1])
    assert np.array_equal(tokenizer.encode(np.asfortranarray(latents)), expected)
    frozen_ids = expected.astype(np.int64)
    frozen_ids.flags.writeable = False
    assert np.array_equal(tokenizer.decode(frozen_ids), tokenizer.decode(expected))
    assert np.array_equal(tokenizer.decode_rows(frozen_ids.reshape(-1)), tokenizer.decode(expected.reshape(-1)))


def test_arguments_are_not_changed_and_gradients_do_not_flow(tokenizer):
    latents = latents_of(3, 6).requires_grad_()
    before = latents.detach().clone()
    indices = tokenizer.encode(latents)
    assert not tokenizer.decode(indices).requires_grad
    assert torch.equal(latents, before)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 6, 3, 3), (2, 6, 0, 3), (1, 6, 0, 2, 2)])
def test_no_tokens_are_no_error(tokenizer, shape):
    indices = tokenizer.encode(torch.empty(shape))
    assert indices.numel() == 0
    assert tokenizer.decode(indices).shape == shape
    assert tokenizer.decode(tokenizer.encode(np.empty(shape, np.float32))).shape == shape


@pytest.mark.parametrize(
    "latents",
    [
        np.zeros((2, 6), bool),
        np.zeros((2, 6), np.int64),
        np.zeros((2, 6), np.complex64),
        np.zeros((2, 6), object),
        np.zeros((2, 6), np.longdouble),
        np.ma.masked_array(np.zeros((2, 6), np.float32), mask=True),
        [[0.0] * 6],
        None,
        torch.zeros(2, 6, dtype=torch.bool),
        torch.zeros(2, 6, dtype=torch.int32),
        torch.zeros(2, 6, dtype=torch.complex64),
        torch.zeros(2, 6, dtype=torch.float8_e4m3fn),
        torch.zeros(2, 6).to_sparse(),
        torch.zeros(2, 6, device="meta"),
    ],
)
def test_other_latents_are_rejected(tokenizer, latents):
    with pytest.raises(InvalidDtype, match="latents must be"):
        tokenizer.encode(latents)


@pytest.mark.parametrize(
    "indices",
    [
        np.zeros(2, bool),
        np.zeros(2, np.float32),
        np.zeros(2, object),
        np.ma.masked_array([1, 2], mask=[0, 1]),
        [1, 2],
        3,
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.complex64),
    ],
)
def test_other_indices_are_rejected(tokenizer, indices):
    with pytest.raises(InvalidDtype, match="indices must be"):
        tokenizer.decode(indices)


@pytest.mark.parametrize(
    "value",
    [
        [[0] * 6],
        3,
        None,
        "text",
        np.float32(1),
        np.ma.masked_array(np.zeros((2, 6)), mask=True),
        torch.zeros(2, 6, dtype=torch.int64).to_sparse(),
        torch.zeros(2, 6, dtype=torch.int64, device="meta"),
    ],
)
def test_what_is_no_array_is_a_type_error_too(tokenizer, value):
    for call in (tokenizer.encode, tokenizer.decode):
        with pytest.raises(NotAnArray, match=r"must be a (numpy array or a|dense) torch tensor") as caught:
            call(value)
        assert isinstance(caught.value, TypeError)


def test_shapes_and_options_are_checked(tokenizer):
    with pytest.raises(InvalidShape, match="5 channels"):
        tokenizer.encode(torch.zeros(2, 5))
    with pytest.raises(InvalidShape, match="2 to 5 axes"):
        tokenizer.encode(np.zeros(6, np.float32))
    with pytest.raises(InvalidShape, match="1 to 4 axes"):
        tokenizer.decode(np.zeros((), np.int64))
    with pytest.raises(InvalidOption, match="layout"):
        tokenizer.encode(torch.zeros(2, 6), layout="last")
    with pytest.raises(InvalidOption, match="layout"):
        tokenizer.decode(torch.zeros(2, dtype=torch.int64), layout="last")
    with pytest.raises(InvalidOption, match="dtype must be one of 'float32'"):
        tokenizer.decode(torch.zeros(2, dtype=torch.int64), dtype="float8")
    with pytest.raises(InvalidOption, match="output must be one of 'latents'"):
        tokenizer.decode(torch.zeros(2, dtype=torch.int64), output="rows")
    with pytest.raises(InvalidOption, match="dtype must be one of 'float32'"):
        tokenizer.decode(np.zeros(2, np.int64), dtype=np.int8)
    # The error comes when the generator is made.
    with pytest.raises(InvalidOption, match="layout"):
        tokenizer.encode_many([], layout="last")
    with pytest.raises(InvalidOption, match="output"):
        tokenizer.decode_many([], output="rows")
    with pytest.raises(TypeError, match="iter"):
        tokenizer.encode_many(3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_non_finite_latents_are_named_in_the_callers_array(tokenizer, value, dtype):
    latents = latents_of(2, 6, 3, 3, dtype=dtype)
    latents[1, 2, 0, 1] = value
    for given_latents in (latents, latents.numpy()):
        with pytest.raises(NonFiniteLatents, match=rf"latents\[1, 2, 0, 1\] is {value}"):
            tokenizer.encode(given_latents)


def test_an_overflowing_projection_is_named_in_the_callers_grid():
    quantizer = made("projection")
    with torch.no_grad():
        quantizer.proj_in.weight.fill_(1e10)
    tokenizer = Tokenizer(quantizer, device="cpu")
    latents = torch.zeros(2, 6, 3, 3)
    latents[1, :, 2, 0] = 1e35
    latents[1, :, 2, 2] = 1e35
    for given_latents in (latents, latents.numpy()):
        with pytest.raises(NonFiniteLatents, match=r"token \[1, 2, 0\]"):
            tokenizer.encode(given_latents)


def test_codes_that_overflow_in_the_projection_are_rejected_at_once():
    quantizer = made("projection")
    with torch.no_grad():
        quantizer.proj_out.weight.fill_(1e30)
        quantizer.embedding.weight[17].fill_(1e10)
    with pytest.raises(CodebookError, match="index 17 beyond float32"):
        Tokenizer(quantizer, device="cpu")


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_indices_out_of_range_are_named(tokenizer, make):
    for dtype, value in [(np.int64, 40), (np.int8, -1), (np.uint64, (1 << 64) - 1), (np.uint16, 65535)]:
        indices = np.zeros((2, 3), dtype)
        indices[1, 2] = value
        with pytest.raises(IndexOutOfRange, match=rf"indices\[1, 2\] is {value}, not in \[0, 40\)"):
            tokenizer.decode(make(indices))


# Freezing.


def test_later_changes_have_no_effect(quantizer):
    tokenizer = Tokenizer(quantizer, device="cpu")
    latents = latents_of(50, 6)
    ids = torch.arange(tokenizer.decodable)
    indices, decoded = tokenizer.encode(latents), tokenizer.decode(ids)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.data.copy_(torch.randn_like(parameter))
        if quantizer.used is not None:
            quantizer.used.fill_(0)
    assert torch.equal(tokenizer.encode(latents), indices)
    assert torch.equal(tokenizer.decode(ids), decoded)
    # Nor can a caller write into the table through what decode gave.
    decoded.zero_()
    tokenizer.decode_rows(ids.numpy()).fill(0)
    assert tokenizer.decode(ids).abs().sum() > 0


def test_many_threads(quantizer):
    tokenizer = Tokenizer(quantizer, device="cpu")
    batches = [torch.randn(30, 6, generator=torch.Generator().manual_seed(i)) for i in range(24)]
    expected = [tokenizer.encode(batch) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        assert all(map(torch.equal, pool.map(tokenizer.encode, batches), expected))


def test_encode_rows_is_encode(tokenizer):
    rows = latents_of(9, 6).numpy()
    indices = tokenizer.encode_rows(rows)
    assert indices.dtype == np.int64
    assert np.array_equal(indices, tokenizer.encode(rows))
    assert np.array_equal(tokenizer.decode_rows(indices), tokenizer.decode(indices))
    assert tokenizer.decode_rows(indices, output="code_rows").dtype == np.float32
    assert tokenizer.weight_dtype == np.float32


def test_half_precision_and_subclasses_are_rejected():
    with pytest.raises(CodebookError, match="float"):
        Tokenizer(made("vq").half(), device="cpu")
    with pytest.raises(CodebookError, match="is not one of"):
        Tokenizer(torch.nn.Linear(2, 2), device="cpu")


# Types of what decode gives.


def test_decode_rounds_once():
    # Half way between two halves but for a bit that float32 cannot hold: by way of float32 it rounds the other way.
    above = 1 + 2.0**-11 + 2.0**-40
    below = 1 + 3 * 2.0**-11 - 2.0**-40
    quantizer = VectorQuantizer(2, 2).double()
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[above, -above], [below, -below]], dtype=torch.float64))
    tokenizer = Tokenizer(quantizer, device="cpu")
    ids = np.arange(2)
    expected = np.array([[above, -above], [below, -below]]).astype(np.float16)
    assert expected[0, 0] == 1 + 2.0**-10
    assert np.array_equal(tokenizer.decode(ids, dtype="float16"), expected)
    assert tokenizer.decode(ids, dtype="float16").dtype == np.float16
    assert tokenizer.decode(ids, dtype="float64")[0, 0] == above
    assert tokenizer.decode(ids).dtype == np.float32
    bfloat16 = tokenizer.decode(torch.from_numpy(ids), dtype="bfloat16")
    assert bfloat16.dtype == torch.bfloat16
    widened = tokenizer.decode(ids, dtype="bfloat16")
    assert widened.dtype == np.float32
    assert np.array_equal(widened, bfloat16.float().numpy())


@settings(max_examples=300)
@given(st.floats(width=64, allow_nan=False, allow_infinity=False))
def test_narrowing_from_float64_is_correctly_rounded(value):
    with np.errstate(over="ignore"):
        expected = np.float64(value).astype(np.float16)
    assert narrow(torch.tensor([value], dtype=torch.float64), torch.float16).numpy()[0] == expected


@settings(max_examples=300)
@given(st.integers(0, (1 << 15) - 2), st.sampled_from([-1, 0, 1]), st.integers(45, 52), st.booleans())
def test_narrowing_around_half_way_points(bits, side, shift, negative):
    # The half-way point of two neighbours, and numbers so close to it that float32 sees none between.
    for dtype in (torch.float16, torch.bfloat16):
        pair = torch.tensor([bits, bits + 1], dtype=torch.int16).view(dtype).double()
        if not bool(torch.isfinite(pair).all()):
            continue
        middle = (pair[0] + pair[1]) / 2
        value = middle * (1 + side * 2.0**-shift)
        even = pair[bits % 2]
        expected = even if value == middle else pair[0] if value < middle else pair[1]
        sign = -1 if negative else 1
        assert narrow(sign * value[None], dtype).double()[0] == sign * expected


def test_values_beyond_a_types_range_are_rejected():
    quantizer = EMAVectorQuantizer(4, 2, 0.25)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[1.0, 2.0], [65504.0, 0.0], [0.0, -70000.0], [0.0, 0.0]]))
    tokenizer = Tokenizer(quantizer, device="cpu")
    ids = torch.tensor([[0, 1], [0, 2]])
    with pytest.raises(InvalidOption, match=r"indices\[1, 1\] decodes to a value beyond the range of float16"):
        tokenizer.decode(ids, dtype="float16")
    assert tokenizer.decode(ids[:1], dtype="float16")[0, 1, 0] == 65504
    assert bool(torch.isfinite(tokenizer.decode(ids, dtype="bfloat16")).all())
    wide = Tokenizer(quantizer.double(), device="cpu")
    assert bool(torch.isfinite(wide.decode(ids)).all())


# What a client can do as well.


def test_many_are_lazy_and_in_order(tokenizer):
    arrays = [latents_of(n, 6).numpy() for n in range(1, 5)]
    taken = []

    def source():
        for array in arrays:
            taken.append(len(array))
            yield array

    answers = tokenizer.encode_many(source())
    assert taken == []
    assert np.array_equal(next(answers), tokenizer.encode(arrays[0]))
    assert taken == [1]
    indices = [tokenizer.encode(arrays[0]), *answers]
    for array, got in zip(arrays, indices, strict=True):
        assert np.array_equal(got, tokenizer.encode(array))
    for got, decoded in zip(indices, tokenizer.decode_many(indices, output="code_rows"), strict=True):
        assert np.array_equal(decoded, tokenizer.decode(got, output="code_rows"))


def test_codebook_and_digest_are_held_against_the_info(tokenizer):
    latents = latents_of(2, 6)
    fits = {"codebook": "plain", "digest": tokenizer.digest, "timeout": 1e-9}
    indices = tokenizer.encode(latents, **fits)
    assert torch.equal(tokenizer.decode(indices, **fits), tokenizer.decode(indices))
    for options, error, text in (
        ({"codebook": "other"}, CodebookNotFound, "no codebook 'other' is served, only: plain"),
        ({"digest": "0" * 64}, DigestMismatch, "'plain' has digest"),
    ):
        for call, array in ((tokenizer.encode, latents), (tokenizer.decode, indices)):
            with pytest.raises(error, match=text):
                call(array, **options)
        for many, array in ((tokenizer.encode_many, latents), (tokenizer.decode_many, indices)):
            with pytest.raises(error, match=text):
                list(many([array], **options))


def test_closing():
    with Tokenizer(made("vq"), name="plain", device="cpu") as tokenizer:
        assert tokenizer.codebooks(timeout=1) == [tokenizer.info]
        answers = tokenizer.encode_many([latents_of(2, 6)] * 2)
        next(answers)
    tokenizer.close()
    for call in (
        tokenizer.codebooks,
        lambda: tokenizer.encode(latents_of(2, 6)),
        lambda: tokenizer.decode(np.zeros(2, np.uint8)),
        lambda: next(answers),
        lambda: tokenizer.encode_rows(latents_of(2, 6).numpy()),
        lambda: tokenizer.decode_rows(np.zeros(2, np.int64)),
    ):
        with pytest.raises(Closed):
            call()
    assert repr(tokenizer).endswith("closed)")
    assert tokenizer.name == "plain"


# Loading.


def test_load(tmp_path):
    path = tmp_path / "my-codes.safetensors"
    digest = save_codebook(made("vq"), path)
    tokenizer = Tokenizer.load(path)
    assert tokenizer.name == "my-codes"
    assert tokenizer.digest == digest == load_codebook(path).digest
    assert tokenizer.device.type in {"cpu", "cuda"}
    text = repr(Tokenizer.load(path, device="cpu"))
    assert text.startswith("Tokenizer('my-codes', kind='vq', num_codes=40, code_dim=6, digest='")
    assert digest[:12] in text
    with pytest.raises(CodebookFileError, match=r"none\.safetensors: there is no such file"):
        Tokenizer.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", available("cpu"))
def test_every_search_backend(name):
    tokenizer = Tokenizer(made("vq"), device="cpu", search=name)
    latents = latents_of(20, 6)
    assert tokenizer.search == name
    assert torch.equal(tokenizer.encode(latents), made("vq").encode(latents))


def test_unknown_devices_and_backends_are_named():
    for unknown in ("tpu", "gpu", "cpu:x", "mps", "", "meta"):
        with pytest.raises(InvalidOption, match="device must be auto, cpu, cuda or cuda:i"):
            Tokenizer(made("vq"), device=unknown)
    with pytest.raises(InvalidOption, match="'cuda:99' does not exist or does not work"):
        Tokenizer(made("vq"), device="cuda:99")
    with pytest.raises(InvalidOption, match="psychic"):
        Tokenizer(made("vq"), device="cpu", search="psychic")


def test_without_a_driver_torch_is_not_asked(monkeypatch):
    monkeypatch.setattr(device, "_has_driver", lambda: False)
    monkeypatch.setattr(device, "_failure", lambda _: pytest.fail("asked"))
    assert device.select_device("auto") == "cpu"
    assert device.why_no_cuda() == "there is no driver of a GPU: libcuda.so.1 cannot be loaded"


def test_auto_takes_a_gpu_only_if_it_works(monkeypatch):
    monkeypatch.setattr(device, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "_failure", lambda _: "no driver")
    assert device.select_device("auto") == "cpu"
    assert device.why_no_cuda() == "no driver"
    monkeypatch.setattr(device, "_failure", lambda _: None)
    # Which it is must not depend on the thread that asks: "cuda" is the current device of each.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert device.select_device("auto") == "cuda:2"
    assert device.select_device("cuda") == "cuda:2"
    assert device.select_device("cuda:1") == "cuda:1"
    assert device.why_no_cuda() is None


def test_a_torch_without_cuda_is_called_that(monkeypatch):
    monkeypatch.setattr(device, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    assert device.why_no_cuda() == "this torch is built without CUDA"
    assert device.select_device("auto") == "cpu"


def test_what_is_wrong_with_a_device_is_said_in_torchs_words(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check " + "that " * 200)

    monkeypatch.setattr(torch, "ones", fail)
    reason = device._failure(torch.device("cuda"))
    assert reason.startswith("Found no NVIDIA driver on your system. Please check that ")
    assert len(reason) == 300
