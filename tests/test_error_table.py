"""The same mistake has the same text everywhere: the SDK, `Tokenizer`, the command line, a raw stub.

docs/errors.md shows the table that `table` makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from vqserve import payload
from vqserve.errors import COMMAND_LINE, InvalidArgument, VqserveError
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1 import tokenizer_pb2_grpc
from vqserve_client import Client
from vqserve_client.cli import main
from vqserve_server import Tokenizer
from vqserve_server.quantizers import ResidualQuantizer, VectorQuantizerWithInputProjection

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
LAYOUTS = {"channels_first": pb.LAYOUT_CHANNELS_FIRST, "channels_last": pb.LAYOUT_CHANNELS_LAST}
ALL = frozenset({"sdk", "tokenizer", "command line", "stub"})
IN_PYTHON = frozenset({"sdk", "tokenizer"})


@dataclass(frozen=True)
class Mistake:
    """A mistake, and through what it can be made.

    Attributes:
        what: in the table.
        verb: "encode" or "decode".
        array: what is given.
        options: of the call.
        ways: where it can be made; a command line takes no list, and argparse knows the layouts.
        says: the whole text in Python, without the call's part.
    """

    what: str
    verb: str
    array: Any
    says: str
    options: dict[str, Any] = field(default_factory=dict)
    ways: frozenset[str] = ALL


def _with(shape: tuple[int, ...], position: tuple[int, ...], value: float) -> np.ndarray:
    array = np.zeros(shape, np.float32)
    array[position] = value
    return array


def _huge() -> np.ndarray:
    array = np.zeros((2, 6, 3, 3), np.float32)
    array[1, :, 2, 0] = 3.4e38
    return array


F32, BOOK, AUDIO = np.float32, {"codebook": "book"}, {"codebook": "audio"}
MISTAKES = (
    Mistake(
        "channels in the other place",
        "encode",
        np.zeros((2, 8, 8, 6), F32),
        "latents of shape (2, 8, 8, 6) have 8 channels in layout channels_first, the codebook takes 6: "
        'should it be layout="channels_last"?',
        BOOK,
    ),
    Mistake(
        "one image without a batch axis",
        "encode",
        np.zeros((6, 8, 9), F32),
        "latents of shape (6, 8, 9) have 9 channels in layout channels_last, the codebook takes 6: "
        "is the batch axis missing? pass batched=False",
        BOOK,
    ),
    Mistake(
        "another model's latents",
        "encode",
        np.zeros((2, 7), F32),
        "latents of shape (2, 7) have 7 channels in layout channels_last, the codebook takes 6",
        BOOK,
    ),
    Mistake("one axis only", "encode", np.zeros(6, F32), "latents must have 2 to 5 axes, not 1", BOOK),
    Mistake(
        "channels first on two axes",
        "encode",
        np.zeros((2, 6), F32),
        "latents of 2 axes are (n, C): channels_first needs at least 3 axes",
        {**BOOK, "layout": "channels_first"},
    ),
    Mistake(
        "a layout that is none",
        "encode",
        np.zeros((2, 6), F32),
        "layout must be one of 'channels_first', 'channels_last' or None, not 'nchw'",
        {**BOOK, "layout": "nchw"},
        IN_PYTHON,
    ),
    Mistake(
        "a list",
        "encode",
        [[0.0] * 6],
        "latents must be a numpy array or a torch tensor, not list: convert it with numpy.asarray",
        BOOK,
        IN_PYTHON,
    ),
    Mistake(
        "indices to encode",
        "encode",
        np.zeros((2, 6), np.int64),
        "latents must be float16, bfloat16, float32 or float64, not int64: are they indices? use decode",
        BOOK,
    ),
    Mistake(
        "NaN",
        "encode",
        _with((2, 6), (1, 3), np.nan),
        "latents[1, 3] is nan: no code stands for it, find out where it comes from",
        BOOK,
    ),
    Mistake(
        "latents beyond float32 on their way",
        "encode",
        _huge(),
        "the projection of token [1, 2, 0] leaves the range of float32: scale the latents down",
        BOOK,
    ),
    Mistake(
        "latents to decode",
        "decode",
        np.zeros((2, 3), F32),
        "indices must be integers, not float32: are they latents? use encode",
        BOOK,
    ),
    Mistake(
        "another codebook's indices",
        "decode",
        np.array([[0, 1], [300, 2]]),
        "indices[1, 0] is 300, not in [0, 300): are the indices from this codebook?",
        BOOK,
    ),
    Mistake(
        "a padding index",
        "decode",
        np.array([5, -1]),
        "indices[1] is -1, not in [0, 300): are the indices from this codebook?",
        BOOK,
    ),
    Mistake("too many axes", "decode", np.zeros((1,) * 5, np.uint16), "indices must have 1 to 4 axes, not 5", BOOK),
    Mistake(
        "a dtype that is too narrow",
        "decode",
        np.zeros((2, 2), np.uint16),
        "indices[0, 0] decodes to a value beyond the range of float16: use a wider dtype",
        {**BOOK, "dtype": "float16"},
    ),
    Mistake(
        "more stages than there are",
        "encode",
        np.zeros((4, 6), F32),
        "num_quantizers must be an integer in [1, 5], not 6",
        {**AUDIO, "num_quantizers": 6},
    ),
    Mistake(
        "fewer stages than there are",
        "decode",
        np.zeros((4, 2), np.uint16),
        "indices of shape (4, 2) have 2 for a token in layout channels_last, expected 5: "
        "pass num_quantizers=2 to decode that many",
        AUDIO,
    ),
    Mistake(
        "EnCodec's order of axes",
        "decode",
        np.zeros((5, 2, 9), np.uint16),
        "indices of shape (5, 2, 9) have 2 for a token in layout channels_first, expected 5: "
        "are they (n_q, b, ...)? swapaxes(0, 1) first",
        {**AUDIO, "layout": "channels_first"},
    ),
    Mistake(
        "a name that is not served",
        "encode",
        np.zeros((2, 6), F32),
        "no codebook 'demo' is served, only: audio, book",
        {"codebook": "demo"},
        ALL - {"tokenizer"},
    ),
    Mistake(
        "no name where several are served",
        "encode",
        np.zeros((2, 6), F32),
        "2 codebooks are served, choose one with codebook=: audio, book",
        {},
        ALL - {"tokenizer"},
    ),
    Mistake(
        "a codebook that was replaced",
        "decode",
        np.zeros(2, np.uint16),
        "codebook 'book' has digest DIGEST, not '" + "0" * 64 + "': "
        "pin that digest with digest=, or serve the old codebook again",
        {**BOOK, "digest": "0" * 64},
    ),
)


def table() -> str:
    """Return the table of the page, as Markdown."""
    rows = [
        f"| {mistake.what} | `{mistake.says.replace('DIGEST', '5f0c...').replace('0' * 64, 'a1b2...')}` |"
        for mistake in MISTAKES
    ]
    return "\n".join(("| Mistake | Text |", "|---|---|", *rows))


@pytest.fixture(scope="module")
def books() -> dict[str, Tokenizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        book = VectorQuantizerWithInputProjection(input_dim=6, n_codes=300, codebook_dim=4, beta=1.0)
        audio = ResidualQuantizer(5, 300, 6)
    with torch.no_grad():
        book.proj_in.weight.fill_(1)
        book.embedding.weight[0] = 1e5
    return {
        "book": Tokenizer(book, name="book", device="cpu"),
        "audio": Tokenizer(audio, name="audio", device="cpu"),
    }


@pytest.fixture
def target(serving: Callable[..., Any], books: dict[str, Tokenizer]) -> str:
    return serving(*books.values()).target


def by_client(mistake: Mistake, client: Any) -> VqserveError:
    with pytest.raises(VqserveError) as caught:
        getattr(client, mistake.verb)(mistake.array, **mistake.options)
    return caught.value


def by_command(
    mistake: Mistake, target: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    monkeypatch.delenv("VQSERVE_CODEBOOK", raising=False)
    np.save(folder / "in.npy", mistake.array)
    flags = [word for name, value in mistake.options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    arguments = [mistake.verb, str(folder / "in.npy"), "-o", str(folder / "out.npy"), "--target", target, *flags]
    assert main(arguments) == 1
    return capsys.readouterr().err


def by_stub(mistake: Mistake, target: str) -> str:
    array, options = mistake.array, dict(mistake.options)
    dtype = payload.dtype_of(array)
    fields: dict[str, Any] = {"dtype": dtype, "shape": array.shape, "codebook": options.get("codebook", "")}
    fields["expected_digest"] = options.get("digest", "")
    fields["num_quantizers"] = options.get("num_quantizers", 0)
    fields["layout"] = LAYOUTS.get(options.get("layout", ""), pb.LAYOUT_UNSPECIFIED)
    data = payload.to_bytes(array, dtype)
    request: Any
    if mistake.verb == "encode":
        request = pb.EncodeRequest(latents=data, **fields)
    else:
        fields["latent_dtype"] = payload.dtype_of_name(options.get("dtype", "float32"))
        request = pb.DecodeRequest(indices=data, **fields)
    with grpc.insecure_channel(target) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            getattr(stub, mistake.verb.capitalize())(request, timeout=30)
    return caught.value.details()


def without_call(error: VqserveError) -> str:
    return str(error.with_fields(target=None, codebook=None, request_id=None, item=None))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_the_same_words_everywhere(
    mistake: Mistake,
    target: str,
    books: dict[str, Tokenizer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    says = mistake.says.replace("DIGEST", books["book"].digest)
    with Client(target) as client:
        remote = by_client(mistake, client)
        assert without_call(remote) == says
        if "tokenizer" in mistake.ways:
            local = by_client(mistake, books[mistake.options["codebook"]])
            assert without_call(local) == says
            assert type(local) is type(remote)
            for name in ("array", "position", "option", "suggestion", "digest"):
                assert getattr(local, name) == getattr(remote, name), name
            with pytest.raises(type(remote)) as caught:
                list(getattr(client, f"{mistake.verb}_many")([mistake.array], **mistake.options))
            assert without_call(caught.value) == says
    if "stub" in mistake.ways:
        assert by_stub(mistake, target) == says
    if "command line" in mistake.ways:
        err = by_command(mistake, target, tmp_path, capsys, monkeypatch)
        file = f"{tmp_path / 'in.npy'}: " if isinstance(remote, InvalidArgument) and remote.array is not None else ""
        assert err.startswith(f"vqserve: error: {file}{remote.statement(COMMAND_LINE)}")


@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_the_array_of_many(target: str, books: dict[str, Tokenizer], verb: str) -> None:
    good, bad = (
        (np.zeros((2, 6), F32), np.zeros((2, 7), F32)) if verb == "encode" else (np.zeros(2, int), np.array([999]))
    )
    with Client(target, codebook="book") as client:
        for one in (client, books["book"]):
            for wrong in (bad, [1]):
                results = getattr(one, f"{verb}_many")([good, good, wrong])
                assert len([next(results), next(results)]) == 2
                with pytest.raises(InvalidArgument, match="array 2, counting from 0") as caught:
                    next(results)
                assert caught.value.item == 2


def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text()
