"""Data sets as rows: what is read, in which form, what is left out, and where an error is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqserve.errors import InvalidOption, NonFiniteLatents, TokenBeyondRange
from vqserve_tools.latents import dataset, items
from vqserve_tools.latents.arguments import one_array, title_of
from vqserve_tools.latents.dataset import DataSet
from vqserve_tools.latents.opening import Sources
from vqserve_tools.latents.options import SourceOptions
from vqserve_tools.latents.sample import Reservoir, StreamedRows, draw_sample

DIM = 3


def latents(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def read(folder: Path, layout: str | None = None, *, channels: int | None = None, **options: Any) -> DataSet:
    return Sources([str(folder)], SourceOptions(**options)).data_set(layout, channels=channels)


def rows_of(data: DataSet) -> np.ndarray:
    return np.concatenate([chunk.rows for chunk in data.chunks()])


def grids(folder: Path) -> np.ndarray:
    """Write items of many ranks, shapes, dtypes and formats; return their rows in order."""
    folder.mkdir()
    arrays = {
        "a": latents(7, DIM, dtype="float16"),
        "b": latents(2, 5, DIM, seed=1),
        "c": latents(1, DIM, 4, 6, dtype="float64", seed=2),
        "d": latents(2, DIM, 2, 2, 2, seed=3),
    }
    np.save(folder / "a.npy", arrays["a"])
    np.savez(folder / "b.npz", b=arrays["b"], c=arrays["c"])
    np.save(folder / "d.npy", np.asfortranarray(arrays["d"]))
    axes = {2: -1, 3: -1, 4: 1, 5: 1}
    return np.concatenate([np.moveaxis(z, axes[z.ndim], -1).reshape(-1, DIM).astype("f4") for z in arrays.values()])


@pytest.mark.parametrize("part_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("chunk_rows", [1, 10, 1 << 16])
def test_rows_are_those_of_the_items_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int, chunk_rows: int
) -> None:
    monkeypatch.setattr(items, "_PART_BYTES", part_bytes)
    monkeypatch.setattr(dataset, "_CHUNK_ROWS", chunk_rows)
    expected = grids(tmp_path / "z")
    data = read(tmp_path / "z")
    np.testing.assert_array_equal(rows_of(data), expected)
    assert (data.dim, data.contents.items, data.contents.tokens, data.contents.bad) == (DIM, 4, len(expected), 0)
    origins = np.concatenate([chunk.origins() for chunk in data.chunks()])
    lengths = [7, 10, 24, 16]
    np.testing.assert_array_equal(origins[:, 0], np.repeat(range(4), lengths))
    np.testing.assert_array_equal(origins[:, 1], np.repeat([0, 0, 1, 0, 0, 1], [7, 5, 5, 24, 8, 8]))
    np.testing.assert_array_equal(origins[:, 2], np.concatenate([np.arange(length) for length in lengths]))
    streamed = StreamedRows(data)
    np.testing.assert_array_equal(np.concatenate(list(streamed.chunks(6))), expected)
    assert max(map(len, streamed.chunks(6))) <= 6


def test_items_without_a_batch_axis(tmp_path: Path) -> None:
    image, sequence, one = latents(DIM, 4, 5), latents(6, DIM), latents(DIM)
    np.savez(tmp_path / "z.npz", image=image, sequence=sequence, one=one)
    data = read(tmp_path, unbatched=True)
    rows = [image.reshape(DIM, -1).T, sequence, one[None]]
    # Three axes with the batch axis are channels last by default.
    np.testing.assert_array_equal(rows_of(data), np.concatenate(rows))
    assert data.contents.layouts == {"channels_first", "channels_last"}
    origins = np.concatenate([chunk.origins() for chunk in data.chunks()])
    # Each item is one entry.
    assert not origins[:, 1].any()


def test_float64_rows_stay_float64_if_asked(tmp_path: Path) -> None:
    np.savez(tmp_path / "z.npz", a=latents(4, DIM), b=latents(4, DIM, dtype="float64"), c=latents(4, DIM))
    sources = Sources([str(tmp_path)])
    assert [chunk.rows.dtype for chunk in sources.data_set().chunks()] == [np.float32]
    dtypes = [chunk.rows.dtype for chunk in sources.data_set(keeps_float64=True).chunks()]
    assert dtypes == [np.float32, np.float64, np.float32]
    sample = draw_sample(sources.data_set(keeps_float64=True), seed=0)
    np.testing.assert_array_equal(sample.take(np.arange(4, 8)), latents(4, DIM, dtype="float64"))


def damaged(folder: Path) -> dict[str, str]:
    """Write items of which some cannot be used; return these with what is wrong."""
    folder.mkdir()
    for number in range(6):
        np.save(folder / f"good{number}.npy", latents(2, DIM, 2, 2))
    bad = latents(2, DIM, 4, 4)
    bad[1, 2, 3, 0] = np.inf
    np.save(folder / "a-infinite.npy", bad)
    np.save(folder / "channels.npy", latents(4, DIM + 1))
    np.save(folder / "empty.npy", latents(0, DIM))
    np.savez(folder / "integers.npz", ids=np.arange(4), z=latents(1, DIM))
    np.save(folder / "scalar.npy", np.float32(1))
    (folder / "noise.npy").write_bytes(b"noise")
    return {
        "a-infinite": "latents[1, 2, 3, 0] is inf",
        "channels": "have 4 channels in layout channels_last, and others have 3",
        "empty": "hold no tokens",
        "integers/ids": "not int64",
        "noise": "it does not begin as a .npy file does",
        "scalar": "2 to 5 axes, not 0",
    }


@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_items_that_cannot_be_used_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(items, "_PART_BYTES", part_bytes)
    expected = damaged(tmp_path / "z")
    data = read(tmp_path / "z", max_errors=6)
    rows = rows_of(data)
    assert np.isfinite(rows).all()
    assert rows.shape == (6 * 8 + 1, DIM)
    assert [bad.key for bad in data.contents.named] == list(expected)
    for bad in data.contents.named:
        assert expected[bad.key] in bad.reason
    with pytest.raises(
        InvalidOption, match=r"^6 items cannot be used, and max_errors is 5\. The last: .*item scalar: "
    ):
        rows_of(read(tmp_path / "z", max_errors=5))


def test_an_odd_first_item_does_not_decide_for_the_others(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", latents(9, DIM + 1))
    for number in range(1, 4):
        np.save(tmp_path / f"{number}.npy", latents(2, DIM))
    data = read(tmp_path)
    assert rows_of(data).shape == (6, DIM)
    assert [bad.key for bad in data.contents.named] == ["0"]


def test_more_bad_items_than_good_ones_are_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", latents(2, DIM))
    for number in range(2):
        np.save(tmp_path / f"nan{number}.npy", np.full((2, DIM), np.nan, np.float32))
    with pytest.raises(InvalidOption, match=r"2 of 3 items cannot be used\. The first: .*item nan0: latents\[0, 0\]"):
        rows_of(read(tmp_path))
    with pytest.raises(InvalidOption, match="3 of 3 items cannot be used"):
        rows_of(read(tmp_path, channels=DIM + 1))


def test_layouts_hold_for_all_items(tmp_path: Path) -> None:
    np.savez(tmp_path / "z.npz", a=latents(2, 4, DIM), b=latents(2, 3, 5, DIM))
    assert rows_of(read(tmp_path, "channels_last")).shape == (8 + 30, DIM)
    with pytest.raises(InvalidOption, match="layout must be one of"):
        read(tmp_path, "nchw")


def test_which_arrays_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "z.npz", mean=latents(4, DIM), mean_2=latents(4, DIM), labels=np.arange(4))
    data = read(tmp_path, member=("mean*",))
    assert rows_of(data).shape == (8, DIM)
    assert data.contents.bad == 0
    with pytest.raises(InvalidOption, match="no member matches std"):
        rows_of(read(tmp_path, member=("std",)))


def test_tables_and_archives(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq  # noqa: PLC0415

    z = latents(6, 2, DIM)
    table = pa.table({"id": [f"k{n}" for n in range(6)], "z": z.tolist(), "text": ["x"] * 6})
    pq.write_table(table, tmp_path / "z.parquet")
    data = read(tmp_path, unbatched=True, column="z", key="id")
    np.testing.assert_array_equal(rows_of(data), z.reshape(-1, DIM))
    assert data.contents.first is not None
    assert data.contents.first[0] == "z/k0"


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_about_a_row_names_the_item_and_the_token(tmp_path: Path, stream: bool) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", latents(2, DIM, 4, 5, seed=number))
    data = read(tmp_path)
    rows = StreamedRows(data) if stream else draw_sample(data, seed=0)
    chunk = next(iter(rows.chunks(100)))
    # Row 25 of item 1.
    assert np.array_equal(chunk[65], latents(2, DIM, 4, 5, seed=1)[1, :, 1, 0])
    with pytest.raises(TokenBeyondRange) as caught, rows.placed(0):
        raise TokenBeyondRange("the projection of {where} is too large", array="tokens", row=65)
    assert caught.value.message == f"{tmp_path / '1.npy'}, item 1: the projection of token [1, 1, 0] is too large"
    with pytest.raises(NonFiniteLatents), rows.placed(0):
        raise NonFiniteLatents("no row is named")


def test_sources_that_change_while_they_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", latents(4, DIM))
    np.save(tmp_path / "1.npy", latents(4, DIM))
    rows = StreamedRows(read(tmp_path))
    assert len(rows) == 8
    np.save(tmp_path / "1.npy", latents(3, DIM))
    with pytest.raises(InvalidOption, match="changed while they were read"):
        list(rows.chunks(100))


def test_a_sample_that_holds_all_rows_is_the_stream(tmp_path: Path) -> None:
    for number in range(50):
        np.save(tmp_path / f"{number:02}.npy", latents(1 + number % 3, DIM, seed=number))
    rows = StreamedRows(read(tmp_path))
    sample = draw_sample(read(tmp_path), seed=1)
    assert len(sample) == len(rows)
    np.testing.assert_array_equal(np.concatenate(list(sample.chunks(7))), np.concatenate(list(rows.chunks(7))))
    described = rows.describe()
    assert (described.shape, described.dtype, described.layout) == (None, "float32", "channels_last")
    assert described.data_set == sample.describe().data_set


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_a_reservoir_is_a_sample_without_replacement_whatever_the_chunks(chunk: int) -> None:
    def draw(chunk: int, seed: int = 0) -> np.ndarray:
        reservoir = Reservoir(50, 1, np.random.default_rng(seed))
        for start in range(0, 1000, chunk):
            numbers = np.arange(start, min(start + chunk, 1000))
            reservoir.add(numbers[:, None].astype(np.float32), np.stack([numbers] * 3, axis=1))
        assert reservoir.seen == 1000
        np.testing.assert_array_equal(reservoir.rows[:, 0], reservoir.origins[:, 0])
        return reservoir.origins[:, 0].copy()

    sample = draw(chunk)
    assert len(set(sample.tolist())) == 50
    np.testing.assert_array_equal(sample, draw(1000))
    assert not np.array_equal(sample, draw(1000, seed=1))


def test_a_reservoir_is_uniform() -> None:
    counts, draws = np.zeros(40), 4000
    numbers = np.arange(40)
    for seed in range(draws):
        reservoir = Reservoir(10, 1, np.random.default_rng(seed))
        for part in np.split(numbers, [3, 12, 30]):
            reservoir.add(part[:, None].astype(np.float32), np.stack([part] * 3, axis=1))
        counts[reservoir.origins[:, 0]] += 1
    expected, deviation = draws / 4, np.sqrt(draws * 0.25 * 0.75)
    assert np.abs(counts - expected).max() < 4.5 * deviation


def test_one_npy_file_is_no_data_set(tmp_path: Path) -> None:
    path = tmp_path / "z.npy"
    usual = SourceOptions()
    for content in ("z.npy", "Z.NPY", "latents", "[1].npy"):
        np.save(tmp_path / "x.npy", latents(2, DIM))
        (tmp_path / "x.npy").rename(tmp_path / content)
        assert one_array([str(tmp_path / content)], usual) == tmp_path / content
    assert one_array([str(tmp_path / "none.npy")], SourceOptions(max_errors=3)) == tmp_path / "none.npy"
    (tmp_path / "folder.npy").mkdir()
    for names in (
        [str(path)] * 2,
        [str(tmp_path)],
        [f"{tmp_path}/*.npy"],
        ["s3://b/z.npy"],
        [f"{tmp_path}/folder.npy"],
    ):
        assert one_array(names, usual) is None
    for options in ({"unbatched": True}, {"sample_rows": 5}, {"key": "k"}):
        assert one_array([str(path)], SourceOptions(**options)) is None


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("/home/me/latents", "latents"),
        ("a/*.npy", "*.npy"),
        ("s3://bucket/a/z.npy", "s3://bucket/a/z.npy"),
        ("https://me:word@host:80/z.npy?token=1", "https://host/z.npy"),
        ("file:///home/me/latents", "latents"),
        ("simplecache::https://me:word@host/z.npy", "simplecache::https://host/z.npy"),
        ("zip://a/z.npy::s3://bucket/b.zip", "zip://a/z.npy::s3://bucket/b.zip"),
    ],
)
def test_titles_have_no_secrets_and_no_folders_of_this_machine(source: str, title: str) -> None:
    assert title_of(source) == title


def test_options_are_checked() -> None:
    make: Callable[..., Any] = SourceOptions
    for options in ({"sample_rows": 0}, {"max_errors": -1}):
        with pytest.raises(InvalidOption, match="must be at least"):
            make(**options)
