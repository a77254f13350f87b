"""Checkpoints of other projects, imported, beside their own libraries' indices and latents (tests/golden/README.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from libraries.comparison import compare, import_golden
from libraries.golden import Golden
from libraries.near_ties import NoNearTie
from make_foreign import FOREIGN, MAX_BYTES, MODULE_OF
from vqserve_tools import cli

FAMILIES = sorted(path.stem for path in FOREIGN.glob("*.npz"))


def load(family: str) -> Golden:
    return Golden.load(FOREIGN / f"{family}.npz")


def test_every_family_has_a_golden_of_bounded_size():
    assert sorted(MODULE_OF) == FAMILIES
    assert all((FOREIGN / f"{family}.npz").stat().st_size <= MAX_BYTES for family in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_library(family, tmp_path):
    golden = load(family)
    found = compare(golden, import_golden(golden, tmp_path))
    assert found.tokens == 256
    assert found.decoded <= 1e-6
    # compare has shown that those are near-ties; most tokens are none.
    assert found.differing <= found.tokens // 8


@pytest.mark.parametrize("family", FAMILIES)
def test_another_index_is_no_near_tie(family, tmp_path):
    """The judge of near-ties judges: a token changed by one is refused."""
    golden = load(family)
    path = import_golden(golden, tmp_path)
    indices = golden.indices.copy()
    indices.flat[100] = (indices.flat[100] + 3) % 60
    with pytest.raises(NoNearTie):
        compare(replace(golden, indices=indices), path)


def test_another_metric_is_found_out(tmp_path):
    golden = load("lucidrains_vq")
    path = import_golden(replace(golden, flags=("--metric", "cosine")), tmp_path)
    with pytest.raises(NoNearTie):
        compare(golden, path)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "--metric" in load(family).flags])
def test_what_the_keys_cannot_tell_is_asked_for(family, tmp_path, capsys):
    golden = load(family)
    at = golden.flags.index("--metric")
    flags = golden.flags[:at] + golden.flags[at + 2 :]
    out = tmp_path / "out.safetensors"
    assert cli.main(["import", str(golden.write_checkpoint(tmp_path)), "-o", str(out), *flags]) == 1
    assert "--metric" in capsys.readouterr().err
    assert not out.exists()
