"""Tensors that a safetensors file stores once for several names, as safetensors' save_model writes them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_model
from torch import nn

from vqserve.errors import ForeignCheckpointError
from vqserve_server.codebooks import load_codebook
from vqserve_tools import cli
from vqserve_tools.importing.importer import import_checkpoint

CODES = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
STAGE = "quantizer.layers.{}._codebook.embed"


class Stages(nn.Module):
    """Residual stages with EnCodec's names, whose codebook is one for all."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.quantizer = nn.Module()
        self.quantizer.layers = nn.ModuleList(nn.Module() for _ in range(count))
        codes = nn.Parameter(torch.from_numpy(CODES))
        for layer in self.quantizer.layers:
            layer._codebook = nn.Module()
            layer._codebook.embed = codes


@pytest.fixture
def container(tmp_path) -> Callable[..., Path]:
    """Write a safetensors file of equal tensors of 10x4 float32 and metadata."""

    def write(names: list[str], metadata: Mapping[str, str]) -> Path:
        header: dict[str, object] = {"__metadata__": metadata}
        for number, name in enumerate(names):
            offsets = [number * CODES.nbytes, (number + 1) * CODES.nbytes]
            header[name] = {"dtype": "F32", "shape": list(CODES.shape), "data_offsets": offsets}
        text = json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + CODES.tobytes() * len(names))
        return path

    return write


def test_a_codebook_that_all_stages_share_has_all_its_stages(tmp_path, capsys):
    source, out = tmp_path / "model.safetensors", tmp_path / "o.safetensors"
    save_model(Stages(4), str(source))
    with safe_open(str(source), "np") as file:
        [stored] = file.keys()
    assert cli.main(["import", str(source), "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count(f"10x4 float32, stored as {stored}\n") == 3
    quantizer = load_codebook(out).quantizer
    assert quantizer.num_quantizers == 4
    stages = [stage.embedding.weight.detach().numpy() for stage in quantizer.parts[0].stages]
    assert all(np.array_equal(stage, CODES) for stage in stages)


def test_metadata_of_the_user_is_no_name(container):
    others = {"format": "pt", "title": "my model", "epoch": "3", "made.by": "me"}
    source = container([STAGE.format(0), "pt"], {STAGE.format(1): STAGE.format(0), **others})
    result = import_checkpoint(source)
    assert list(result.taken) == [STAGE.format(0), STAGE.format(1)]
    assert result.left == ("pt",)


def test_a_name_that_is_stored_is_no_other_name(container):
    # save_model does not replace metadata that the user gave.
    source = container([STAGE.format(0), STAGE.format(1)], {STAGE.format(1): STAGE.format(0)})
    assert not any("stored as" in what for what in import_checkpoint(source).taken.values())


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param({STAGE.format(1): STAGE.format(7)}, id="not stored"),
        pytest.param({STAGE.format(1): STAGE.format(0), STAGE.format(2): STAGE.format(1)}, id="chain"),
        pytest.param({STAGE.format(1): STAGE.format(2), STAGE.format(2): STAGE.format(1)}, id="cycle"),
        pytest.param({STAGE.format(1): STAGE.format(1)}, id="itself"),
    ],
)
def test_names_that_lead_to_no_tensor_are_refused(container, metadata):
    with pytest.raises(ForeignCheckpointError, match=r"as another name of .* which is no tensor in it"):
        import_checkpoint(container([STAGE.format(0)], metadata))


def test_pieces_of_tensors_are_refused(container):
    pieces = json.dumps({STAGE.format(0): {"saved_offsets": [0, 0]}})
    with pytest.raises(ForeignCheckpointError, match="it has pieces of tensors, which torch"):
        import_checkpoint(container([STAGE.format(0)], {"DCP_SHARDING_INFO": pieces}))


def test_a_second_name_of_a_stranger_is_as_long_as_any_name(container):
    with pytest.raises(ForeignCheckpointError, match="a name in it has more than 4096 characters"):
        import_checkpoint(container([STAGE.format(0)], {"a" * 5000: STAGE.format(0)}))


def test_a_million_second_names_are_refused(container):
    with pytest.raises(ForeignCheckpointError, match="its metadata has 150000 names of tensors"):
        import_checkpoint(container([STAGE.format(0)], {f"a{number}": STAGE.format(0) for number in range(150_000)}))
