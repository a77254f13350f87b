"""Importing from every container, through the command line's own functions."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vqserve_data.foreign import foreign_array
from vqserve_server.codebooks import codebook_digest, load_codebook, save_codebook
from vqserve_server.errors import ForeignCheckpointError
from vqserve_server.quantizers import VectorQuantizer, legacy_weight_norm_names
from vqserve_tools import cli
from vqserve_tools.importing import commands
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.importer import import_checkpoint
from vqserve_tools.inspection import commands as inspection_commands

CODES = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)


def run(capsys, *args) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of `vqserved ARGS`, in this process."""
    try:
        status = cli.main([str(arg) for arg in args])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def fails(capsys, match: str, *args) -> str:
    status, out, err = run(capsys, *args)
    assert status == 1
    assert out == ""
    assert err.count("\n") == 1
    assert match in err
    return err


def write(path: Path, content) -> Path:
    """Write arrays by name as the suffix says."""
    match path.suffix:
        case ".npy":
            np.save(path, content)
        case ".npz":
            np.savez(path, **content)
        case ".safetensors":
            save_file({name: torch.as_tensor(value) for name, value in content.items()}, path)
        case _:
            torch.save({name: torch.as_tensor(value) for name, value in content.items()}, path)
    return path


SUFFIXES = [".npz", ".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".th"]


# Bare arrays.


def test_a_bare_npy(tmp_path, capsys):
    source = write(tmp_path / "codes.npy", CODES)
    out = tmp_path / "out.safetensors"
    status, text, err = run(capsys, "import", source, "-o", out, "--metric", "l2")
    assert (status, err) == (0, "")
    assert "took  array  10x4 float32" in text
    assert "note" not in text
    codebook = load_codebook(out)
    assert codebook.digest in text
    assert np.array_equal(codebook.quantizer.embedding.weight.detach().numpy(), CODES)
    assert codebook.provenance["source"] == "codes.npy"
    assert len(codebook.provenance["source_sha256"]) == 64
    assert str(tmp_path) not in out.read_bytes().decode("latin1")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bare_array_by_key(tmp_path, capsys, suffix):
    source = write(tmp_path / f"c{suffix}", {"a.codes": CODES, "other": np.zeros((3, 3), np.float32)})
    out = tmp_path / "out.safetensors"
    status, text, _ = run(capsys, "import", source, "-o", out, "--key", "a.codes", "--metric", "l2")
    assert status == 0
    assert "left  other" in text
    assert np.array_equal(load_codebook(out).quantizer.embedding.weight.detach().numpy(), CODES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_among_several_arrays_none_is_guessed(tmp_path, capsys, suffix):
    arrays = {"a": CODES, "b": CODES + 1, "c": np.zeros(3)}
    source = write(tmp_path / f"c{suffix}", arrays)
    err = fails(
        capsys, "--key a (10x4), --key b (10x4)", "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2"
    )
    assert "--key c" not in err
    fails(
        capsys,
        "there is no array 'd'",
        "import",
        source,
        "-o",
        tmp_path / "o.safetensors",
        "--metric",
        "l2",
        "--key",
        "d",
    )
    # One alone is not taken either: it could be anything.
    source = write(tmp_path / f"one{suffix}", {"a": CODES})
    fails(
        capsys,
        "likely ones first: --key a (10x4)",
        "import",
        source,
        "-o",
        tmp_path / "o.safetensors",
        "--metric",
        "l2",
    )
    source = write(tmp_path / f"stack{suffix}", {"a": CODES[None]})
    fails(capsys, "--key a --kind rvq or --key a --groups (1x10x4)", "import", source, "-o", tmp_path / "o.safetensors")
    source = write(tmp_path / f"none{suffix}", {"a": np.zeros(3)})
    fails(capsys, "no array of two axes", "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2")


def test_a_bare_tensor(tmp_path, capsys):
    source = tmp_path / "t.pt"
    torch.save(torch.from_numpy(CODES), source)
    out = tmp_path / "o.safetensors"
    assert run(capsys, "import", source, "-o", out, "--metric", "l2")[0] == 0
    assert np.array_equal(load_codebook(out).quantizer.embedding.weight.detach().numpy(), CODES)
    fails(capsys, "leave out --key and", "import", source, "-o", out, "--metric", "l2", "--key", "a", "--force")
    fails(capsys, "leave out --key and", "import", source, "-o", out, "--metric", "l2", "--prefix", "a", "--force")


def test_the_metric_is_asked_for(tmp_path, capsys):
    source = write(tmp_path / "codes.npy", CODES)
    out = tmp_path / "o.safetensors"
    err = fails(capsys, "does not define the metric", "import", source, "-o", out)
    assert "pass --metric l2 or --metric cosine or --metric dot" in err
    fails(capsys, "pass --decode normalized", "import", source, "-o", out, "--metric", "cosine")
    assert not out.exists()
    assert run(capsys, "import", source, "-o", out, "--metric", "dot")[0] == 0
    assert load_codebook(out).kind == "dot"


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (
            np.zeros((2, 3, 4), np.float32),
            "has shape 2x3x4: the codebook must be (K, D), and 2 of them may be the stages",
        ),
        (np.zeros(3, np.float32), "has shape 3: the codebook must be (K, D)"),
        (np.float32(3), "has shape scalar"),
        (np.zeros((3, 4), np.int32), "is int32: a codebook holds floating-point numbers"),
        (np.zeros((3, 4), np.complex64), "is complex64"),
        (np.zeros((3, 4), bool), "is bool"),
        (np.zeros((3, 4), np.longdouble), "floating-point"),
        (np.zeros(3, [("a", "f4")]), "the codebook must be"),
        (np.array([[0, 1], [2, np.nan]], np.float32), "array[1, 1] is nan"),
        (np.array([[0, np.inf]], np.float16), "array[0, 1] is inf"),
        (np.array([[0, 1e300]]), "array[0, 1] is 1e+300, beyond float32's range"),
        (np.array([[{}, {}]]), "holds Python objects, which are not loaded"),
    ],
)
def test_arrays_that_are_no_codebook(tmp_path, capsys, array, match):
    source = write(tmp_path / "codes.npy", array)
    fails(capsys, match, "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2")


def test_an_empty_axis_is_no_codebook(tmp_path, capsys):
    source = write(tmp_path / "c.npz", {"a": np.zeros((3, 0), np.float32), "b": np.zeros((0, 3), np.float32)})
    fails(capsys, "'e_dim' is 0", "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2", "--key", "a")
    fails(capsys, "'n_e' is 0", "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2", "--key", "b")


@pytest.mark.parametrize(("dtype", "exactly"), [(np.float16, True), (np.float64, True), (">f4", True), (">f8", True)])
def test_other_types_become_float32(tmp_path, capsys, dtype, exactly):
    half = CODES.astype(np.float16)
    source = write(tmp_path / "c.npy", half.astype(dtype))
    out = tmp_path / "o.safetensors"
    status, text, _ = run(capsys, "import", source, "-o", out, "--metric", "l2")
    assert status == 0
    assert ("to float32, exactly" in text) == (dtype not in (">f4",))
    weight = load_codebook(out).quantizer.embedding.weight.detach().numpy()
    assert weight.dtype == np.float32
    assert np.array_equal(weight, half.astype(np.float32))


def test_a_note_counts_rounded_numbers(tmp_path, capsys):
    wide = CODES.astype(np.float64)
    wide[3, 1] += 1e-12
    wide[4, 0] += 1e-12
    source = write(tmp_path / "c.npy", wide)
    out = tmp_path / "o.safetensors"
    _, text, _ = run(capsys, "import", source, "-o", out, "--metric", "l2")
    assert "array: float64 to float32, 2 of 40 numbers were rounded" in text
    assert load_codebook(out).provenance["notes"] == ["array: float64 to float32, 2 of 40 numbers were rounded"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_bfloat16_is_widened(tmp_path, capsys, suffix):
    codes = torch.from_numpy(CODES).bfloat16()
    source = write(tmp_path / f"c{suffix}", {"codes": codes})
    out = tmp_path / "o.safetensors"
    _, text, _ = run(capsys, "import", source, "-o", out, "--metric", "l2", "--key", "codes")
    assert "codes: bfloat16 to float32, exactly" in text
    assert torch.equal(load_codebook(out).quantizer.embedding.weight.detach(), codes.float())


# State dicts.


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
@pytest.mark.parametrize("prefix", ["", "regularization."])
def test_state_dicts_of_every_kind(tmp_path, capsys, trained_quantizer, prefix, suffix):
    quantizer = trained_quantizer
    state = {f"{prefix}{name}": tensor for name, tensor in quantizer.state_dict().items()}
    if prefix:
        state["encoder.conv.weight"] = torch.zeros(3)
    source = write(tmp_path / f"model{suffix}", state)
    out = tmp_path / "o.safetensors"
    in_use = quantizer.num_codes if quantizer.used is None else len(quantizer.used)
    unknown = "extra" if quantizer.re_embed == in_use + 1 else quantizer.unknown_index
    args = ["--unknown-index", unknown, *(["--prefix", prefix.rstrip(".")] if prefix else [])]
    if not prefix and quantizer.kind in {"vq", "vq_projection"}:
        args += ["--metric", "l2"]
    status, text, err = run(capsys, "import", source, "-o", out, *args)
    assert (status, err) == (0, "")
    codebook = load_codebook(out)
    assert codebook.kind == quantizer.kind
    # float64 becomes float32 on the way.
    assert codebook.digest == codebook_digest(quantizer.float())
    assert codebook.quantizer.unknown_index == quantizer.unknown_index
    assert (f"unknown_index is {unknown!r}" in text) == (quantizer.used is not None)
    assert text.count("took  ") == len(quantizer.state_dict())
    assert ("left  encoder.conv.weight" in text) == bool(prefix)


def test_legacy_names_of_weight_norm(tmp_path, capsys, make_quantizer):
    quantizer = make_quantizer("vq_weight_norm")
    state = legacy_weight_norm_names({f"q.{name}": tensor for name, tensor in quantizer.state_dict().items()})
    assert "q.embedding.weight_g" in state
    source = write(tmp_path / "m.ckpt", state)
    assert run(capsys, "import", source, "-o", tmp_path / "o.safetensors", "--prefix", "q.")[0] == 0
    assert load_codebook(tmp_path / "o.safetensors").digest == codebook_digest(quantizer)


@pytest.mark.parametrize("wrap", [("state_dict",), ("model",), ("model", "state_dict"), ("state_dict", "model")])
def test_wrappers_are_taken_off(tmp_path, capsys, make_quantizer, wrap):
    quantizer = make_quantizer("ema")
    content = dict(quantizer.state_dict())
    for name in wrap:
        content = {name: content, "epoch": 3, "lr": [0.1], "optimizer": {"state": {0: {"step": torch.zeros(1)}}}}
    source = tmp_path / "m.ckpt"
    torch.save(content, source)
    assert run(capsys, "import", source, "-o", tmp_path / "o.safetensors")[0] == 0
    assert load_codebook(tmp_path / "o.safetensors").digest == codebook_digest(quantizer)


def test_with_two_wrappers_the_names_keep_their_length(tmp_path, capsys, make_quantizer):
    state = make_quantizer("ema").state_dict()
    source = tmp_path / "m.ckpt"
    torch.save({"state_dict": state, "model": state}, source)
    fails(
        capsys,
        "--prefix model. (12x3), --prefix state_dict. (12x3)",
        "import",
        source,
        "-o",
        tmp_path / "o.safetensors",
    )
    assert run(capsys, "import", source, "-o", tmp_path / "o.safetensors", "--prefix", "model")[0] == 0


def test_the_older_torch_format(tmp_path, capsys, make_quantizer):
    quantizer = make_quantizer("gumbel")
    source = tmp_path / "m.pt"
    torch.save(quantizer.state_dict(), source, _use_new_zipfile_serialization=False)
    assert run(capsys, "import", source, "-o", tmp_path / "o.safetensors")[0] == 0
    assert load_codebook(tmp_path / "o.safetensors").digest == codebook_digest(quantizer)


def test_a_remap_may_be_of_any_integer_type(tmp_path, capsys):
    source = write(tmp_path / "m.npz", {"embedding.weight": CODES, "used": np.array([3, 1], np.int32)})
    flags = ["--metric", "l2", "--unknown-index", "7"]
    assert run(capsys, "import", source, "-o", tmp_path / "o.safetensors", *flags)[0] == 0
    codebook = load_codebook(tmp_path / "o.safetensors")
    assert codebook.quantizer.used.tolist() == [3, 1]
    assert codebook.quantizer.unknown_index == 7


@pytest.mark.parametrize(
    ("state", "args", "match"),
    [
        ({"embedding.weight": CODES, "head.weight": CODES}, [], "head.weight (10x4) too"),
        ({"quantize.embedding.weight": CODES}, [], "quantize.embedding.weight does not define the metric"),
        ({"vq.embedding.weight": CODES}, [], "vq.embedding.weight does not define the metric"),
        ({"net.embedding.weight": CODES}, [], "--prefix net. (10x4)"),
        ({"quantize.embedding.weight": CODES}, ["--prefix", "quantize"], "does not define the metric"),
        ({"q.embedding.weight": CODES, "q.vocab_hits": CODES[0]}, ["--prefix", "q."], "q.vocab_hits (4) too"),
        ({"q.embedding.weight": CODES}, ["--prefix", "nowhere."], "no quantizer under 'nowhere.'"),
        ({"embedding.weight": CODES[0]}, ["--metric", "l2"], "the codebook must be (K, D)"),
        ({"embedding.weight": CODES, "used": CODES[0]}, ["--metric", "l2"], "a remap holds integers"),
        ({"embedding.weight": CODES, "used": np.zeros((1, 1), np.int64)}, ["--metric", "l2"], "a remap has one axis"),
        ({"embedding.weight": CODES, "used": np.array([10])}, ["--metric", "l2"], "used[0] is 10, not in [0, 10)"),
        ({"embedding.weight": CODES, "used": np.array([(1 << 64) - 1], np.uint64)}, ["--metric", "l2"], "is -1"),
        ({"embedding.weight": CODES, "embedding.cluster_size": CODES[:, 0]}, [], "embed_avg' is missing"),
        ({"embed.weight": CODES}, [], "--key embed.weight (10x4)"),
        (
            {"embed.weight": CODES, "proj.weight": CODES},
            [],
            "--key embed.weight (10x4); --dry-run lists all arrays, 1 more",
        ),
        ({"embed.weight": CODES, "proj.weight": CODES[:, :, None, None]}, [], "'proj.bias' is missing"),
        ({"embedding.weight": CODES, "proj_in.weight": CODES[0]}, ["--metric", "l2"], "maps single elements"),
        ({"embedding.weight": CODES, "proj_in.bias": CODES[0]}, ["--metric", "l2"], "'proj_in.weight' is missing"),
        ({"embedding.weight_v": CODES}, [], "original0' is missing"),
        ({"embedding.weight": CODES, "embedding.weight_v": CODES}, [], "does not belong to kind 'vq'"),
    ],
)
def test_state_dicts_that_are_no_quantizers(tmp_path, capsys, state, args, match):
    source = write(tmp_path / "m.npz", state)
    fails(capsys, match, "import", source, "-o", tmp_path / "o.safetensors", *args)
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_put_in_front_is_taken_off(tmp_path, capsys, wrapper):
    source = write(tmp_path / "m.safetensors", {f"{wrapper}embedding.weight": CODES})
    assert run(capsys, "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2")[0] == 0
    source = write(tmp_path / "n.pt", {f"{wrapper}quantize.embedding.weight": CODES})
    fails(
        capsys,
        f"{wrapper}quantize.embedding.weight does not define",
        "import",
        source,
        "-o",
        tmp_path / "p.safetensors",
    )


def test_a_moving_average_beside_the_model_is_a_choice(tmp_path, capsys):
    state = {"quantize.embedding.weight": torch.from_numpy(CODES), "quantize.codebook_used": torch.zeros(4)}
    average = {name: tensor + 1 for name, tensor in state.items()}
    source, out = tmp_path / "m.pt", tmp_path / "o.safetensors"
    torch.save({"model": state, "ema": average, "steps": 3}, source)
    choices = "choose one with --prefix ema.quantize. (LlamaGen), --prefix model.quantize. (LlamaGen)"
    fails(capsys, choices, "import", source, "-o", out)
    assert run(capsys, "import", source, "-o", out, "--prefix", "ema.quantize.")[0] == 0
    assert np.array_equal(load_codebook(out).quantizer.embedding.weight.detach().numpy(), CODES + 1)


@pytest.mark.parametrize(
    "wrap", [lambda state: {f"module.{name}": state[name] for name in state}, lambda s: {"shadow": s}]
)
def test_a_moving_average_in_wrappers_of_its_own_is_a_choice_too(tmp_path, capsys, wrap):
    state = {"quantize.embedding.weight": torch.from_numpy(CODES)}
    source = tmp_path / "m.pt"
    torch.save({"model": state, "ema": wrap(state)}, source)
    fails(capsys, "it has several quantizers", "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2")


@pytest.mark.parametrize("kind", ["cosine", "cosine_all", "dot", "dot_all"])
def test_our_own_keys_do_not_tell_the_metric(tmp_path, capsys, make_quantizer, kind):
    quantizer = make_quantizer(kind).float()
    source, out = write(tmp_path / "m.pt", quantizer.state_dict()), tmp_path / "o.safetensors"
    fails(capsys, "does not define the metric: VectorQuantizer, CosineQuantizer", "import", source, "-o", out)
    flags = ["--metric", quantizer.kind]
    if quantizer.kind == "cosine":
        flags += ["--decode", "normalized" if quantizer.decode_normalized else "raw"]
    unknown = "extra" if kind == "cosine_all" else "9"
    assert run(capsys, "import", source, "-o", out, *flags, "--unknown-index", unknown)[0] == 0
    assert load_codebook(out).digest == codebook_digest(quantizer)


def test_a_residual_codebook_at_the_root_and_another_one_are_a_choice(tmp_path, capsys):
    state = {f"layers.0._codebook.{name}": CODES[None] for name in ("embed", "embed_avg")}
    state |= {"layers.0._codebook.initted": np.ones(1), "prior.quantize.embedding.weight": CODES}
    source = write(tmp_path / "m.pt", state)
    fails(capsys, "it has several quantizers", "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2")


def test_codes_in_columns_are_an_error_if_counts_say_so(tmp_path, capsys):
    state = {"quantize_t.embed": CODES.T.copy(), "quantize_t.cluster_size": CODES[:, 0].copy()}
    source, out = write(tmp_path / "m.pt", state), tmp_path / "o.safetensors"
    flags = ["--metric", "l2", "--key", "quantize_t.embed"]
    fails(capsys, "its codes are the columns: pass --transpose", "import", source, "-o", out, *flags)
    source = write(tmp_path / "c.npy", CODES.T)
    _, text, _ = run(capsys, "import", source, "-o", out, "--metric", "l2")
    assert "note  array was read as 4 codes of width 10; if the columns are the codes, pass --transpose" in text


def test_a_note_names_snac(tmp_path, capsys):
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(5, 3, 1))
    back = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(3, 5, 1))
    state = {f"in_proj.{name}": value for name, value in layer.state_dict().items()}
    state |= {f"out_proj.{name}": value for name, value in back.state_dict().items()}
    state["codebook.weight"] = torch.ones(4, 3)
    source = write(tmp_path / "m.pt", {f"quantizer.quantizers.0.{name}": value for name, value in state.items()})
    _, text, _ = run(capsys, "import", source, "-o", tmp_path / "o.safetensors")
    assert "note  SNAC has these keys too" in text


def test_an_average_without_dots_is_pointed_out(tmp_path, capsys):
    names = ("quantize.embedding.weight", "model_ema.quantizeembeddingweight")
    source = write(tmp_path / "m.ckpt", dict.fromkeys(names, CODES))
    _, text, _ = run(capsys, "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2")
    assert "--key model_ema.quantizeembeddingweight --metric l2 imports it" in text


def test_a_language_model_s_embedding_is_no_second_quantizer(tmp_path, capsys):
    state = {"embedding.weight": CODES, "head.weight": CODES, "regularization.embedding.weight": CODES}
    source = write(tmp_path / "m.pt", state)
    _, text, _ = run(capsys, "import", source, "-o", tmp_path / "o.safetensors")
    assert "took  regularization.embedding.weight" in text


def test_many_layers_are_listed_by_module(tmp_path, capsys):
    at = "first_stage_model."
    state = {f"{at}encoder.down.{i}.weight": np.zeros(2) for i in range(25)}
    state |= {f"{at}quant_conv.weight": np.zeros(2), f"{at}quant_conv.bias": np.zeros(2), "logit_scale": np.zeros(1)}
    source = write(tmp_path / "m.ckpt", {**state, f"{at}quantize.embedding.weight": CODES})
    _, text, _ = run(capsys, "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2")
    left = [line.removeprefix("left  ") for line in text.splitlines() if line.startswith("left  ")]
    assert left == [f"{at}encoder.*  (25 arrays)", f"{at}quant_conv.*  (2 arrays)", "logit_scale"]


def heads(count: int, width: int = 4) -> dict[str, np.ndarray]:
    return {"_codebook.initted": np.array(True), "_codebook.embed": np.ones((count, 10, width), np.float32)}


def stage(i: int, codes: int = 10, width: int = 4) -> dict[str, np.ndarray]:
    return {f"layers.{i}._codebook.inited": np.ones(1), f"layers.{i}._codebook.embed": np.ones((codes, width), "f4")}


def layer(at: str, outputs: int = 4, inputs: int = 4) -> dict[str, np.ndarray]:
    return {f"{at}.weight": np.ones((outputs, inputs), np.float32), f"{at}.bias": np.ones(outputs, np.float32)}


def normed(**changed: np.ndarray) -> dict[str, np.ndarray]:
    at = "quantizers.0."
    plain = {"codebook.weight": CODES, "in_proj.weight_g": np.ones((4, 1, 1), "f4"), **changed}
    plain.setdefault("in_proj.weight_v", np.ones((4, 6, 1), np.float32))
    return {f"{at}{name}": array for name, array in plain.items()} | layer(f"{at}out_proj", 6)


LUCIDRAINS = ["--metric", "l2"]
MIMI = {f"rvq_first.vq.layers.0._codebook.{name}": CODES for name in ("embedding_sum",)}
USAGE = {"rvq_first.vq.layers.0._codebook.cluster_usage": np.ones(10, np.float32)}


@pytest.mark.parametrize(
    ("state", "args", "match"),
    [
        (heads(2) | layer("project_in", 8, 6) | layer("project_out", 6, 8), LUCIDRAINS, "its 2 heads share one"),
        (heads(1) | layer("project_in", 8, 6) | layer("project_out", 6, 8), LUCIDRAINS, "several heads that share"),
        (heads(1), ["--metric", "dot"], "is not searched by dot: pass --metric l2 or --metric cosine"),
        (heads(1), ["--metric", "cosine", "--decode", "normalized"], "decodes to raw rows"),
        (heads(1) | {"_codebook.batch_mean": np.ones(4)}, LUCIDRAINS, "_codebook.batch_mean (4) too"),
        (heads(1) | layer("project_in.0"), LUCIDRAINS, "project_in.0.bias (4), project_in.0.weight (4x4) too"),
        (heads(1) | layer("project_in"), LUCIDRAINS, "'project_out.weight' is missing"),
        ({f"layers.0.{name}": array for name, array in heads(2).items()}, LUCIDRAINS, "has 2 heads"),
        (
            {**{f"layers.{i}.{n}": a for i in (0, 1) for n, a in heads(1).items()}, **layer("mlps.0.proj_in")},
            LUCIDRAINS,
            "mlps.0.proj_in.bias (4), mlps.0.proj_in.weight (4x4) too",
        ),
        (stage(0) | stage(2), [], "layers.1 is missing, and later ones exist"),
        (stage(0) | layer("in_proj.1"), [], "layers.1 is missing, and in_proj.1.weight is for 2"),
        (stage(0) | {"cluster_size": np.ones((3, 10))}, [], "layers.1 is missing, and cluster_size is for 3"),
        (stage(0) | {"layers.1._codebook.cluster_size": np.ones(10)}, [], "'layers.1._codebook.embed' is missing"),
        (
            {f"rvqs.{g}.layers.{i}.{n}": a for g, i in ((0, 0), (0, 1), (1, 0)) for n, a in heads(1).items()},
            LUCIDRAINS,
            "its groups have different numbers of stages",
        ),
        (stage(0) | stage(1, width=5), [], "different widths, 10x4 and 10x5: all codes must have one width"),
        (stage(0), ["--metric", "cosine"], "EnCodec is searched by l2, not --metric cosine"),
        (stage(0), ["--decode", "raw"], "--decode is for --metric cosine, not l2"),
        (stage(0) | {"layers.0.norm.weight": np.ones(4)}, [], "layers.0.norm.weight (4) too"),
        (stage(0), ["--kind", "vq"], "the checkpoint is of kind rvq, not --kind vq"),
        (stage(0), ["--levels", "8,8"], "--levels has no meaning for kind rvq"),
        (stage(0), ["--spherical"], "--spherical has no meaning for kind rvq"),
        (normed(), ["--metric", "l2"], "DAC is searched by cosine, not --metric l2"),
        (normed(**{"in_proj.weight_g": np.ones((3, 1, 1), "f4")}), [], "should have a norm for each output"),
        (normed(**{"in_proj.weight_v": np.zeros((4, 6, 1), "f4")}), [], "has an output of zeros"),
        (normed(**{"in_proj.weight_v": np.ones((4, 6, 3), "f4")}), [], "a projection maps single elements"),
        (
            normed(**{"in_proj.weight_g": np.full((4, 1, 1), 3e38, "f4"), "in_proj.bias": np.ones(3, "f4")}),
            [],
            "its bias and weight do not fit together",
        ),
        (MIMI, [], "cluster_usage' is missing"),
        (
            {name: array * np.float32(1e37) for name, array in MIMI.items()}
            | {n: a * 1e-9 for n, a in USAGE.items()}
            | {"rvq_rest.x": CODES},
            [],
            "exceeds float32's range",
        ),
        (
            {"frozen_codebook": np.full((3, 4), 3e38, "f4"), **layer("code_transform")},
            [],
            "makes codes beyond float32's range",
        ),
        ({"_codebook.embed": np.ones((0, 3, 4), "f4")}, LUCIDRAINS, "it should be (heads, K, D)"),
        (layer("project_in", 3, 5), ["--kind", "lfq"], "--kind lfq needs --bits"),
        (MIMI | {"rvq_first.vq.layers.0._codebook.cluster_usage": np.ones(9, "f4")}, [], "do not fit together"),
        ({**MIMI, **USAGE}, [], "rvq_rest has no stages"),
        ({"frozen_codebook": CODES, **layer("code_transform", 4, 3)}, [], "does not take rows of the frozen codebook"),
        (
            {"frozen_codebook": CODES, **layer("code_transform.0")},
            [],
            "code_transform.0.bias (4), code_transform.0.weight (4x4) too",
        ),
        ({"frozen_codebook": CODES, **layer("code_transform")}, ["--metric", "dot"], "SimVQ is searched by l2"),
        ({"mask": np.array([1, 2, 5])}, [], "does not hold powers of two"),
        ({"mask": np.array([4, 2, 1])}, ["--kind", "lfq", "--bits", "4"], "its mask has bits 3, not --bits 4"),
        ({"mask": np.array([4, 2, 1])}, ["--bit-order", "little"], "its mask has bit-order big, not --bit-order"),
        ({"a.mask": np.array([4, 2, 1]), "a.w": CODES}, [], "name the codebook, likely ones first: --key a.w (10x4)"),
        (layer("project_in", 6, 5), ["--kind", "lfq", "--bits", "3"], "several codebooks side by side"),
        ({"orthogonal_rot": np.eye(2)}, ["--kind", "fsq", "--levels", "8,5"], "a rotation is not supported"),
        (
            layer("a.project_in") | layer("b.project_in"),
            ["--kind", "lfq", "--bits", "4"],
            "pass --prefix a. or --prefix b.",
        ),
        ({"w": CODES}, ["--kind", "fsq"], "--kind fsq needs --levels"),
        ({"w": CODES}, ["--kind", "fsq", "--levels", "8,1"], "must be a list of integers in [2, 65536]"),
        ({"w": CODES}, ["--kind", "lfq", "--bits", "40"], "must be an integer in [1, 32]"),
        ({"w": CODES}, ["--kind", "fsq", "--levels", "8,5", "--metric", "l2"], "--metric has no meaning for kind fsq"),
        ({"a": CODES, "b": CODES[:, :2]}, ["--key", "a", "--key", "b", "--metric", "l2"], "10x2 and 10x4"),
        ({"a": CODES[None, None]}, ["--key", "a", "--metric", "l2", "--kind", "rvq"], "an array (K, D) for each stage"),
        ({"a": CODES[:0][None][:0]}, ["--key", "a", "--metric", "l2", "--kind", "rvq"], "a has no stages"),
        (
            {"a": CODES[None]},
            ["--key", "a", "--metric", "l2"],
            "and 1 of them may be the stages of a residual quantizer",
        ),
    ],
)
def test_checkpoints_that_are_not_held(tmp_path, capsys, state, args, match):
    source = write(tmp_path / "m.npz", state)
    fails(capsys, match, "import", source, "-o", tmp_path / "o.safetensors", *args)
    assert not (tmp_path / "o.safetensors").exists()


def test_without_a_file_most_kinds_are_nothing(tmp_path, capsys):
    out = tmp_path / "o.safetensors"
    for args in ([], ["--kind", "vq"], ["--kind", "rvq", "--metric", "l2"]):
        fails(capsys, "name a file to import", "import", "-o", out, *args)
    fails(capsys, "--kind lfq needs --bits", "import", "-o", out, "--kind", "lfq")
    _, text, _ = run(capsys, "import", "-o", out, "--kind", "lfq", "--bits", "5", "--spherical", "--bit-order", "big")
    arguments = load_codebook(out).arguments
    assert (arguments["bits"], arguments["bit_order"], arguments["spherical"]) == (5, "big", True)
    assert "note" not in text
    run(capsys, "import", "-o", out, "--kind", "fsq", "--levels", "8,5", "--bound", "tan", "--force")
    assert (load_codebook(out).arguments["bound"], load_codebook(out).quantizer.levels) == ("tan", (8, 5))


def test_defaults_are_notes(tmp_path, capsys):
    out = tmp_path / "o.safetensors"
    _, text, _ = run(capsys, "import", "-o", out, "--kind", "lfq", "--bits", "5")
    assert "the bit order is big" in text
    assert "codes are -1 and 1" in text
    _, text, _ = run(capsys, "import", "-o", out, "--kind", "fsq", "--levels", "8,5", "--force")
    assert "the bound is atanh" in text


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_the_layout_is_kept(tmp_path, capsys, layout):
    source, out = write(tmp_path / "c.npy", CODES), tmp_path / "o.safetensors"
    assert run(capsys, "import", source, "-o", out, "--metric", "l2", "--layout", layout)[0] == 0
    assert load_codebook(out).quantizer.layout == layout
    residual = ["--metric", "l2", "--kind", "rvq", "--layout", layout, "--force"]
    assert run(capsys, "import", source, "-o", out, *residual)[0] == 0
    assert (load_codebook(out).kind, load_codebook(out).quantizer.layout) == ("rvq", layout)


def test_the_first_names_of_lucidrains(tmp_path, capsys):
    # Before it had heads its codebook had two axes, as EnCodec's has, which took it over: the metric is open here.
    state = {"_codebook.initted": np.ones(1), "_codebook.embed": CODES}
    source = write(tmp_path / "m.pt", {f"layers.0.{name}": array for name, array in state.items()})
    out = tmp_path / "o.safetensors"
    fails(capsys, "pass --metric l2 or --metric cosine", "import", source, "-o", out)
    assert run(capsys, "import", source, "-o", out, "--metric", "l2")[0] == 0
    assert np.array_equal(load_codebook(out).quantizer.parts[0].stages[0].embedding.weight.detach().numpy(), CODES)


def test_two_tensors_of_one_dotted_name(tmp_path, capsys):
    source = tmp_path / "m.pt"
    torch.save({"q": {"embedding": {"weight": torch.zeros(3, 2)}}, "q.embedding.weight": torch.ones(3, 2)}, source)
    fails(capsys, "it has two tensors 'q.embedding.weight'", "import", source, "-o", tmp_path / "o.safetensors")


def test_llamagen_without_l2_norm(tmp_path, capsys):
    source, out = tmp_path / "m.pt", tmp_path / "o.safetensors"
    write(source, {"quantize.embedding.weight": CODES, "quantize.codebook_used": np.zeros(9, np.float32)})
    assert run(capsys, "import", source, "-o", out, "--metric", "l2")[0] == 0
    assert load_codebook(out).kind == "vq"
    fails(capsys, "LlamaGen decodes to normalized rows", "import", source, "-o", tmp_path / "p.safetensors",
          "--decode", "raw")  # fmt: skip


def test_an_ambiguous_name_with_the_metric(tmp_path, capsys):
    source = write(tmp_path / "m.pt", {"quantize.embedding.weight": CODES, "quant_conv.weight": CODES})
    out = tmp_path / "o.safetensors"
    assert run(capsys, "import", source, "-o", out, "--prefix", "quantize", "--metric", "l2")[0] == 0
    assert load_codebook(out).kind == "vq"


def test_latents_come_from_behind_a_convolution_that_is_left(tmp_path, capsys):
    def notes(**arrays) -> list[str]:
        state = {name.replace("__", "."): value for name, value in arrays.items()}
        source = write(tmp_path / "m.pt", {**state, "ae.quantize.embedding.weight": CODES})
        flags = ["--metric", "l2", "--force"]
        _, text, _ = run(capsys, "import", source, "-o", tmp_path / "o.safetensors", *flags)
        assert text.startswith("found  a quantizer of taming-transformers or sgm under ae.quantize.\n")
        return [line for line in text.splitlines() if line.startswith("note")]

    note = "was left: the latents to encode are its output"
    assert notes(ae__quant_conv__weight=CODES, ae__quant_conv__bias=CODES) == [f"note  ae.quant_conv {note}"]
    # What is behind the codes, or belongs to another model.
    assert notes(ae__post_quant_conv__weight=CODES, ae2__quant_conv__weight=CODES) == []
    key = ["--key", "ae.quantize.embedding.weight", "--metric", "l2", "--force"]
    source = write(tmp_path / "m.npz", {key[1]: CODES, "ae.quant_conv.conv.weight": CODES})
    assert f"note  ae.quant_conv {note}\n" in run(capsys, "import", source, "-o", tmp_path / "o.safetensors", *key)[1]


@pytest.mark.parametrize(
    ("metric", "equal", "note"),
    [
        ("l2", {7: 2}, "1 code is a duplicate: "),
        ("l2", {7: 2, 9: 2}, "2 codes are duplicates: "),
        ("dot", {3: 0, 9: 5}, "2 codes are duplicates: "),
        ("cosine", {4: 1}, "1 code is a duplicate: "),
    ],
)
def test_equal_codes_are_counted(tmp_path, capsys, metric, equal, note):
    codes = CODES.copy()
    for code, earlier in equal.items():
        codes[code] = codes[earlier]
    source, out = write(tmp_path / "c.npy", codes), tmp_path / "o.safetensors"
    decode = ["--decode", "raw"] if metric == "cosine" else []
    _, text, _ = run(capsys, "import", source, "-o", out, "--metric", metric, *decode)
    assert f"note  {note}the lowest index of equal codes is used\n" in text
    found = load_codebook(out).quantizer.encode(torch.from_numpy(codes)).tolist()
    if metric != "dot":
        assert found == [equal.get(code, code) for code in range(10)]
    assert not set(equal) & set(found)


def test_equal_codes_of_stages_are_counted_in_each(tmp_path, capsys):
    stages = np.stack([CODES, CODES, CODES])
    stages[1, 6] = stages[1, 5]
    stages[2, 1:4] = stages[2, 0]
    source = write(tmp_path / "c.npy", stages)
    _, text, _ = run(capsys, "import", source, "-o", tmp_path / "o.safetensors", "--kind", "rvq", "--metric", "l2")
    assert "note  4 codes are duplicates: " in text


# Files that lie, and files that would run code.


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("how", ["torch", "torch_legacy", "pickle", "npy", "npz"])
def test_no_pickle_is_run(tmp_path, capsys, suffix, how):
    marker, source = tmp_path / "marker", tmp_path / f"evil{suffix}"
    evil = {"embedding.weight": torch.zeros(2, 2), "x": Evil(marker)}
    with source.open("wb") as file:
        match how:
            case "torch":
                torch.save(evil, file)
            case "torch_legacy":
                torch.save(evil, file, _use_new_zipfile_serialization=False)
            case "pickle":
                pickle.dump(evil, file)
            case "npy":
                np.save(file, np.array([Evil(marker)], object))
            case "npz":
                np.savez(file, a=np.array([Evil(marker)], object))
    fails(capsys, "evil", "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2", "--key", "a")
    assert not marker.exists()
    assert not (tmp_path / "o.safetensors").exists()


def test_a_whole_pickled_model_is_its_state_dict(tmp_path, capsys):
    source, out, quantizer = tmp_path / "whole.pt", tmp_path / "o.safetensors", VectorQuantizer(3, 2)
    torch.save(quantizer, source)
    assert run(capsys, "import", source, "-o", out, "--metric", "l2")[0] == 0
    assert load_codebook(out).digest == codebook_digest(quantizer)


def npy_header(shape, descr="<f4", version=1) -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


@pytest.mark.parametrize("shape", [(1 << 40, 8), (1 << 62, 1 << 62), (-1, 8), (-2, -4), (3, 5)])
def test_an_npy_header_that_lies(tmp_path, capsys, shape):
    source = tmp_path / "c.npy"
    source.write_bytes(npy_header(shape) + bytes(32))
    fails(capsys, "and has 32", "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2")


def test_an_npy_header_without_elements_and_with_an_endless_axis(tmp_path, capsys, recwarn):
    source = tmp_path / "c.npy"
    source.write_bytes(npy_header((0, 1 << 63)))
    fails(
        capsys, "claims 0 bytes for shape (0, 9223372036854775808)", "import", source, "-o", tmp_path / "o.safetensors"
    )
    assert not recwarn.list


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (npy_header((1 << 40, 8)) + bytes(32), "claims 35184372088832 bytes for shape (1099511627776, 8) and has 32"),
        (npy_header((2, 4)) + bytes(33), "claims 32 bytes for shape (2, 4) and has 33"),
        (npy_header((2, 4), version=3) + bytes(32), "format (3, 0)"),
        (npy_header((2, 4), descr="|O") + bytes(64), "Python objects"),
        (b"noise", "a.npy is not a .npy file"),
    ],
)
def test_npz_members_that_lie(tmp_path, capsys, data, match):
    source = archive(tmp_path / "c.npz", {"a.npy": data})
    fails(capsys, match, "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2", "--key", "a")


def test_an_npz_of_the_second_version(tmp_path, capsys):
    source = archive(tmp_path / "c.npz", {"a.npy": npy_header((2, 4), version=2) + bytes(32), "readme": b"x"})
    assert run(capsys, "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2", "--key", "a")[0] == 0


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".npy"])
def test_arrays_beyond_the_limit_are_not_unpacked(tmp_path, capsys, monkeypatch, suffix):
    # A zip bomb is honest about its size: the limit stops it, here a small one.
    monkeypatch.setattr(foreign_array, "MAX_ARRAY_BYTES", 1000)
    codes = np.zeros((100, 4), np.float32)
    source = write(tmp_path / f"c{suffix}", codes if suffix == ".npy" else {"a": codes})
    key = [] if suffix == ".npy" else ["--key", "a"]
    fails(
        capsys, "1600 bytes, more than 1000", "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2", *key
    )


def test_a_tensor_of_zero_strides_cannot_claim_memory(tmp_path, capsys):
    source = tmp_path / "c.pt"
    torch.save({"a": torch.zeros(1, 1).expand(1 << 13, 1 << 13), "b": torch.zeros(3, 3).to_sparse()}, source)
    args = ["import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2", "--key"]
    fails(capsys, "claims 268435456 bytes, more than the file has for it", *args, "a")
    fails(capsys, "not a dense tensor", *args, "b")


@pytest.mark.parametrize("suffix", [".npy", *SUFFIXES])
def test_noise_and_truncation(tmp_path, capsys, suffix):
    good = write(tmp_path / f"good{suffix}", CODES if suffix == ".npy" else {"a": CODES}).read_bytes()
    source = tmp_path / f"bad{suffix}"
    for data in (b"", b"\x00" * 50, b"noise" * 50, good[:-40], good[: len(good) // 2], good[:20]):
        source.write_bytes(data)
        key = [] if suffix == ".npy" else ["--key", "a"]
        fails(capsys, "bad", "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2", *key)


def test_text_is_no_npy(tmp_path, capsys):
    source = tmp_path / "text.npy"
    for text in ("1 2 3", "0.5 1.5 2.5\n"):
        source.write_text(text)
        err = fails(capsys, "error: ", "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2")
        assert err == "vqserved: error: text.npy is not a .npy file\n"


def test_other_files(tmp_path, capsys):
    fails(capsys, "no such file", "import", tmp_path / "none.pt", "-o", tmp_path / "o.safetensors")
    other = tmp_path / "other.h4"
    other.write_bytes(bytes(10))
    fails(capsys, "files of type '.h4' are not read", "import", other, "-o", tmp_path / "o.safetensors")
    source = tmp_path / "list.pt"
    torch.save([torch.zeros(2, 2)], source)
    fails(capsys, "likely ones first: --key 0 (2x2)", "import", source, "-o", tmp_path / "o.safetensors")
    torch.save([1, 2], source)
    fails(capsys, "holds an object of type list, and no tensors", "import", source, "-o", tmp_path / "o.safetensors")
    codebook = tmp_path / "c.safetensors"
    save_codebook(VectorQuantizer(3, 2), codebook)
    fails(capsys, "already a codebook file of vqserve", "import", codebook, "-o", tmp_path / "o.safetensors")
    exotic = tmp_path / "f8.safetensors"
    save_file({"a": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, exotic)
    fails(capsys, "of type F8_E4M3", "import", exotic, "-o", tmp_path / "o.safetensors", "--metric", "l2", "--key", "a")


def test_an_empty_axis_beside_a_huge_one(tmp_path, capsys):
    entry = {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}
    header = json.dumps({"a": entry}).encode()
    source = tmp_path / "c.safetensors"
    source.write_bytes(struct.pack("<Q", len(header)) + header)
    fails(
        capsys, "of shape (0, 46116", "import", source, "-o", tmp_path / "o.safetensors", "--metric", "l2", "--key", "a"
    )


def test_lack_of_memory_is_one_line(tmp_path, monkeypatch):
    def greedy(*args, **options):
        raise MemoryError

    monkeypatch.setattr(np.lib.format, "read_array", greedy)
    source = write(tmp_path / "c.npy", CODES)
    with pytest.raises(ForeignCheckpointError, match="more memory than this machine has"):
        import_checkpoint(source, Options(metric="l2"))


# Usage.


def test_the_source_is_not_replaced_by_what_is_made_of_it(tmp_path, capsys):
    source = write(tmp_path / "m.safetensors", {"quantize.embedding.weight": CODES, "decoder.weight": CODES + 1})
    before = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    for out in (source, tmp_path / "link.safetensors"):
        flags = ["--metric", "l2", "--force"]
        fails(capsys, "is what is read: name another file to write", "import", source, "-o", out, *flags)
    assert source.read_bytes() == before
    (tmp_path / "folder.safetensors").mkdir()
    fails(capsys, "is a folder: name a file", "import", source, "-o", tmp_path / "folder.safetensors", "--metric", "l2")


def test_an_output_that_is_there_is_kept(tmp_path, capsys):
    source = write(tmp_path / "c.npy", CODES)
    out = tmp_path / "o.safetensors"
    out.write_text("precious")
    fails(capsys, f"error: {out} is there already: pass --force", "import", source, "-o", out, "--metric", "l2")
    assert out.read_text() == "precious"
    assert run(capsys, "import", source, "-o", out, "--metric", "l2", "--force")[0] == 0
    load_codebook(out)
    missing = tmp_path / "no"
    error = f"there is no folder {missing}: make it first"
    fails(capsys, error, "import", source, "-o", missing / "o.safetensors", "--metric", "l2")


@pytest.mark.parametrize(
    "args",
    [
        ["import"],
        ["import", "x.npy"],
        ["import", "x.npy", "-o", "o.safetensors", "--metric", "l1"],
        ["import", "x.npy", "-o", "o.safetensors", "--key", "a", "--prefix", "b"],
        ["import", "x.npy", "-o", "o.safetensors", "--unknown-index", "last"],
        ["import", "x.npy", "-o", "o.safetensors", "--kind", "vqvae"],
        ["import", "x.npy", "-o", "o.safetensors", "--decode", "unit"],
        ["import", "x.npy", "-o", "o.safetensors", "--levels", "8;5"],
        ["import", "x.npy", "-o", "o.safetensors", "--bound", "tanh"],
        ["import", "x.npy", "-o", "o.safetensors", "--bit-order", "middle"],
        ["import", "x.npy", "-o", "o.safetensors", "--layout", "nchw"],
        ["import", "x.npy", "-o", "o.safetensors", "--verify", "z.npy"],
        ["import", "x.npy", "-o", "o.safetensors", "--unknown-index", "-1"],
        ["inspect"],
        ["inspect", "a", "--layout", "nchw"],
    ],
)
def test_wrong_usage(capsys, args):
    status, _, err = run(capsys, *args)
    assert status == 2
    assert err.endswith(" --help` lists the options\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["import", "train"])
@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("book", "book.safetensors"),
        ("book.pt", "book.safetensors"),
        ("book.npy", "book.safetensors"),
        ("v1.5", "v1.5.safetensors"),
    ],
)
def test_an_output_that_a_served_folder_would_skip_is_rejected(tmp_path, capsys, command, name, better):
    source = write(tmp_path / "c.npy", CODES)
    more = ["--metric", "l2"] if command == "import" else ["--num-codes", "2", "--steps", "1"]
    status, out, err = run(capsys, command, source, "-o", tmp_path / name, *more)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == (
        f"vqserved {command}: error: argument -o/--out: {name!r} must end in .safetensors, "
        f"or a served folder leaves it out: name it {better!r}; `vqserved {command} --help` lists the options"
    )
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("command", ["import", "train"])
@pytest.mark.parametrize("name", ["my book.safetensors", "book@2.safetensors", ".safetensors.safetensors"])
def test_an_output_that_could_not_be_served_is_rejected(tmp_path, capsys, command, name):
    status, _, err = run(capsys, command, write(tmp_path / "c.npy", CODES), "-o", tmp_path / name)
    assert status == 2
    assert f"argument -o/--out: {name!r} cannot be served under its name: use letters, digits and . _ + -;" in err


def test_nothing_that_is_read_is_written_over(tmp_path, capsys):
    source = write(tmp_path / "codes.safetensors", {"embedding.weight": CODES})
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    latents = tmp_path / "latents.safetensors"
    latents.write_bytes(write(tmp_path / "z.npy", CODES).read_bytes())
    before = source.read_bytes()
    for out in (source, link):
        fails(capsys, "is what is read", "import", source, "-o", out, "--metric", "l2", "--force")
    assert source.read_bytes() == before
    before = latents.read_bytes()
    fails(capsys, "is what is read", "train", latents, "-o", latents, "--force")
    fails(capsys, "is what is read", "import", source, "-o", latents, "--force", "--verify", latents, latents)
    assert latents.read_bytes() == before


def test_stages_and_layout_of_a_residual_codebook_are_printed(tmp_path, capsys):
    source = write(tmp_path / "codes.npy", np.stack([CODES] * 3))
    out = tmp_path / "o.safetensors"
    _, text, _ = run(capsys, "import", source, "-o", out, "--kind", "rvq", "--metric", "l2")
    assert f"wrote {out}: rvq, 3 stages of 10 codes, digest " in text
    assert "note  latents of 3 to 5 axes are channels_first where a call does not say\n" in text


def test_levels_are_one_argument(tmp_path, capsys):
    out = tmp_path / "o.safetensors"
    status, _, err = run(capsys, "import", "-o", out, "--kind", "fsq", "--levels", "8", "5", "5")
    assert status == 2
    assert "vqserved import: error: --levels is one argument, with commas: --levels 8,5,5;" in err
    status, _, err = run(capsys, "import", "-o", out, "--kind", "fsq", "--levels", "8,5", "x", "y")
    assert status == 2
    assert err == ("vqserved import: error: unrecognized arguments: y; `vqserved import --help` lists the options\n")


def test_a_long_list_of_candidates_is_complete(tmp_path, capsys):
    arrays = {f"layer{i}.weight": np.zeros((2, i + 1), np.float32) for i in range(30)}
    source, out = write(tmp_path / "m.npz", arrays), tmp_path / "o.safetensors"
    err = fails(capsys, "likely ones first", "import", source, "-o", out)
    assert all(f"--key layer{i}.weight (2x{i + 1})" in err for i in range(30))
    _, text, _ = run(capsys, "import", source, "-o", out, "--key", "layer3.weight", "--metric", "l2")
    assert text.count("left  ") == 21
    assert "left  and 9 more" in text


def test_names_in_a_file_do_not_move_the_cursor(tmp_path, capsys):
    source = write(tmp_path / "m.pt", {"a\x1b[2Jb": CODES, "c\x1b[2J": CODES})
    fails(capsys, "a\\x1b[2Jb' (10x4)", "import", source, "-o", tmp_path / "o.safetensors")
    _, text, _ = run(capsys, "import", source, "-o", tmp_path / "o.safetensors", "--key", "a\x1b[2Jb", "--metric", "l2")
    assert "\x1b" not in text


def test_the_daemons_own_command(tmp_path):
    source = write(tmp_path / "c.npy", CODES)
    out = tmp_path / "o.safetensors"
    command = [sys.executable, "-m", "vqserve_tools", "import", source, "-o", out, "--metric", "l2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_codebook(out).digest in done.stdout


def test_parsers_give_run():
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    commands.add_import_parser(subparsers)
    inspection_commands.add_inspect_parser(subparsers)
    assert parser.parse_args(["inspect", "x"]).run is inspection_commands.run_inspect
    assert parser.parse_args(["import", "x", "-o", "y.safetensors"]).unknown_index == "random"


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    source = tmp_path / "c.npy"
    np.save(source, np.zeros((3, 2), np.float32))
    fails(capsys, "there is no folder", "import", source, "-o", tmp_path / "none" / "o.safetensors", "--metric", "l2")


def test_a_folder_that_this_user_may_not_write_is_named(tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "c.npy", CODES)
    # Root may write anywhere: only the answer is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    fails(
        capsys,
        f"cannot write into the folder {tmp_path}",
        "import",
        source,
        "-o",
        tmp_path / "o.safetensors",
        "--metric",
        "l2",
    )


# --dry-run.


def test_a_dry_run_prints_a_table_and_writes_nothing(tmp_path, capsys):
    state = {
        "quantize.embedding.weight": CODES,
        "quantize.codebook_used": np.zeros(5, np.int64),
        "encoder.w": np.zeros((2, 3), np.float16),
    }
    source = write(tmp_path / "m.pt", state)
    for output in ([], ["-o", tmp_path / "o.safetensors"]):
        status, text, err = run(capsys, "import", source, "--dry-run", *output)
        assert (status, err) == (0, "")
        lines = text.splitlines()
        assert lines[:5] == [
            "found  LlamaGen under quantize.",
            "key                        shape  dtype    for",
            "quantize.embedding.weight  10x4   float32  taken: codes",
            "quantize.codebook_used     5      int64    left: running average, moment or counter",
            "encoder.w                  2x3    float16  left: -",
        ]
        assert lines[5].startswith("note  codebook_used is LlamaGen's")
        assert lines[-1] == "would make  cosine, 10 codes; nothing was written"
    assert list(tmp_path.iterdir()) == [source]


def test_a_dry_run_names_projections_and_averages(tmp_path, capsys):
    source = write(tmp_path / "m.pt", normed(**{"in_proj.bias": np.ones(4, np.float32)}))
    _, text, _ = run(capsys, "import", source, "--dry-run")
    assert "quantizers.0.in_proj.weight_v  4x6x1  float32  taken: part of the quantizer" in text
    source = write(tmp_path / "c.npy", CODES)
    assert "array  10x4   float32  taken: codes" in run(capsys, "import", source, "--dry-run", "--metric", "l2")[1]
    _, text, _ = run(capsys, "import", "--dry-run", "--kind", "lfq", "--bits", "5")
    assert "would make  lfq, 32 codes" in text


def test_a_dry_run_of_a_failing_import_lists_the_arrays(tmp_path, capsys):
    source = write(tmp_path / "m.npz", {"a": CODES, "b.embed_avg": CODES})
    status, text, err = run(capsys, "import", source, "--dry-run")
    assert status == 1
    assert "there is no quantizer at its root" in err
    assert text.splitlines()[1:] == [
        "a            10x4   float32  -",
        "b.embed_avg  10x4   float32  running average, moment or counter",
    ]
    source.write_bytes(b"noise")
    status, text, err = run(capsys, "import", source, "--dry-run")
    assert (status, text, err.count("\n")) == (1, "", 1)


def test_a_dry_run_verifies_too(tmp_path, capsys):
    source = write(tmp_path / "c.npy", CODES)
    pair = [write(tmp_path / "z.npy", CODES), write(tmp_path / "i.npy", np.arange(10))]
    flags = ["--metric", "l2", "--dry-run", "--verify", *pair]
    assert "\nverified  " in run(capsys, "import", source, *flags)[1]


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("-o", ["a.safetensors", "b.safetensors"]),
        ("--prefix", ["a", "b"]),
        ("--kind", ["rvq", "rvq"]),
        ("--metric", ["l2", "cosine"]),
        ("--decode", ["raw", "normalized"]),
        ("--levels", ["8,5", "8,5,5"]),
        ("--bound", ["tan", "atanh"]),
        ("--bits", ["3", "4"]),
        ("--bit-order", ["big", "little"]),
        ("--layout", ["channels_first", "channels_last"]),
        ("--unknown-index", ["random", "extra"]),
        ("--verify", [("a", "b"), ("c", "d")]),
    ],
)
def test_a_flag_of_one_value_is_not_repeated(capsys, flag, values):
    words = [word for value in values for word in (flag, *([value] if isinstance(value, str) else value))]
    status, _, err = run(capsys, "import", "x.npy", *words)
    assert status == 2
    assert f"{flag}" in err
    assert "it is given twice, and only one value is used: give it once" in err
