"""A later stage of a quantizer whose first stages are in another file is not a quantizer of its own."""

from __future__ import annotations

import re

import numpy as np
import pytest

from vqserve_tools import cli


@pytest.mark.parametrize(
    "name",
    [
        "quantizer.quantizers.3.codebook.weight",
        "vq.layers.2._embedding.weight",
        "quantizers.99999999999.codebook.weight",
        "codec.rvqs.1.vq.dictionary",
    ],
)
def test_a_later_stage_alone_is_part_of_a_quantizer(tmp_path, capsys, name):
    np.savez(tmp_path / "part.npz", **{name: np.random.default_rng(0).standard_normal((12, 4), np.float32)})
    arguments = ["import", str(tmp_path / "part.npz"), "-o", str(tmp_path / "o.safetensors"), "--metric", "l2"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "the other stages are missing; to import this one alone, pass --prefix" in error
    [prefix] = re.findall(r"--prefix (\S+)", error)
    assert cli.main([*arguments, "--prefix", prefix]) == 0


def test_a_quantizer_that_is_a_numbered_layer_of_a_model_is_whole(tmp_path):
    codes = np.random.default_rng(0).standard_normal((12, 4), np.float32)
    np.savez(tmp_path / "m.npz", **{"layers.0.weight": codes[:3, :3], "layers.3.vq._embedding.weight": codes})
    assert cli.main(["import", str(tmp_path / "m.npz"), "-o", str(tmp_path / "o.safetensors")]) == 0
