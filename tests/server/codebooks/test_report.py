"""`vqserved inspect`: the numbers are right, for people and for programs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vqserve_server import cli
from vqserve_server.codebooks import load_codebook, save_codebook
from vqserve_server.codebooks.report import count_duplicates, inspect
from vqserve_server.quantizers import EMAVectorQuantizer, VectorQuantizer
from vqserve_server.search import available


def vq_of(rows, **options):
    rows = torch.tensor(rows)
    quantizer = VectorQuantizer(*rows.shape, **options)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(rows)
    return quantizer


def report_of(tmp_path, quantizer, **provenance):
    path = tmp_path / "c.safetensors"
    save_codebook(quantizer, path, provenance=provenance)
    return inspect(load_codebook(path))


def test_numbers(tmp_path):
    quantizer = vq_of([[3.0, 4.0], [0.0, 0.25], [-0.0, 0.25], [3.0, 4.0], [0.0, 0.0]], remap=[1, 3], unknown_index=9)
    report = report_of(tmp_path, quantizer, run="r1")
    assert (report.kind, report.num_codes, report.code_dim, report.vocab_size) == ("vq", 5, 2, 10)
    assert (report.norms.min, report.norms.median, report.norms.max) == (0, 0.25, 5)
    assert report.duplicates == 2
    # 1/K = 0.2.
    assert report.dead_looking == 1
    assert report.search["cpu"] in available("cpu")
    assert report.provenance == {"run": "r1"}
    assert report.dtype == "float32"


def test_a_fresh_codebook_looks_dead(tmp_path):
    assert report_of(tmp_path, VectorQuantizer(300, 3)).dead_looking == 300
    assert report_of(tmp_path, VectorQuantizer(300, 3).double()).dead_looking == 300


def test_every_kind(tmp_path, quantizer):
    report = report_of(tmp_path, quantizer)
    assert report.as_text().count("\n") > 10
    assert json.loads(json.dumps(report.as_dict()))["digest"] == report.digest
    if report.kind == "gumbel" or report.arguments.get("embedding_weight_norm"):
        assert report.dead_looking is None


def test_dead_codes_of_an_ema_codebook_are_those_nothing_met(tmp_path):
    quantizer = EMAVectorQuantizer(4, 2, 0.25)
    with torch.no_grad():
        quantizer.embedding.cluster_size.copy_(torch.tensor([0.0, 1e-9, 0.5, 30.0]))
    assert report_of(tmp_path, quantizer).dead_looking == 2


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.integers(1, 2)), elements=st.sampled_from([0, -0.0, 1])))
def test_duplicates_are_codes_equal_to_an_earlier_one(codes):
    assert count_duplicates(codes) == len(codes) - len({tuple(row) for row in codes.tolist()})


def test_the_command(tmp_path, capsys):
    path = tmp_path / "c.safetensors"
    digest = save_codebook(VectorQuantizer(300, 3), path, provenance={"who": "a\x1b[2Jb\nc"})
    assert cli.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for line in ("codes ", "300 of width 3, float32", digest, "dead-looking", "300 of 300"):
        assert line.strip() in text
    # What a file says of itself does not move the cursor.
    assert "a\\x1b[2Jb\\nc" in text
    assert cli.main(["inspect", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["norms"].keys() == {"min", "median", "max"}
    assert told["provenance"]["who"] == "a\x1b[2Jb\nc"


def test_long_provenance_is_cut_to_a_line_each(tmp_path, capsys, monkeypatch):
    path = tmp_path / "c.safetensors"
    provenance = {"options": {f"option {i}": i for i in range(99)}, "n" * 999: "x" * 999, "note": "short"}
    save_codebook(VectorQuantizer(300, 3, loss_key="key" * 99), path, provenance=provenance)
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 100
    names = ("provenance options ", "provenance nnn", "argument loss_key ")
    assert [sum(line.startswith(name) and line.endswith("...") for line in lines) for name in names] == [1, 1, 1]
    assert sum(line.startswith("provenance note ") and line.endswith(" short") for line in lines) == 1
    # What vqserve says itself is whole, on a narrow terminal too.
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["inspect", str(path)]) == 0
    assert load_codebook(path).digest in capsys.readouterr().out
    assert cli.main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"] == provenance


@pytest.mark.parametrize("content", [b"", b"noise" * 99])
def test_no_codebook(tmp_path, capsys, content):
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    assert cli.main(["inspect", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "'c'" in err
