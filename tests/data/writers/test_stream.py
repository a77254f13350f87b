"""`vqserve_data.stream`: the streams of tokens that training maps."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pytest

from vqserve_data.errors import FileError
from vqserve_data.stream import TokenStream
from vqserve_data.writers import writer_of


@pytest.fixture
def items():
    rng = np.random.default_rng(0)
    shapes = [(4, 4), (2, 8), (), (0, 3), (1, 2, 3), (5,), (4, 4)]
    return {f"dir/ü{i}": rng.integers(0, 60_000, shape, np.uint16) for i, shape in enumerate(shapes)}


@pytest.fixture
def folder(tmp_path, items):
    """Two shards, of 3 items and of 4."""
    keys = list(items)
    for number, part in enumerate((keys[:3], keys[3:])):
        shard = writer_of("stream").shard(tmp_path, number, {"digest": "ab"})
        for key in part:
            shard.add(key, items[key], {})
        shard.close()
    return tmp_path


def test_a_folder_has_the_items_of_all_shards_in_order(folder, items):
    stream = TokenStream(folder)
    arrays = list(items.values())
    assert len(stream) == 7
    assert stream.keys == list(items)
    assert [len(shard) for shard in stream.shards] == [3, 4]
    assert stream.metadata == {"digest": "ab"}
    assert repr(stream) == f"TokenStream({str(folder)!r}, 7 items in 2 shards)"
    for got in (list(stream), [stream[i] for i in range(7)], [stream[i] for i in range(-7, 0)], stream[:], stream[0:7]):
        assert [each.shape for each in got] == [each.shape for each in arrays]
        assert all((one == other).all() for one, other in zip(got, arrays, strict=True))
    assert [each.shape for each in stream[5:2:-1]] == [(5,), (1, 2, 3), (0, 3)]
    for position in (7, -8):
        with pytest.raises(IndexError, match=f"there is no item {position}: there are 7"):
            stream[position]


def test_one_shard_is_flat_and_mapped(folder, items):
    stream = TokenStream(folder / "shard-00001.bin")
    arrays = list(items.values())[3:]
    assert stream.tokens.dtype == np.uint16
    assert stream.tokens.tolist() == np.concatenate([array.reshape(-1) for array in arrays]).tolist()
    assert stream.offsets.tolist() == [0, 0, 6, 11, 27]
    assert isinstance(stream.tokens.base, np.memmap)
    assert np.shares_memory(stream[1], stream.tokens)
    with pytest.raises(ValueError, match=r"has 2 shards: use the tokens of each of \.shards"):
        TokenStream(folder).tokens  # noqa: B018
    with pytest.raises(ValueError, match=r"has 2 shards: use the offsets of each of \.shards"):
        TokenStream(folder).offsets  # noqa: B018


def test_a_pickled_stream_is_its_path(folder, items):
    text = pickle.dumps(TokenStream(folder))
    assert len(text) < 1000
    again = pickle.loads(text)  # noqa: S301
    assert (again[0] == items["dir/ü0"]).all()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(len, (again,)) == 7


def test_what_is_no_stream_is_an_error(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileError, match=r"has no shard-\*\.bin: it is no stream"):
        TokenStream(empty)
    with pytest.raises(FileError, match=r"shard-00000\.bin: there is no such file or folder"):
        TokenStream(empty / "shard-00000.bin")
    tokens, index = folder / "shard-00000.bin", folder / "shard-00000.index.npz"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(FileError, match=r"has 65 bytes, and its index says 66: it is incomplete"):
        TokenStream(folder)
    index.write_bytes(index.read_bytes()[:-30])
    with pytest.raises(FileError, match="is no index of a stream of tokens"):
        TokenStream(folder)
    np.savez(index, offsets=np.zeros(0))
    with pytest.raises(FileError, match="is no index of a stream of tokens"):
        TokenStream(folder)
    index.unlink()
    with pytest.raises(FileError, match=r"shard-00000\.index\.npz: there is no such file"):
        TokenStream(tokens)


def test_reading_needs_numpy_only(folder):
    program = (
        "import sys; from vqserve_data.stream import TokenStream; print(len(TokenStream(sys.argv[1])));"
        "print({'grpc', 'torch', 'pyarrow', 'google', 'vqserve_client'} & {name.split('.')[0] for name in sys.modules})"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert ended.stdout == "7\nset()\n"
