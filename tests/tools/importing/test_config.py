"""The config.json beside the weights: compared with the import, and used where the keys do not tell."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vqserve.errors import ForeignCheckpointError
from vqserve_tools import cli
from vqserve_tools.importing.config_models import ROWS
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.importer import Import, import_checkpoint

GENERATOR = np.random.default_rng(0)
ENCODEC = {
    "model_type": "encodec",
    "target_bandwidths": [1.5, 3.0, 6.0],
    "sampling_rate": 24000,
    "upsampling_ratios": [8, 5, 4, 2],
    "codebook_size": 1024,
    "codebook_dim": 4,
    "hidden_size": 4,
}
DAC = {"model_type": "dac", "n_codebooks": 3, "codebook_size": 10, "codebook_dim": 4, "hidden_size": 6}
DIFFUSERS = {"_class_name": "VQModel", "_diffusers_version": "0.30", "num_vq_embeddings": 10, "vq_embed_dim": 4}
TITOK = {"model": {"vq_model": {"codebook_size": 10, "token_size": 4, "use_l2_norm": True}}}
LLAMAGEN = {"codebook_size": 10, "codebook_embed_dim": 4, "codebook_l2_norm": True}
EMU3 = {"model_type": "Emu3VisionVQ", "codebook_size": 10, "embed_dim": 4}
CHAMELEON = {"model_type": "chameleon_vqgan", "num_embeddings": 10, "embed_dim": 4}


def codes(count: int = 10, width: int = 4) -> torch.Tensor:
    return torch.from_numpy(GENERATOR.standard_normal((count, width)).astype(np.float32))


def encodec(stages: int, count: int = 1024) -> dict[str, torch.Tensor]:
    return {f"quantizer.layers.{i}.codebook.embed": codes(count) for i in range(stages)}


def dac(stages: int) -> dict[str, torch.Tensor]:
    state = {}
    for i in range(stages):
        at = f"quantizer.quantizers.{i}."
        state |= {f"{at}codebook.weight": codes(), f"{at}in_proj.weight": codes(4, 6)[:, :, None]}
        state |= {f"{at}out_proj.weight": codes(6, 4)[:, :, None]}
        state |= {f"{at}in_proj.bias": torch.ones(4), f"{at}out_proj.bias": torch.ones(6)}
    return state


def projections(width: int) -> dict[str, torch.Tensor]:
    state = {"project_in.weight": codes(width, 5), "project_in.bias": torch.ones(width)}
    return {**state, "project_out.weight": codes(5, width), "project_out.bias": torch.ones(5)}


def vq(**others: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"quantize.embedding.weight": codes(), **others}


@pytest.fixture
def imported(tmp_path) -> Callable[..., Import]:
    """Import a folder with these weights and this config.json, an object or text."""

    def run(state: Mapping[str, torch.Tensor], config: object, **options: Any) -> Import:
        save_file(dict(state), tmp_path / "model.safetensors")
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
        return import_checkpoint(tmp_path, Options(**options))

    return run


@pytest.fixture
def refused(imported) -> Callable[..., None]:
    def run(match: str, state: Mapping[str, torch.Tensor], config: object, **options: Any) -> None:
        with pytest.raises(ForeignCheckpointError, match=re.escape(match)) as caught:
            imported(state, config, **options)
        assert "\n" not in str(caught.value)

    return run


def test_the_documentation_has_all_models():
    page = (Path(__file__).parents[3] / "docs" / "codebooks.md").read_text()
    table = page.partition("### Folders, parts and config.json")[2].splitlines()
    for row in ROWS:
        [line] = [line for line in table if line.startswith(f"| {row.model} |")]
        names = [*row.names, *(path for paths in row.paths.values() for path in paths)]
        assert all(f"`{name}`" in line for name in names)


# Compared.


@pytest.mark.parametrize(
    ("state", "config", "note"),
    [
        pytest.param(
            encodec(8),
            ENCODEC,
            "config.json (EnCodec) agrees: num_quantizers (by target_bandwidths) 8, codebook_size 1024, codebook_dim 4",
            id="encodec",
        ),
        pytest.param(dac(3), DAC, "(DAC) agrees: n_codebooks 3, codebook_size 10, codebook_dim 4", id="dac"),
        pytest.param(
            {f"audio_encoder.{name}": tensor for name, tensor in encodec(8).items()},
            {"model_type": "musicgen", "num_codebooks": 4, "audio_encoder": ENCODEC},
            "(EnCodec) agrees: num_quantizers (by target_bandwidths) 8",
            id="a codec in another model",
        ),
    ],
)
def test_what_agrees_is_told(imported, state, config, note):
    assert any(note in told for told in imported(state, config).notes)


@pytest.mark.parametrize(
    ("state", "config", "match"),
    [
        pytest.param(
            encodec(5),
            ENCODEC,
            "config.json beside the weights (EnCodec) says num_quantizers (by target_bandwidths) 8, not stages 5, as "
            "imported; if config.json is of another model, move it out of the folder",
            id="stages",
        ),
        pytest.param(dac(2), DAC, "says n_codebooks 3, not stages 2, as imported", id="fewer stages"),
        pytest.param(dac(4), DAC, "says n_codebooks 3, not stages 4, as imported", id="more stages"),
        pytest.param(dac(3), DAC | {"codebook_size": 1024}, "says codebook_size 1024, not codes 10", id="codes"),
        pytest.param(dac(3), DAC | {"codebook_dim": 8}, "says codebook_dim 8, not width 4", id="width"),
        pytest.param(vq(), DIFFUSERS | {"num_vq_embeddings": 99}, "says num_vq_embeddings 99, not codes 10", id="vq"),
        pytest.param(
            dac(3),
            {"model_type": "parler", "audio_encoder": {**DAC, "n_codebooks": 9}},
            "(DAC) says n_codebooks 9, not stages 3",
            id="a codec in another model",
        ),
        pytest.param(
            dac(3),
            {"model_type": "new", "num_quantizers": 8},
            "says num_quantizers 8, not stages 3",
            id="unknown model",
        ),
    ],
)
def test_what_differs_is_refused(refused, state, config, match):
    refused(match, state, config)


def test_mimi_in_transformers(imported, refused):
    state = {}
    for part, stages in (("semantic", 1), ("acoustic", 3)):
        for i in range(stages):
            at = f"quantizer.{part}_residual_vector_quantizer.layers.{i}.codebook."
            state |= {f"{at}embed_sum": codes(), f"{at}cluster_usage": torch.ones(10)}
    config = {"model_type": "mimi", "num_quantizers": 4, "num_semantic_quantizers": 1, "codebook_size": 10}
    assert any("(Mimi) agrees: num_quantizers 4" in note for note in imported(state, config).notes)
    refused("(Mimi) says num_quantizers 32, not stages 4", state, config | {"num_quantizers": 32})


def test_an_inner_codec_does_not_count_for_its_model(imported):
    # X-Codec has DAC's encoder, whose configuration has numbers of a quantizer that the model lacks.
    config = {
        **ENCODEC,
        "model_type": "xcodec",
        "sample_rate": 24000,
        "acoustic_model_config": {**DAC, "n_codebooks": 9, "downsampling_ratios": [8, 5, 4, 2]},
    }
    notes = imported(encodec(8), config).notes
    assert any("(X-Codec) agrees: num_quantizers (by target_bandwidths) 8, codebook_size 1024" in n for n in notes)


def test_of_an_unknown_model_only_missing_stages_are_certain(imported):
    notes = imported(dac(3), {"model_type": "new", "num_quantizers": 2, "codebook_size": 12}).notes
    assert any("(a model that is not known here) has codebook_size 12, not 10" in note for note in notes)
    assert any("has num_quantizers 2, not 3" in note for note in notes)


# Used.


@pytest.mark.parametrize(
    ("config", "metric", "note"),
    [
        (DIFFUSERS, "l2", "--metric l2, as config.json says (diffusers' VQModel)"),
        (CHAMELEON, "l2", "--metric l2, as config.json says (Chameleon)"),
        (EMU3, "l2", "--metric l2, as config.json says (Emu3)"),
        ({"model_type": "chameleon", "vq_config": CHAMELEON}, "l2", "--metric l2, as config.json says (Chameleon"),
        (TITOK, "cosine", "--metric cosine, as config.json says (TiTok: model.vq_model.use_l2_norm true)"),
        (LLAMAGEN, "cosine", "--metric cosine, as config.json says (LlamaGen: codebook_l2_norm true)"),
        (LLAMAGEN | {"codebook_l2_norm": False}, "l2", "--metric l2, as config.json says (LlamaGen: codebook_l2_norm"),
    ],
)
def test_the_metric_of_keys_that_do_not_tell_it(imported, refused, config, metric, note):
    state = vq(latent_tokens=torch.zeros(3))
    result = imported(state, config)
    assert result.quantizer.metric == metric
    assert any(told.startswith(note) for told in result.notes)
    assert result.provenance["metric"] == metric
    if metric == "cosine":
        assert result.quantizer.decode_normalized
    # The same, said by the user, is right; another one is not.
    assert not any(told.startswith("--metric") for told in imported(state, config, metric=metric).notes)
    refused(f"says metric {metric}, not --metric dot", state, config, metric="dot")


def test_a_metric_that_the_keys_have_is_compared(refused):
    state = {**vq(), "quantize.codebook_used": torch.zeros(3)}
    refused("(LlamaGen) says metric l2, not --metric cosine", state, LLAMAGEN | {"codebook_l2_norm": False},
            metric="cosine")  # fmt: skip


def test_the_flag_of_a_model_whose_keys_are_known(imported):
    # Without the flag, the importer takes the published models' metric.
    state = {**vq(), "quantize.codebook_used": torch.zeros(3)}
    result = imported(state, LLAMAGEN | {"codebook_l2_norm": False})
    assert result.quantizer.metric == "l2"
    assert not any("as its published models are" in note for note in result.notes)


def test_levels(imported, refused):
    state = projections(3)
    config = {"model_type": "new", "fsq_levels": [7, 5, 5]}
    result = imported(state, config, kind="fsq")
    assert result.quantizer.levels == (7, 5, 5)
    assert any(note.startswith("--levels 7,5,5, as config.json says") for note in result.notes)
    refused("says fsq_levels 7,5,5, not --levels 5,5,5", state, config, kind="fsq", levels=(5, 5, 5))


def test_a_kind_that_a_model_only_looks_like(refused):
    state = projections(8)
    config = {"model_type": "xcodec2", "quantization_levels": [4] * 8}
    refused("X-Codec 2, not of kind fsq: its quantizer is a ResidualFSQ", state, config, kind="fsq", levels=(4,) * 8)


def test_a_second_quantizer_of_the_model_is_another_one(imported):
    # TiTok's decoder has a codebook of its own, of which the configuration says nothing.
    state = {"quantize.embedding.weight": codes(), "pixel_quantize.embedding.weight": codes(20, 6)}
    result = imported(state, TITOK, prefix="pixel_quantize.", metric="l2")
    assert result.quantizer.num_codes == 20
    with pytest.raises(ForeignCheckpointError, match="does not define the metric"):
        imported(state, TITOK, prefix="pixel_quantize.")


def test_another_quantizer_than_the_model_s(refused):
    # The flag is of the model's own quantizer, and this one is from a library.
    state = {"vq._codebook.embed": codes()[None], "vq._codebook.initted": torch.ones(1)}
    refused("does not define the metric", state, TITOK)


def test_below_a_prefix(imported):
    state = {f"first_stage_model.{name}": tensor for name, tensor in vq().items()}
    assert imported(state, DIFFUSERS, prefix="first_stage_model.").quantizer.metric == "l2"


# Which config.json, and what may be in it.


def test_the_config_beside_a_file(tmp_path, imported):
    imported(vq(), DIFFUSERS)
    assert import_checkpoint(tmp_path / "model.safetensors").quantizer.metric == "l2"
    (tmp_path / "model.safetensors").rename(tmp_path / "vq.safetensors")
    assert import_checkpoint(tmp_path / "vq.safetensors").quantizer.metric == "l2"
    # Of two models in a folder, nothing says which one it is of.
    save_file(vq(), tmp_path / "other.safetensors")
    with pytest.raises(ForeignCheckpointError, match="does not define the metric"):
        import_checkpoint(tmp_path / "vq.safetensors")


def test_an_array_that_is_named_is_taken_as_the_user_says(tmp_path, imported):
    result = imported({"vq.codes": codes()}, DAC, keys=("vq.codes",), metric="dot")
    assert result.quantizer.metric == "dot"
    np.save(tmp_path / "codes.npy", codes().numpy())
    assert import_checkpoint(tmp_path / "codes.npy", Options(metric="dot")).quantizer.metric == "dot"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "bert", "hidden_size": 768},
        {"model_type": ["dac"], "n_codebooks": 3},
        {"model_type": "dac", "n_codebooks": "9", "codebook_size": None, "codebook_dim": [8]},
        {"model_type": "dac", "n_codebooks": True, "codebook_size": -1, "codebook_dim": 1 << 40},
        {"model_type": "dac", "n_codebooks": 3.5, "codebook_size": {"a": 1}},
        {"architectures": 3, "audio_encoder": [], "vq_config": "x"},
        {"architectures": [None, {}], "audio_encoder": {"model_type": {}}},
        {"audio_encoder": {**DAC, "n_codebooks": 9}, "codec_config": {**DAC, "n_codebooks": 8}},
        {**ENCODEC, "codebook_size": 10, "target_bandwidths": [0]},
        {**ENCODEC, "codebook_size": 10, "target_bandwidths": [float("nan")]},
        {**ENCODEC, "codebook_size": 10, "target_bandwidths": [1e-9]},
        {**ENCODEC, "codebook_size": 10, "target_bandwidths": ["6"], "upsampling_ratios": [0]},
        {**ENCODEC, "codebook_size": 10, "upsampling_ratios": [1 << 31] * 10_000},
        {**ENCODEC, "codebook_size": 10, "upsampling_ratios": [1 << 31] * 60, "target_bandwidths": [0.001]},
        {"model": {"vq_model": {"codebook_size": 1, "token_size": 1, "use_l2_norm": "${x}"}}},
    ],
)
def test_what_is_no_fact_is_not_used(imported, config):
    assert imported(dac(3), config).quantizer.num_quantizers == 3


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("[]", "config.json: it is no JSON object"),
        ("<html>", "config.json: it is not JSON"),
        ('{"a":' * 100_000, "config.json: it is not JSON"),
        ('{"model_type": "dac", "model_type": "dac"}', "config.json: it is not JSON (a name occurs twice)"),
        (" " * (2 << 20), "config.json: it has more than 1048576 bytes"),
    ],
)
def test_a_config_that_cannot_be_read(refused, config, match):
    refused(match, dac(3), config)


def test_the_command_tells_what_was_used(tmp_path, imported, capsys):
    imported(vq(), DIFFUSERS)
    out = tmp_path / "out" / "o.safetensors"
    out.parent.mkdir()
    assert cli.main(["import", str(tmp_path), "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert "note  --metric l2, as config.json says (diffusers' VQModel)\n" in text
    assert "note  config.json (diffusers' VQModel) agrees: num_vq_embeddings 10, vq_embed_dim 4\n" in text
    assert Path(tmp_path).name in text or "found" in text
