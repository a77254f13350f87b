"""Statistics in codebook files: written and read, outside the digest, and damage is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vqserve.errors import CodebookFileError
from vqserve_server.code_groups import CodeGroups
from vqserve_server.codebooks import codebook_digest, load_codebook, save_codebook
from vqserve_server.codebooks.statistics import StatisticsTally, code_groups
from vqserve_server.quantizers import ResidualQuantizer, VectorQuantizer
from vqserve_server.tokenizer import Tokenizer


def measured(quantizer, rows=200):
    """Statistics of random latents, by the tokenizer."""
    tokenizer = Tokenizer(quantizer)
    latents = np.random.default_rng(0).standard_normal((rows, quantizer.input_dim)).astype(np.float32)
    indices = tokenizer.encode_rows(latents).reshape(rows, -1)
    tally = StatisticsTally(tokenizer.code_groups)
    tally.add(indices, None if tokenizer.errors is None else tokenizer.errors.of(latents, indices))
    return tally.statistics("random"), indices


# Writing and reading.


def test_statistics_of_every_kind_come_back(tmp_path, quantizer):
    statistics, indices = measured(quantizer)
    path = tmp_path / "c.safetensors"
    digest = save_codebook(quantizer, path, provenance={"run": 7}, statistics=statistics)
    codebook = load_codebook(path)
    assert codebook.digest == digest == codebook_digest(quantizer)
    assert codebook.provenance == {"run": 7}
    read = codebook.statistics
    assert (read.rows, read.error, read.source) == (200, statistics.error, "random")
    assert (read.error is None) == (not quantizer.is_approximate)
    for number, stage in enumerate(code_groups(quantizer).stages):
        counts = np.bincount(indices[:, number][indices[:, number] < stage.stop - stage.start], minlength=1)
        expected = np.zeros(stage.stop - stage.start, np.int64)
        expected[: counts.size] = counts
        assert np.array_equal(read.usage[stage], expected)
        assert read.usage[stage.stop] == 200 - expected.sum()


def test_statistics_change_the_format_and_nothing_else(tmp_path, quantizer):
    plain, full = tmp_path / "plain.safetensors", tmp_path / "full.safetensors"
    save_codebook(quantizer, plain)
    save_codebook(quantizer, full, statistics=measured(quantizer)[0])
    with safe_open(plain, framework="numpy") as file:
        before = file.metadata()
    with safe_open(full, framework="numpy") as file:
        after = file.metadata()
    assert before["vqserve.format"] == "1"
    assert after.pop("vqserve.format") == "2"
    after.pop("vqserve.statistics")
    assert after == {name: text for name, text in before.items() if name != "vqserve.format"}
    arrays = load_file(full)
    arrays.pop("statistics.usage")
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: array.tobytes() for name, array in load_file(plain).items()
    }


def test_files_without_statistics_have_none(tmp_path, quantizer):
    save_codebook(quantizer, tmp_path / "c.safetensors")
    assert load_codebook(tmp_path / "c.safetensors").statistics is None


def test_the_tokenizer_has_the_statistics_of_its_file(tmp_path):
    quantizer = VectorQuantizer(12, 3)
    statistics, _ = measured(quantizer)
    save_codebook(quantizer, tmp_path / "c.safetensors", statistics=statistics)
    tokenizer = Tokenizer.load(tmp_path / "c.safetensors")
    assert tokenizer.statistics.rows == 200
    assert tokenizer.code_groups == code_groups(quantizer)


# Counters.


def test_a_huge_codebook_has_a_bounded_number_of_counters():
    groups = CodeGroups((1 << 32,))
    assert groups.codes_per_group == 1 << 12
    assert groups.total == (1 << 20) + 1
    places = groups.places(np.array([[0], [4095], [4096], [(1 << 32) - 1], [1 << 32], [-1]]))
    assert places[:, 0].tolist() == [0, 0, 1, (1 << 20) - 1, 1 << 20, 1 << 20]


def test_usual_codebooks_have_a_counter_for_each_code():
    for sizes in ((262144,), (2048,) * 32, (4096, *(1024,) * 9)):
        assert CodeGroups(sizes).codes_per_group == 1


@given(
    sizes=st.lists(st.integers(1, 1 << 32), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
)
def test_every_index_has_a_counter_of_its_own_stage(sizes, seed):
    groups = CodeGroups(tuple(sizes))
    assert groups.total <= (1 << 20) + 2 * len(sizes)
    assert groups.stages[0].start == 0
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.integers(0, size, 50) for size in sizes], axis=1)
    indices[0] = [size - 1 for size in sizes]
    for count in (1, len(sizes)):
        places = groups.places(indices[:, :count])
        for number, stage in enumerate(groups.stages[:count]):
            own = places[:, number]
            assert ((own >= stage.start) & (own < stage.stop)).all()
            assert np.array_equal(own - stage.start, indices[:, number] // groups.codes_per_group)


# Damage.


@pytest.fixture
def path(tmp_path):
    quantizer = ResidualQuantizer(2, 6, 3)
    path = tmp_path / "c.safetensors"
    save_codebook(quantizer, path, statistics=measured(quantizer)[0])
    return path


def rewrite(path, *, usage=None, drop=(), raw=None, **fields):
    with safe_open(path, framework="numpy") as file:
        entries = dict(file.metadata())
    arrays = load_file(path)
    statistics = json.loads(entries["vqserve.statistics"]) | fields
    for name in drop:
        arrays.pop(name, None)
        entries.pop(name, None)
        statistics.pop(name, None)
    if "vqserve.statistics" in entries:
        entries["vqserve.statistics"] = json.dumps(statistics) if raw is None else raw
    if usage is not None:
        arrays["statistics.usage"] = usage(arrays["statistics.usage"])
    save_file(arrays, path, entries)
    return path


def set_to(place, value):
    def change(usage):
        usage = usage.copy()
        usage[place] = value
        return usage

    return change


def moved(usage):
    """One row counted for another code of its stage."""
    usage = usage.copy()
    used = np.flatnonzero(usage[:6])
    usage[used[0]] -= 1
    usage[used[0] - 1 if used[0] else 1] += 1
    return usage


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"drop": ["statistics.usage"]}, "tensor 'statistics.usage' is missing"),
        ({"drop": ["vqserve.statistics"]}, "'vqserve.statistics' is missing"),
        ({"raw": "[]"}, "'vqserve.statistics' is no JSON object"),
        ({"raw": '{"rows": NaN}'}, "'vqserve.statistics' is no JSON object"),
        ({"drop": ["rows"]}, "vqserve.statistics: field 'rows' is missing"),
        ({"tokens": 3}, "vqserve.statistics: field 'tokens' is unknown"),
        ({"rows": 0}, "vqserve.statistics: rows must be a positive integer, not 0"),
        ({"rows": True}, "rows must be a positive integer, not True"),
        ({"rows": 1 << 70}, "rows must be a positive integer"),
        ({"rows": 199}, "statistics.usage does not count 199 rows in stage 0"),
        ({"error": -1.0}, "vqserve.statistics: error must be null or a float from 0 on, not -1.0"),
        ({"error": "1"}, "error must be null or a float from 0 on, not '1'"),
        ({"error": 0.5}, "vqserve.statistics: sha256 does not fit"),
        ({"source": 3}, "vqserve.statistics: source must be a text"),
        ({"source": "x" * 1001}, "source must be a text of at most 1000 characters"),
        ({"source": "others"}, "sha256 does not fit"),
        ({"sha256": "0" * 64}, "sha256 does not fit"),
        ({"sha256": None}, "sha256 does not fit"),
        ({"usage": set_to(3, -1)}, r"statistics.usage\[3\] is -1, which is no count"),
        ({"usage": set_to(3, 10**6)}, "statistics.usage does not count 200 rows in stage 0"),
        ({"usage": set_to(slice(None), (1 << 62) + 1)}, "statistics.usage does not count 200 rows in stage 0"),
        ({"usage": moved}, "sha256 does not fit"),
        ({"usage": lambda usage: usage[1:]}, r"I64 of shape \[13\], not I64 of shape \[14\]"),
        ({"usage": lambda usage: usage.astype(np.float64)}, r"F64 of shape \[14\], not I64"),
    ],
)
def test_damage_is_an_error_that_names_the_field(path, change, names):
    with pytest.raises(CodebookFileError, match=names) as error:
        load_codebook(rewrite(path, **change))
    assert "\n" not in str(error.value)


def test_statistics_of_another_codebook_are_an_error(path, tmp_path):
    other = ResidualQuantizer(2, 6, 3)
    stranger = tmp_path / "other.safetensors"
    save_codebook(other, stranger, statistics=measured(ResidualQuantizer(2, 6, 3))[0])
    with safe_open(stranger, framework="numpy") as file:
        entry = file.metadata()["vqserve.statistics"]
    usage = load_file(stranger)["statistics.usage"]
    with pytest.raises(CodebookFileError, match="sha256 does not fit"):
        load_codebook(rewrite(path, raw=entry, usage=lambda _: usage))


def test_a_file_without_statistics_has_no_tensor_of_them(path):
    with safe_open(path, framework="numpy") as file:
        entries = dict(file.metadata())
    arrays = load_file(path)
    entries.pop("vqserve.statistics")
    save_file(arrays, path, entries | {"vqserve.format": "1"})
    with pytest.raises(CodebookFileError, match=r"tensor 'statistics\.usage' does not belong to kind 'rvq'"):
        load_codebook(path)


def test_a_flipped_bit_of_the_counts_is_noticed(path):
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    # The counts are the widest elements, so they come first.
    data[begin] ^= 1
    path.write_bytes(data)
    with pytest.raises(CodebookFileError, match=r"statistics\.usage"):
        load_codebook(path)
