"""Codebooks replaced on a real server while a job runs: no job has answers of two."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqserve_client import CodebookNotFound, DigestChanged, DigestMismatch
from vqserve_client.calls import ArrayCall, ArrayRequest
from vqserve_client.cli import main

pytestmark = pytest.mark.usefixtures("apart")


class Books:
    """A folder, its daemon, and the codebooks that were put there."""

    def __init__(self, folder: Path, put: Callable[..., Any], serve: Callable[..., Any]) -> None:
        self.folder = folder
        self._put = put
        self.first = self.put("book.safetensors", seed=1)
        self.daemon = serve(folder, "--device", "cpu")
        self.target = self.daemon.target

    def put(self, file: str, *, seed: int) -> Any:
        return self._put(self.folder / file, seed=seed)

    def swap(self, *, seed: int = 2) -> Any:
        """Replace the codebook; return the new one once it is live."""
        book = self.put("book.safetensors", seed=seed)
        self.daemon.rescan()
        return book


@pytest.fixture
def books(tmp_path: Path, put: Callable[..., Any], vqserved: Callable[..., Any]) -> Books:
    return Books(tmp_path / "books", put, vqserved)


@pytest.fixture
def after_answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Call a function when `count` replies of the server have been stored."""

    def make(count: int, act: Callable[[], object]) -> None:
        answers = 0
        plain = ArrayRequest.accept

        def accept(self: ArrayRequest, reply: bytes) -> None:
            nonlocal answers
            plain(self, reply)
            answers += 1
            if answers == count:
                act()

        monkeypatch.setattr(ArrayRequest, "accept", accept)

    return make


@pytest.mark.parametrize("rows", [7, 30_000], ids=["on a stream", "as calls"])
def test_encode_many_stops_at_the_swap(books: Books, connect: Any, latents: Any, rows: int) -> None:
    items = [latents(rows, 4, seed=seed) for seed in range(40)]

    def source() -> Iterator[np.ndarray]:
        for number, item in enumerate(items):
            if number == 20:
                books.swap()
            yield item

    client = connect(books.target)
    got: list[np.ndarray] = []
    with pytest.raises(DigestChanged, match=f"no longer has digest {books.first.digest}"):
        got.extend(client.encode_many(source()))
    # With a window of 4, the item that brings the swap is taken when 17 answers are out.
    assert 17 <= len(got) <= 20
    for answer, item in zip(got, items, strict=False):
        np.testing.assert_array_equal(answer, books.first.encode(item))
    # The next job follows the new codebook.
    last = books.swap(seed=4)
    for answer, item in zip(client.encode_many(items[:5]), items, strict=False):
        np.testing.assert_array_equal(answer, last.encode(item))


def test_decode_many_stops_at_the_swap(books: Books, connect: Any) -> None:
    def source() -> Iterator[np.ndarray]:
        for number in range(40):
            if number == 20:
                books.swap()
            yield np.arange(number, dtype=np.uint8)

    got: list[np.ndarray] = []
    with pytest.raises(DigestChanged):
        got.extend(connect(books.target).decode_many(source()))
    assert 17 <= len(got) <= 20
    for number, answer in enumerate(got):
        np.testing.assert_array_equal(answer, books.first.decode(np.arange(number, dtype=np.uint8)))


def test_an_array_in_pieces_is_all_of_one_codebook(
    books: Books, connect: Any, latents: Any, after_answers: Any
) -> None:
    client = connect(books.target, max_message_bytes=2048)
    array = latents(3000, 4)
    after_answers(3, books.swap)
    with pytest.raises(DigestChanged) as caught:
        client.encode(array)
    assert caught.value.codebook == "book"
    after = books.swap(seed=5)
    np.testing.assert_array_equal(client.encode(array), after.encode(array))


def test_a_swap_before_the_first_answer_is_followed(books: Books, connect: Any, latents: Any) -> None:
    client = connect(books.target, max_message_bytes=2048)
    array = latents(500, 4)
    client.encode(array)
    # The client remembers a list that is out of date.
    second = books.swap()
    np.testing.assert_array_equal(client.encode(array), second.encode(array))
    third = books.swap(seed=3)
    for answer in client.encode_many([array] * 9):
        np.testing.assert_array_equal(answer, third.encode(array))


def test_swaps_faster_than_a_call_are_followed_while_nothing_is_answered(
    books: Books, connect: Any, latents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(books.target)
    client.encode(latents(5, 4))
    made = ArrayCall.__init__
    seeds = iter((2, 3, 4))
    live = []

    def swapped_before_it_is_sent(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        seed = next(seeds, None)
        if seed is not None:
            live.append(books.swap(seed=seed))

    monkeypatch.setattr(ArrayCall, "__init__", swapped_before_it_is_sent)
    array = latents(50, 4)
    np.testing.assert_array_equal(client.encode(array), live[-1].encode(array))
    assert len(live) == 3


def test_a_pinned_digest_holds_across_the_swap(books: Books, connect: Any, latents: Any) -> None:
    pinned = connect(books.target, digest=books.first.digest)
    array = latents(9, 4)
    np.testing.assert_array_equal(pinned.encode(array), books.first.encode(array))
    second = books.swap()
    for _ in range(2):
        with pytest.raises(DigestMismatch, match=f"has digest {second.digest}, not '{books.first.digest}'"):
            pinned.encode(array)
    books.swap(seed=1)
    np.testing.assert_array_equal(pinned.encode(array), books.first.encode(array))


def test_a_job_on_a_version_goes_on_when_there_is_a_later_one(
    books: Books, connect: Any, latents: Any, tmp_path: Path
) -> None:
    one = books.put("many/1.safetensors", seed=6)
    books.daemon.rescan()
    items = [latents(7, 4, seed=seed) for seed in range(30)]

    def source() -> Iterator[np.ndarray]:
        for number, item in enumerate(items):
            if number == 10:
                books.put("many/2.safetensors", seed=7)
                books.daemon.rescan()
            yield item

    client = connect(books.target, codebook="many@1")
    for answer, item in zip(client.encode_many(source()), items, strict=True):
        np.testing.assert_array_equal(answer, one.encode(item))
    (books.folder / "many" / "1.safetensors").unlink()
    books.daemon.rescan()
    with pytest.raises(CodebookNotFound, match="many@1"):
        client.encode(items[0])


def test_no_name_is_the_latest_version_of_the_only_codebook(
    books: Books, connect: Any, latents: Any, tmp_path: Path
) -> None:
    (books.folder / "book.safetensors").unlink()
    for version in (9, 10):
        book = books.put(f"book/{version}.safetensors", seed=version)
    books.daemon.rescan()
    client = connect(books.target)
    array = latents(9, 4)
    np.testing.assert_array_equal(client.encode(array), book.encode(array))
    books.put("other.safetensors", seed=1)
    books.daemon.rescan()
    with pytest.raises(CodebookNotFound, match="choose one with codebook=: book, book@9, book@10, other"):
        connect(books.target).encode(array)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("command", ["encode", "decode"])
def test_a_file_is_all_of_one_codebook(
    books: Books,
    latents: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after_answers: Any,
    command: str,
    pinned: bool,
) -> None:
    monkeypatch.setenv("VQSERVE_TARGET", books.target)
    monkeypatch.delenv("VQSERVE_CODEBOOK", raising=False)
    monkeypatch.setattr("vqserve_client.conversion.PIECE_BYTES", 1024)
    source, out = tmp_path / "in.npy", tmp_path / "out.npy"
    np.save(source, latents(2000, 4) if command == "encode" else np.arange(2000, dtype=np.uint16) % 40)
    digest = books.first.digest
    arguments = [command, str(source), "-o", str(out), *(["--digest", digest] if pinned else [])]
    after_answers(5, books.swap)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("vqserve: error: ")
    assert len(error.splitlines()) == 1
    assert (f"not '{digest}'" if pinned else f"the codebook no longer has digest {digest}") in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["books", "in.npy"]
    if not pinned:
        assert main(arguments) == 0
        assert len(np.load(out)) == 2000


def test_many_threads_of_one_client_under_swaps(books: Books, latents: Any) -> None:
    """Short calls never fail; each answer is wholly one codebook's."""
    from vqserve_client import Client  # noqa: PLC0415

    array = latents(40, 4)
    known = {books.first.encode(array).tobytes()}
    strange: list[object] = []
    stop = threading.Event()

    def call(client: Client) -> None:
        while not stop.is_set():
            try:
                answer = client.encode(array).tobytes()
            except Exception as error:
                strange.append(error)
            else:
                if answer not in known:
                    strange.append(answer)

    with Client(books.target) as client:
        threads = [threading.Thread(target=call, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for seed in range(2, 14):
            book = books.put("book.safetensors", seed=seed)
            known.add(book.encode(array).tobytes())
            books.daemon.rescan()
        stop.set()
        for thread in threads:
            thread.join()
    assert strange == []
