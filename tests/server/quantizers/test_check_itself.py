"""What a frozen codebook finds out about itself before it serves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kinds import with_every_kind
from vqserve_server.codebooks.state import CodebookState
from vqserve_server.errors import CodebookError
from vqserve_server.quantizers import (
    CosineQuantizer,
    DotQuantizer,
    EMAVectorQuantizer,
    FiniteScalarQuantizer,
    GumbelQuantizer,
    LookupFreeQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
)
from vqserve_server.quantizers.inference.base import freeze
from vqserve_server.quantizers.inference.host import HostLookup
from vqserve_server.quantizers.inference.served import probe_ids
from vqserve_server.search import RowSearcher, Searcher, native

KINDS = with_every_kind(
    {
        "vq": lambda: VectorQuantizer(300, 8),
        "vq of two codes": lambda: VectorQuantizer(2, 3),
        "ema": lambda: EMAVectorQuantizer(70, 6, beta=0.25),
        "gumbel": lambda: GumbelQuantizer(6, 10, 70),
        "projected": lambda: VectorQuantizerWithInputProjection(
            input_dim=6, n_codes=70, codebook_dim=4, output_dim=10, beta=1.0
        ),
        "remap": lambda: VectorQuantizer(300, 8, remap=torch.arange(0, 300, 7).numpy(), unknown_index="random"),
        "cosine": lambda: CosineQuantizer(70, 6),
        "dot": lambda: DotQuantizer(70, 6),
        "rvq": lambda: ResidualQuantizer(3, 40, 5),
        "fsq": lambda: FiniteScalarQuantizer([8, 5, 2, 3]),
        "lfq": lambda: LookupFreeQuantizer(10, "big"),
    }
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_every_kind_finds_itself(kind: str, backend: str) -> None:
    torch.manual_seed(0)
    freeze(KINDS[kind](), device="cpu", search=backend).check_itself()


def test_equal_codes_and_large_and_tiny_ones_find_themselves() -> None:
    torch.manual_seed(0)
    for kind in (VectorQuantizer, DotQuantizer):
        quantizer = kind(64, 4)
        codes = torch.randn(64, 4) * 10.0 ** torch.linspace(-40, 30, 64)[:, None]
        codes[10:20] = codes[0]
        codes[20] = -0.0
        codes[21] = 0.0
        quantizer.load_state_dict({"embedding.weight": codes})
        freeze(quantizer, device="cpu").check_itself()


class Off(Searcher):
    """A search that is wrong about one code."""

    backend = "off"

    def __init__(self, right: Searcher, code: int, answer: int) -> None:
        self._right, self._code, self._answer = right, code, answer

    def search(self, rows: Tensor, counts: object = None) -> Tensor:
        winners = self._right.search(rows)
        return torch.where(winners == self._code, self._answer, winners)


@pytest.mark.parametrize("answer", [3, -1, 300, 1 << 40])
@pytest.mark.parametrize("kind", ["vq", "cosine"])
def test_a_search_that_is_wrong_is_found_out(kind: str, answer: int) -> None:
    torch.manual_seed(0)
    frozen = freeze(KINDS[kind](), device="cpu")
    last = frozen.num_codes - 1
    wrong = replace(frozen, _searcher=Off(frozen._searcher, last, answer))
    with pytest.raises(CodebookError, match=f"code {last} is not found at its own place by search 'off'"):
        wrong.check_itself()


class OffArrays(RowSearcher[Any]):
    """The same of arrays."""

    backend = "off"

    def __init__(self, right: RowSearcher[Any], code: int, answer: int) -> None:
        self._right, self._code, self._answer = right, code, answer

    def search(self, rows: Any, counts: object = None) -> Any:
        winners = self._right.search(rows)
        return np.where(winners == self._code, self._answer, winners)


@pytest.mark.skipif(not native.levels(), reason="the compiled search was not built for this platform")
@pytest.mark.parametrize("answer", [3, -1, 300, 1 << 40])
@pytest.mark.parametrize("kind", ["vq", "cosine"])
def test_a_compiled_search_that_is_wrong_is_found_out(kind: str, answer: int) -> None:
    torch.manual_seed(0)
    plain = CodebookState.of(KINDS[kind]()).plain()
    assert plain is not None
    served = HostLookup.of(plain)
    assert served is not None
    served.check_itself()
    last = served.num_codes - 1
    with pytest.raises(CodebookError, match=f"code {last} is not found at its own place by search 'off'"):
        replace(served, _searcher=OffArrays(served._searcher, last, answer)).check_itself()


def test_a_table_that_is_not_what_is_searched_is_found_out() -> None:
    """As a device would have it that lost a bit on the way."""
    torch.manual_seed(0)
    frozen = freeze(VectorQuantizer(300, 8), device="cpu")
    codes = frozen._problem.codes.clone()
    codes[0, 3] += 1.0
    with pytest.raises(CodebookError, match="code 0 is not found"):
        replace(frozen, _problem=replace(frozen._problem, codes=codes)).check_itself()


def test_a_stage_that_is_wrong_is_named() -> None:
    torch.manual_seed(0)
    frozen = freeze(ResidualQuantizer(3, 40, 5), device="cpu")
    [part] = frozen._parts
    lookup = part.stages[1]
    stages = (part.stages[0], replace(lookup, _searcher=Off(lookup._searcher, 0, 1)), part.stages[2])
    with pytest.raises(CodebookError, match="part 0, stage 1: code 0 is not found"):
        replace(frozen, _parts=(replace(part, stages=stages),)).check_itself()


def test_boundaries_that_are_wrong_are_found_out() -> None:
    frozen = freeze(FiniteScalarQuantizer([8, 5]), device="cpu")
    with pytest.raises(CodebookError, match="is not found between its own boundaries"):
        replace(frozen, _weights=frozen._weights.flip(0)).check_itself()
    assert frozen.check_itself() is None


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [0, 1, 2]), (256, list(range(256)))])
def test_few_codes_are_all_probed(count: int, expected: list[int]) -> None:
    assert probe_ids(count).tolist() == expected


def test_of_many_codes_some_are_probed() -> None:
    probes = probe_ids(1 << 32)
    assert len(np.unique(probes)) == 256
    assert (probes[0].item(), probes[-1].item()) == (0, (1 << 32) - 1)
