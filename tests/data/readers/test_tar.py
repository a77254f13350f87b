"""Tars of samples, as webdataset writes them and reads them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, RawItem
from vqserve_data.readers import handle

SUFFIXES = pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz"])


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def write(path: Path, members: Sequence[tuple[str, bytes]], *, kind: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w:gz" if path.suffix != ".tar" else "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@SUFFIXES
def test_samples_of_webdataset(tmp_path: Path, files: Any, same: Any, draw: Any, suffix: str) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / f"s.{suffix}"
    arrays = {f"dir/{number:06}": draw(2, 3, seed=number) for number in range(5)}
    with webdataset.TarWriter(str(path)) as sink:
        for number, (key, array) in enumerate(arrays.items()):
            sink.write({"__key__": key, "npy": array, "txt": f"caption {number}", "cls": number, "json": {"n": number}})
    same(files(path).arrays(), {f"s/{key}": array for key, array in arrays.items()})
    items = files(path).read()
    assert items[3].fields == {"txt": b"caption 3", "cls": b"3", "json": b'{"n": 3}'}
    assert files(path, fields=False).read()[3].fields == {}
    # Its reader has the same samples.
    dataset = webdataset.WebDataset(str(path), shardshuffle=False).decode()
    assert [sample["__key__"] for sample in dataset] == list(arrays)


@SUFFIXES
def test_the_rule_of_keys_is_webdatasets(tmp_path: Path, files: Any, draw: Any, suffix: str) -> None:
    webdataset = pytest.importorskip("webdataset")
    data = npy(draw(2))
    names = [
        "a.b/x.npy",
        "a.b/y.seg.npy",
        "./z.NPY",
        "n.o.npy",
        "no_dot",
        ".begins.npy",
        "__meta__",
        "__m__.npy",
    ]
    path = tmp_path / f"s.{suffix}"
    write(path, [(name, data) for name in names])
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert [f"s/{key.removeprefix('./')}" for key in theirs] == list(files(path).arrays())


@SUFFIXES
def test_which_member_is_the_array(tmp_path: Path, files: Any, draw: Any, suffix: str) -> None:
    first, second = npy(draw(2)), npy(draw(3))
    path = tmp_path / f"s.{suffix}"
    write(
        path, [("0.a.npy", first), ("0.b.npy", second), ("1.a.npy", first), ("2.txt", b"x"), ("3.a.npy", b"no array")]
    )
    two, one, none, broken = files(path).read()
    assert "more than one member is an array (.npy): a.npy, b.npy" in two.reason
    assert one.key == "s/1"
    assert "no member is an array (.npy): txt" in none.reason
    assert "does not begin as a .npy" in broken.reason
    chosen, _, none, _ = files(path, members=("a.*",)).read()
    assert chosen.array.shape == (2,)
    assert chosen.fields == {"b.npy": second}
    assert "no member matches" in none.reason
    assert "is no .npy array" in files(path, members=("txt",)).read()[2].reason
    assert [entry.shape for entry in files(path, members=("a.*",)).entries()] == [(2,), (2,), None, None]


@SUFFIXES
def test_raw_samples(tmp_path: Path, files: Any, suffix: str) -> None:
    path = tmp_path / f"s.{suffix}"
    write(path, [("0.jpg", b"picture"), ("0.txt", b"text"), ("1.wav", b"sound"), ("../2.wav", b"")])
    first, second, bad = files(path, raw=True).read()
    assert first == RawItem("s/0", str(path), {"jpg": b"picture", "txt": b"text"})
    assert second.fields == {"wav": b"sound"}
    assert isinstance(bad, BadItem)
    assert files(path, raw=True).read(start=1)[0] == second


def test_samples_are_neighbours_with_one_name(tmp_path: Path, files: Any, draw: Any) -> None:
    """As in WebDataset: a name that comes again later is another sample, which the job refuses for its key."""
    data = npy(draw(2))
    write(tmp_path / "s.tar", [("a.npy", data), ("b.npy", data), ("a.txt", b"x"), ("c.npy", data), ("c.npy", data)])
    assert [entry.key for entry in files(tmp_path).entries()] == ["s/a", "s/b", "s/a", "s/c"]
    assert "two of its members have one extension" in files(tmp_path).bad()["s/c"]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_tar(tmp_path: Path, files: Any, draw: Any, kind: int) -> None:
    name = f"{'d' * 60}/{'e' * 60}/é"
    write(tmp_path / "s.tar", [(f"{name}.npy", npy(draw(2)))], kind=kind)
    assert list(files(tmp_path).arrays()) == [f"s/{name}"]


def test_what_is_no_regular_member_is_left_out(tmp_path: Path, files: Any, draw: Any) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind in (
            ("a.npy", tarfile.SYMTYPE),
            ("b.npy", tarfile.LNKTYPE),
            ("c.npy", tarfile.DIRTYPE),
            ("d.npy", b"S"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("e.npy")
        data = npy(draw(2))
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    assert list(files(tmp_path).arrays()) == ["s/e"]


def test_large_arrays_of_a_tar_are_read_by_parts(
    tmp_path: Path, files: Any, draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "WHOLE_BYTES", 0)
    array = draw(9, 5)
    write(tmp_path / "s.tar", [("a.npy", npy(array)), ("b.npy", npy(array + 1))])
    _, second = files(tmp_path).read()
    np.testing.assert_array_equal(second.array[2:3], array[2:3] + 1)


def test_a_cut_at_the_end_of_a_member_is_noticed(tmp_path: Path, files: Any, draw: Any) -> None:
    write(tmp_path / "s.tar", [("a.npy", npy(draw(2))), ("b.npy", npy(draw(2)))])
    data = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(data[: 2 * 1024])
    first, second, bad = files(tmp_path).read()
    assert (first.key, second.key, bad.key) == ("s/a", "s/b", "s")
    assert "has no end" in bad.reason
    (tmp_path / "s.tar").write_bytes(data[:1024])
    first, bad = files(tmp_path).read()
    assert "has no end" in bad.reason


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path, files: Any, draw: Any) -> None:
    write(tmp_path / "s.tar", [(f"{name}.npy", npy(draw(2))) for name in "abcd"], kind=tarfile.USTAR_FORMAT)
    data = bytearray((tmp_path / "s.tar").read_bytes())
    data[2048 + 10] ^= 1
    (tmp_path / "s.tar").write_bytes(data)
    first, bad = files(tmp_path).read()
    assert first.key == "s/a"
    assert bad.key == "s/b"
    assert "damaged" in bad.reason
    assert "byte 2048" in bad.reason


def header(size: bytes, kind: bytes = b"0") -> bytes:
    """A header whose size is any twelve bytes."""
    block = bytearray(tarfile.TarInfo("x.npy").tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S"])
@pytest.mark.parametrize(
    "size", [b"\xff" * 12, b"\xff" * 10 + b"\xf0\x00", b"\x80\0\0\0\x7f" + b"\xff" * 7, b"77777777777\0"]
)
@SUFFIXES
def test_sizes_that_lie(tmp_path: Path, files: Any, draw: Any, kind: bytes, size: bytes, suffix: str) -> None:
    """Negative ones made tarfile read for ever (CVE-2025-8194); huge ones must not be allocated."""
    path = tmp_path / f"s.{suffix}"
    write(path, [("a.npy", npy(draw(2)))])
    opener: Any = tarfile.bltn_open if suffix == "tar" else __import__("gzip").open
    with opener(path, "rb") as file:
        good = file.read()[:1024]
    with opener(path, "wb") as file:
        file.write(good + header(size, kind) + bytes(1024) + good + bytes(10240))
    records = files(path).read()
    assert records
    # A header of a sparse file has two sizes; one of -1 alone does no harm.
    assert isinstance(records[-1], BadItem) or kind == b"S"


@SUFFIXES
@pytest.mark.long
def test_damaged_tars(tmp_path: Path, draw: Any, damaged: Any, suffix: str) -> None:
    path = tmp_path / f"s.{suffix}"
    write(
        path,
        [("a/0.npy", npy(draw(2))), ("a/0.txt", b"x"), ("a/1.npy", npy(draw(3))), (f"{'l' * 120}.npy", npy(draw(1)))],
    )
    if suffix == "tar":
        # The rest is the padding of the last record; a tar may be cut there.
        path.write_bytes(path.read_bytes().rstrip(b"\0"))
    reasons = damaged(path, cuts=300, flips=300)
    assert not any("allocate" in reason or "MemoryError" in reason for reason in reasons), reasons


@pytest.mark.parametrize("content", [b"", b"text", bytes(10240)])
@SUFFIXES
def test_what_is_no_tar_is_bad(tmp_path: Path, files: Any, content: bytes, suffix: str) -> None:
    (tmp_path / f"s.{suffix}").write_bytes(content)
    assert list(files(tmp_path).bad()) == ["s"]
    with pytest.raises(FileError):
        files(tmp_path).entries()
