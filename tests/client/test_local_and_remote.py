"""A codebook in process and one behind a server swap by one line: the same methods, options and answers."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch

from vqserve.errors import InvalidOption
from vqserve_client import AsyncClient, Client
from vqserve_server import Tokenizer
from vqserve_server.quantizers import VectorQuantizerWithInputProjection

# What only makes sense in process.
OF_TOKENIZER = {"load", "of_codebook", "encode_rows", "decode_rows", "check_itself", "count_searches"}
# What only makes sense of a server.
OF_SERVER = {"server_info"}


def methods(kind):
    return {name: value for name, value in vars(kind).items() if callable(getattr(kind, name)) and name[0] != "_"}


@pytest.mark.parametrize(("kind", "less", "more"), [(AsyncClient, set(), set()), (Tokenizer, OF_SERVER, OF_TOKENIZER)])
def test_the_same_methods(kind, less, more):
    assert methods(kind).keys() == methods(Client).keys() - less | more


@pytest.mark.parametrize(
    ("kind", "name"),
    [(AsyncClient, name) for name in methods(Client)]
    + [(Tokenizer, name) for name in methods(Client) if name not in OF_SERVER],
)
def test_the_same_options(kind, name):
    def arguments(function):
        parameters = inspect.signature(function).parameters.values()
        return [(one.name, one.kind, one.default) for one in parameters]

    assert arguments(getattr(kind, name)) == arguments(getattr(Client, name))


def test_all_are_context_managers():
    assert all(hasattr(kind, name) for kind in (Client, Tokenizer) for name in ("__enter__", "__exit__"))
    assert all(hasattr(AsyncClient, name) for name in ("__aenter__", "__aexit__"))


@pytest.fixture(scope="module")
def quantizer():
    torch.manual_seed(0)
    return VectorQuantizerWithInputProjection(input_dim=6, n_codes=300, codebook_dim=4, output_dim=5, beta=1.0)


@pytest.fixture
def book(quantizer, request, serving, connect):
    """The codebook, `local` or `remote`."""
    tokenizer = Tokenizer(quantizer, name="book", device="cpu")
    return tokenizer if request.param == "local" else connect(serving(tokenizer).target)


everywhere = pytest.mark.parametrize(
    ("connect", "book"), [("sync", "local"), ("sync", "remote"), ("async", "remote")], indirect=True
)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_encode(book, quantizer, latents, rank, dtype):
    last = torch.from_numpy(latents(*range(2, rank + 1), 6)).to(dtype)
    expected = quantizer.encode(last.reshape(-1, 6)).reshape(last.shape[:-1])
    for tensor, layout in [(last, "channels_last"), (last.movedim(-1, 1), "channels_first")][: 1 if rank == 2 else 2]:
        indices = book.encode(tensor, layout=layout, codebook="book", timeout=30)
        assert indices.dtype == torch.int64
        assert torch.equal(indices, expected)
        if dtype != torch.bfloat16:
            array = book.encode(tensor.numpy(), layout=layout)
            assert array.dtype == np.uint16
            assert np.array_equal(array, expected.numpy())


@everywhere
@pytest.mark.parametrize("output", ["latents", "code_rows"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_decode(book, quantizer, output, dtype):
    indices = torch.arange(300).reshape(3, 10, 10)
    rows = (quantizer.decode if output == "latents" else quantizer.get_codebook_entry)(indices.reshape(-1)).detach()
    expected = rows.reshape(3, 10, 10, -1).to(getattr(torch, dtype))
    for layout, wanted in [("channels_last", expected), (None, expected.movedim(-1, 1))]:
        decoded = book.decode(indices, layout=layout, dtype=dtype, output=output)
        assert decoded.dtype == expected.dtype
        assert torch.equal(decoded, wanted)
        # numpy has no bfloat16: float32 holds its values.
        array = book.decode(indices.numpy(), layout=layout, dtype=dtype, output=output)
        assert array.dtype == (np.float32 if dtype == "bfloat16" else np.dtype(dtype))
        assert np.array_equal(array, wanted.to(torch.float64).numpy())


@everywhere
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (np.float16, "float16"),
        (np.float64, "float64"),
        (np.dtype(np.float32), "float32"),
        (np.arange(2.0).dtype, "float64"),
        (torch.float16, "float16"),
        (torch.float64, "float64"),
        (torch.bfloat16, "bfloat16"),
    ],
)
def test_a_dtype_may_be_numpy_s_or_torch_s(book, dtype, name):
    indices = torch.arange(300)
    for array in (indices, indices.numpy()):
        expected = book.decode(array, dtype=name)
        for decoded in (book.decode(array, dtype=dtype), *book.decode_many([array], dtype=dtype)):
            assert decoded.dtype == expected.dtype
            assert (decoded == expected).all()


@everywhere
@pytest.mark.parametrize(
    "dtype",
    [
        *("int8", "FLOAT32", None, 16, float, object, np.int8, np.floating, np.longdouble, np.dtype("V4"), torch.int64),
        # Answers are of this machine's byte order.
        np.dtype(np.float32).newbyteorder(),
    ],
    ids=str,
)
def test_other_dtypes_are_rejected_by_name(book, dtype):
    names = "'float32', 'float16', 'bfloat16', 'float64'"
    with pytest.raises(ValueError, match=f"dtype must be one of {names} or numpy's or torch's type of that name, not"):
        book.decode(np.arange(3), dtype=dtype)


@everywhere
def test_encode_many_and_codebooks(book, quantizer, latents):
    (info,) = book.codebooks()
    assert (info.name, info.input_dim, info.output_dim) == ("book", 6, 5)
    arrays = [latents(n, 6, seed=n) for n in range(4)]
    indices = list(book.encode_many(iter(arrays), digest=info.digest))
    for array, got in zip(arrays, indices, strict=True):
        assert np.array_equal(got, quantizer.encode(torch.from_numpy(array)).numpy())
    for got, decoded in zip(indices, book.decode_many(indices, dtype="float64"), strict=True):
        assert np.array_equal(decoded, quantizer.decode(torch.from_numpy(got.astype(int))).detach().double().numpy())
    assert list(book.encode_many([])) == []


@everywhere
@pytest.mark.parametrize("latents", [np.zeros((6, 8, 6), np.float32), torch.zeros(6, 8, 6)])
def test_one_image_that_would_pass_for_sequences_is_warned_of(book, latents):
    with pytest.warns(UserWarning, match=r"\(6, 8, 6\) are read as \(b, s, C\); if they are one image") as caught:
        book.encode(latents)
    # The line of the caller, not one of ours; the asynchronous calls of this test are tasks, which have no caller.
    if isinstance(book, Client | Tokenizer):
        assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        book.encode(latents, layout="channels_last")
        book.encode(latents[:5])


@everywhere
@pytest.mark.parametrize(
    ("method", "array", "options", "error", "text"),
    [
        ("encode", [[0.0] * 6], {}, TypeError, "numpy array or a torch tensor"),
        ("encode", np.ma.masked_array(np.zeros((2, 6), np.float32)), {}, TypeError, "masked|Masked"),
        ("encode", torch.zeros(2, 6).to_sparse(), {}, TypeError, "dense torch tensor"),
        ("encode", np.zeros((2, 6), np.int32), {}, ValueError, "int32"),
        ("encode", np.zeros((2, 7), np.float32), {}, ValueError, "7 channels"),
        ("encode", np.zeros((2, 8, 8, 6), np.float32), {}, ValueError, r'6: should it be layout="channels_last"\?'),
        (
            "encode",
            np.zeros((2, 6, 8), np.float32),
            {"layout": "channels_last"},
            ValueError,
            r'6: should it be layout="channels_first"\?',
        ),
        ("encode", torch.zeros(2, 6, 8), {}, ValueError, r'6: should it be layout="channels_first"\?'),
        # Two axes have one layout only, and a guess that would not fit either is none.
        ("encode", np.zeros((6, 8), np.float32), {}, ValueError, "takes 6(?!:)"),
        ("encode", np.zeros((2, 8, 7), np.float32), {}, ValueError, "takes 6(?!:)"),
        (
            "encode",
            np.zeros((6, 8, 8), np.float32),
            {},
            ValueError,
            r"6: is the batch axis missing\? pass batched=False",
        ),
        ("encode", np.full((1, 6), np.nan, np.float32), {}, ValueError, r"latents\[0, 0\] is nan"),
        ("encode", np.zeros((2, 6), np.float32), {"layout": "nchw"}, ValueError, "nchw"),
        ("encode", np.zeros((2, 6), np.float32), {"codebook": "none"}, LookupError, "'none'"),
        ("decode", [1, 2], {}, TypeError, "numpy array or a torch tensor"),
        ("decode", torch.zeros(2, dtype=torch.int64, device="meta"), {}, TypeError, "dense torch tensor"),
        ("decode", np.zeros(2, np.float32), {}, ValueError, "float32"),
        ("decode", np.array([0, 300]), {}, ValueError, r"indices\[1\] is 300, not in \[0, 300\)"),
        ("decode", torch.tensor([-1]), {}, ValueError, r"indices\[0\] is -1"),
        ("decode", np.zeros(2, np.int64), {"dtype": "int8"}, ValueError, "int8"),
        ("decode", np.zeros(2, np.int64), {"output": "codes"}, ValueError, "codes"),
        *(
            ("decode", make([3, 1, 1 << 63, 300]), {}, ValueError, rf"^indices\[2\] is {1 << 63}, not in \[0, 300\)")
            for make in (lambda ids: np.array(ids, np.uint64), lambda ids: torch.tensor(ids, dtype=torch.uint64))
        ),
        ("decode", np.array([300, 1 << 63], np.uint64), {}, ValueError, r"^indices\[0\] is 300, not in \[0, 300\)"),
    ],
)
def test_rejections(book, method, array, options, error, text):
    with pytest.raises(error, match=text):
        getattr(book, method)(array, **options)
    with pytest.raises(error, match=text):
        list(getattr(book, f"{method}_many")([array], **options))


@everywhere
def test_pinning_and_closing(book):
    with pytest.raises(Exception, match=r"digest") as pinned:
        book.decode(np.arange(2), digest="0" * 64)
    book.close()
    book.close()
    with pytest.raises(Exception, match="closed") as closed:
        book.decode(np.arange(2))
    assert [type(caught.value).__name__ for caught in (pinned, closed)] == ["DigestMismatch", "Closed"]


@everywhere
@pytest.mark.parametrize("method", ["encode", "decode", "encode_many", "decode_many"])
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"codebook": 5}, TypeError, "codebook must be a string, not int"),
        ({"codebook": ""}, InvalidOption, "codebook must not be empty"),
        ({"digest": 5}, TypeError, "digest must be a string, not int"),
        ({"digest": ""}, InvalidOption, "digest must not be empty"),
        (
            {"digest": "abc"},
            InvalidOption,
            "digest must be the codebook's 64 lower-case hexadecimal digits, or the first 8 or more of them, not 'abc'",
        ),
        ({"timeout": -1}, InvalidOption, "timeout must be above 0 seconds, not -1"),
        ({"timeout": float("nan")}, InvalidOption, "timeout must be above 0 seconds, not nan"),
        ({"timeout": "soon"}, TypeError, "timeout must be a number of seconds, not 'soon'"),
        ({"num_quantizers": 0}, InvalidOption, "num_quantizers must be an integer of 1 or more, not 0"),
    ],
    ids=str,
)
def test_options_that_are_none_before_anything_is_read(book, method, options, error, text):
    with pytest.raises(error) as caught:
        getattr(book, method)(None, **options)
    assert str(caught.value) == text
    assert type(caught.value) is error


@everywhere
def test_the_time_that_a_list_may_take_is_checked(book):
    with pytest.raises(InvalidOption, match="timeout must be above 0 seconds, not 0"):
        book.codebooks(timeout=0)
    assert book.codebooks(timeout=float("inf"))
