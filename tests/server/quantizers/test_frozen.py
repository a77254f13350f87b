"""The frozen form gives what the module gives, and stays as it was."""

from __future__ import annotations

import threading

import pytest
import torch

from vqserve_server.errors import CodebookError, InvalidOption
from vqserve_server.quantizers import FrozenQuantizer, LookupFreeQuantizer, ResidualQuantizer, VectorQuantizer, freeze
from vqserve_server.quantizers.tensors import to_rows
from vqserve_server.search import SearchCounts

CASES = [
    {},
    {"remap": [9, 3, 12, 3, 0]},
    {"remap": [9, 3, 12, 3, 0], "unknown_index": "extra"},
    {"remap": [9, 3, 12, 3, 0], "unknown_index": 2},
    {"remap": [9, 3, 12, 3, 0], "unknown_index": 77},
    {"unknown_index": "extra"},
]


@pytest.mark.parametrize("arguments", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_rows_as_the_module_gives_them(make, latents, kind, arguments, training):
    module = make(kind, **arguments).train(training)
    frozen = freeze(module, device="cpu")
    z = latents(module)
    for rows in (to_rows(z), to_rows(z).double()):
        indices = frozen.encode_rows(rows)
        assert indices.dtype == torch.int64
        assert torch.equal(indices, module.encode(rows))
        assert int(indices.max()) < frozen.vocab_size
    everything = torch.arange(frozen.decodable)
    assert torch.equal(frozen.decode_rows(everything), module.decode(everything))
    assert torch.equal(frozen.decode_rows(everything, output="latents"), module.decode(everything))
    entries = module.get_codebook_entry(everything)
    assert torch.equal(frozen.decode_rows(everything, output="code_rows"), entries)
    assert module.training is training


def test_its_repr(make, kind):
    module = make(kind, remap=[9, 3, 12], unknown_index=77).double()
    frozen = freeze(module, device=torch.device("cpu"))
    assert isinstance(frozen, FrozenQuantizer)
    for name in ("num_codes", "vocab_size", "decodable", "input_dim", "code_dim", "output_dim", "weight_dtype"):
        assert getattr(frozen, name) == getattr(module, name)
    assert frozen.weight_dtype == torch.float64
    assert frozen.decode_rows(torch.tensor([0])).dtype == torch.float64
    assert frozen.device == torch.device("cpu")
    assert isinstance(frozen.search_backend, str)


def test_empty_rows(make, kind):
    frozen = freeze(make(kind, remap=[1]), device="cpu")
    assert frozen.encode_rows(torch.zeros(0, frozen.input_dim)).shape == (0,)
    none = torch.zeros(0, dtype=torch.int64)
    assert frozen.decode_rows(none).shape == (0, frozen.output_dim)
    assert frozen.decode_rows(none, output="code_rows").shape == (0, frozen.code_dim)


def test_later_changes_are_not_seen(make, latents, kind):
    module = make(kind, remap=[9, 3, 12, 0], unknown_index="extra")
    frozen = freeze(module, device="cpu")
    rows = to_rows(latents(module))
    indices, latents_before = frozen.encode_rows(rows), frozen.decode_rows(torch.arange(5))
    for value in module.parameters():
        value.data.normal_()
    module.used.zero_()
    assert torch.equal(frozen.encode_rows(rows), indices)
    assert torch.equal(frozen.decode_rows(torch.arange(5)), latents_before)
    assert not torch.equal(module.encode(rows), indices)


def test_decoded_rows_do_not_share_memory_with_the_table(make, kind):
    frozen = freeze(make(kind), device="cpu")
    before = frozen.decode_rows(torch.arange(16))
    frozen.decode_rows(torch.arange(16)).zero_()
    assert torch.equal(frozen.decode_rows(torch.arange(16)), before)


def test_gradients_and_autocast_are_kept_out(make, latents, kind):
    frozen = freeze(make(kind, num_codes=64), device="cpu")
    rows = torch.cat([torch.randn(50, frozen.input_dim, generator=torch.Generator().manual_seed(s)) for s in range(4)])
    indices = frozen.encode_rows(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(frozen.encode_rows(rows), indices)
        again = freeze(make(kind, num_codes=64), device="cpu")
    assert torch.equal(again.encode_rows(rows), indices)
    assert torch.equal(again.decode_rows(indices), frozen.decode_rows(indices))
    assert not frozen.decode_rows(indices).requires_grad


def test_many_threads(make, latents, kind):
    module = make(kind, num_codes=64)
    frozen = freeze(module, device="cpu")
    batches = [to_rows(latents(module, 4, seed)) for seed in range(8)]
    expected = [frozen.encode_rows(batch) for batch in batches]
    results = [[] for _ in batches]

    def work(number):
        for _ in range(5):
            results[number].append(frozen.encode_rows(batches[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got, expected[n]) for n, runs in enumerate(results) for got in runs)
    assert all(len(runs) == 5 for runs in results)


def test_unknown_options_are_rejected(make, kind):
    module = make(kind)
    with pytest.raises(InvalidOption, match="no_such"):
        freeze(module, device="cpu", search="no_such")
    with pytest.raises(InvalidOption, match="'code_rows'"):
        freeze(module, device="cpu").decode_rows(torch.tensor([0]), output="rows")


def test_a_broken_codebook_cannot_be_frozen(make, kind):
    module = make(kind)
    (module.proj if kind == "gumbel" else module.embedding).weight.data[2] = float("nan")
    with pytest.raises(CodebookError, match="NaN or infinity"):
        freeze(module, device="cpu")


def test_one_table_serves_both_outputs_where_they_are_the_same(make):
    for kind in ("vq", "ema", "gumbel"):
        frozen = freeze(make(kind), device="cpu")
        assert frozen._code_rows is frozen._latents


@pytest.mark.parametrize(
    ("quantizer", "rows_searched"),
    [
        (VectorQuantizer(40, 6, remap=[3, 1]), [50]),
        # Two groups of two stages: of three indices, one group has both.
        (ResidualQuantizer(4, 40, 3, groups=2), [50, 50, 50, 0]),
        (ResidualQuantizer(4, 40, 6, first_quantizers=1), [50, 50, 50, 0]),
        # Nothing is searched.
        (LookupFreeQuantizer(6, "big"), [0]),
    ],
)
def test_a_copy_counts_the_searches_for_each_index(quantizer, rows_searched):
    frozen = freeze(quantizer, device="cpu")
    counts = [SearchCounts() for _ in rows_searched]
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) / 40
    asked = min(frozen.num_quantizers, 3)
    expected = frozen.encode_rows(rows, num_quantizers=asked)
    assert torch.equal(frozen.counting(counts).encode_rows(rows, num_quantizers=asked), expected)
    assert [of_one.rows for of_one in counts] == rows_searched
