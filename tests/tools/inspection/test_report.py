"""What is said of a codebook without latents: the numbers are right, for people and for programs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vqserve_server.quantizers import CosineQuantizer, EMAVectorQuantizer, ResidualQuantizer, VectorQuantizer
from vqserve_server.search import available
from vqserve_tools.inspection import inspect
from vqserve_tools.inspection.codes import count_duplicates
from vqserve_tools.inspection.text import as_text
from vqserve_tools.latents.array import ArrayRows


def vq_of(rows, **options):
    rows = torch.tensor(rows)
    quantizer = VectorQuantizer(*rows.shape, **options)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(rows)
    return quantizer


def nearest_others(codes):
    codes = codes.astype(np.float64)
    distances = np.sqrt(((codes[:, None] - codes) ** 2).sum(axis=2))
    np.fill_diagonal(distances, np.inf)
    return distances.min(axis=1)


def test_numbers(saved):
    quantizer = vq_of([[3.0, 4.0], [0.0, 0.25], [-0.0, 0.25], [3.0, 4.0], [0.0, 0.0]], remap=[1, 3], unknown_index=9)
    report = inspect(saved(quantizer, run="r1")).report
    assert (report.kind, report.num_codes, report.code_dim, report.vocab_size) == ("vq", 5, 2, 10)
    assert (report.norms.min, report.norms.median, report.norms.max) == (0, 0.25, 5)
    assert (report.neighbours.min, report.neighbours.median, report.neighbours.max) == (0, 0, 0.25)
    assert report.neighbours.codes == 5
    assert report.duplicates == 2
    # 1/K = 0.2.
    assert report.dead_looking == 1
    assert report.search["cpu"] in available("cpu")
    assert report.provenance == {"run": "r1"}
    assert report.dtype == "float32"
    assert report.fit is None


def test_norms_and_neighbours_are_numpy_s(quantizer, saved):
    report = inspect(saved(quantizer)).report
    books = quantizer.codebooks()
    assert len(books) == (0 if quantizer.kind in {"fsq", "residual_fsq", "lfq"} else quantizer.num_quantizers)
    if not books:
        assert (report.norms, report.neighbours, report.duplicates, report.stages) == (None, None, 0, ())
        return
    rows = [book.code_rows().double().numpy() for book in books]
    norms = [np.linalg.norm(codes, axis=1) for codes in rows]
    is_cosine = isinstance(books[0], CosineQuantizer)
    neighbours = [
        nearest_others((codes / of[:, None]).astype(np.float32) if is_cosine else codes)
        for codes, of in zip(rows, norms, strict=True)
    ]
    expected = [(report, np.concatenate(norms), np.concatenate(neighbours))]
    expected += zip(report.stages, norms, neighbours, strict=True) if len(books) > 1 else []
    for figures, lengths, distances in expected:
        for found, values in ((figures.norms, lengths), (figures.neighbours, distances)):
            expected = [values.min(), np.median(values), values.max()]
            assert [found.min, found.median, found.max] == pytest.approx(expected, rel=1e-12)
        assert figures.neighbours.codes == distances.size


def test_stages_are_in_the_order_of_a_token_s_indices(saved):
    quantizer = ResidualQuantizer(4, 8, 2, 4, groups=2)
    with torch.no_grad():
        for number, part in enumerate(quantizer.parts):
            for place, stage in enumerate(part.stages):
                stage.embedding.weight.fill_(10 * place + number)
    report = inspect(saved(quantizer)).report
    # The groups' first stages, then their second ones.
    assert [stage.norms.max for stage in report.stages] == pytest.approx([0, 2**0.5, 10 * 2**0.5, 11 * 2**0.5])
    assert [stage.duplicates for stage in report.stages] == [7, 7, 7, 7]
    assert report.duplicates == 28


def test_one_code_has_no_neighbour(saved):
    report = inspect(saved(VectorQuantizer(1, 3))).report
    assert report.neighbours is None
    assert "none: there is one code" in as_text(report)


def test_a_fresh_codebook_looks_dead(saved):
    assert inspect(saved(VectorQuantizer(300, 3))).report.dead_looking == 300
    assert inspect(saved(VectorQuantizer(300, 3).double())).report.dead_looking == 300


def test_dead_codes_of_an_ema_codebook_are_those_nothing_met(saved):
    quantizer = EMAVectorQuantizer(4, 2, 0.25)
    with torch.no_grad():
        quantizer.embedding.cluster_size.copy_(torch.tensor([0.0, 1e-9, 0.5, 30.0]))
    assert inspect(saved(quantizer)).report.dead_looking == 2


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.integers(1, 2)), elements=st.sampled_from([0, -0.0, 1])))
def test_duplicates_are_codes_equal_to_an_earlier_one(codes):
    assert count_duplicates(codes) == len(codes) - len({tuple(row) for row in codes.tolist()})


def test_every_kind_has_a_report(quantizer, saved):
    report = inspect(saved(quantizer)).report
    text = as_text(report)
    assert text.count("\n") > 10
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["digest"] == report.digest
    if report.kind in {"gumbel", "rvq", "fsq"} or report.arguments.get("embedding_weight_norm"):
        assert report.dead_looking is None


def test_what_is_not_finite_is_null(saved):
    quantizer = VectorQuantizer(2, 3).double()
    # The squares of such codes are beyond float64.
    quantizer.embedding.weight.data.fill_(1e300)
    assert inspect(saved(quantizer)).report.as_dict()["norms"] == {"min": None, "median": None, "max": None}


def test_stages_of_different_sizes(saved, latents_of):
    quantizer = ResidualQuantizer(3, [40, 5, 1], 3)
    for book in quantizer.codebooks():
        book.embedding.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    inspection = inspect(saved(quantizer), ArrayRows(latents_of(quantizer)))
    report = inspection.report
    assert report.stage_vocab_sizes == (40, 5, 1)
    assert report.codes == "1 stage of 40, 1 of 5 and 1 of 1"
    assert not any("collapsed" in warning for warning in report.warnings)
    assert [usage.codes for usage in report.fit.usage] == [40, 5, 1]
    assert all(0 <= usage.dead < usage.codes and usage.share <= 1 for usage in report.fit.usage)
    lines = " ".join(as_text(report).split())
    assert f"of {math.log2(40 * 5):.2f} bits a token" in lines
    assert "that were drawn" not in lines
