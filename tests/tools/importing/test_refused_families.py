"""Checkpoints that are recognised and refused: the error says why, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.foreign.case import layer, linear, normal
from vqserve_server.codebooks import load_codebook
from vqserve_server.tokenizer import Tokenizer
from vqserve_tools import cli

K, D, C = 12, 4, 6


def import_of(arrays: dict[str, np.ndarray], tmp_path: Path, *flags: str) -> tuple[int, Path]:
    source, out = tmp_path / "model.npz", tmp_path / "out.safetensors"
    np.savez(source, **arrays)
    return cli.main(["import", str(source), "-o", str(out), *flags]), out


def refuse(arrays: dict[str, np.ndarray], tmp_path: Path, capsys, *flags: str) -> str:
    status, out = import_of(arrays, tmp_path, *flags)
    text, error = capsys.readouterr()
    assert (status, text, error.count("\n")) == (1, "", 1)
    assert not out.exists()
    return error


def var() -> dict[str, np.ndarray]:
    at = "quantize."
    arrays = {f"{at}embedding.weight": normal(K, D), f"{at}ema_vocab_hit_SV": normal(10, K)}
    for i in range(4):
        arrays |= {
            f"{at}quant_resi.qresi_ls.{i}.weight": normal(D, D, 3, 3),
            f"{at}quant_resi.qresi_ls.{i}.bias": normal(D),
        }
    return arrays


def infinity() -> dict[str, np.ndarray]:
    return {"vae.quantizer.lfq.mask": 2 ** np.arange(9, -1, -1), "vae.decoder.bias": normal(2)}


@pytest.mark.parametrize("flags", [(), ("--metric", "l2"), ("--prefix", "quantize.", "--metric", "l2")])
def test_several_scales(tmp_path, capsys, flags):
    error = refuse(var(), tmp_path, capsys, *flags)
    assert "quantize is a quantizer of several scales" in error
    assert "needs all tokens of an image at once" in error


@pytest.mark.parametrize("left_out", ["ema_vocab_hit_SV", "quant_resi"])
def test_several_scales_by_one_sign_alone(tmp_path, capsys, left_out):
    arrays = {name: array for name, array in var().items() if left_out not in name}
    assert "several scales" in refuse(arrays, tmp_path, capsys, "--metric", "l2")


def test_several_scales_of_signs(tmp_path, capsys):
    error = refuse(infinity(), tmp_path, capsys)
    assert "several scales" in error
    assert "if this one has a single scale, pass --kind lfq --bits" in error
    status, out = import_of(infinity(), tmp_path, "--kind", "lfq", "--bits", "10", "--spherical")
    assert status == 0
    assert Tokenizer.load(out, device="cpu").info.num_codes == 1024


def test_stages_of_signs(tmp_path, capsys):
    arrays = {f"rlfq.layers.{i}.mask": 2 ** np.arange(9, -1, -1) for i in range(3)}
    assert "rlfq is residual lookup-free quantization, which is not supported" in refuse(arrays, tmp_path, capsys)


def test_more_bits_than_an_index_has(tmp_path, capsys):
    arrays = {"quantize.basis": np.ones(36, np.int64), "quantize.group_basis": 2 ** np.arange(8, -1, -1)}
    error = refuse(arrays, tmp_path, capsys)
    assert (
        "its tokens have 36 bits, and an index has at most 32: it would need an index for each group of 9 bits" in error
    )


@pytest.mark.parametrize(
    ("arrays", "flags", "match"),
    [
        ({"q.basis": 2 ** np.arange(6), "q.group_basis": np.arange(3)}, [], "does not hold descending powers of two"),
        ({"q.basis": 2 ** np.arange(5, -1, -1), "q.group_basis": np.arange(3)}, ["--bits", "7"], "not --bits 7"),
        ({"q.basis": np.ones((2, 2), int), "q.group_basis": np.arange(3)}, [], "do not hold a power of two for a bit"),
        ({"rvqs.0.embed": normal(1, K, D), "rvqs.1.embed": normal(1, K, D)}, [], "it has 2 groups"),
        ({"rvqs.0.embed": normal(0, K, D)}, [], "has no stages"),
        ({"rvqs.0.embed": normal(1, K, D), "rvqs.0.shift": normal(2)}, [], "rvqs.0.shift (2) too"),
        ({"_embedding.weight": normal(D, K), "_ema_cluster_size": normal(K)}, [], "a count for each of its K rows"),
        ({"_embedding.weight": normal(K, D), "_ema_w": normal(K, D)}, ["--metric", "dot"], "is searched by l2"),
        ({"vq.dictionary": normal(D, K)}, ["--metric", "l2"], "pass --key vq.dictionary if they are rows"),
        ({"vq.dictionary": normal(K, D), "vq.scale": normal(1)}, ["--metric", "l2"], "vq.scale (1) too"),
        ({"q.embed": normal(K, K), "q.embed_avg": normal(K, K), "q.cluster_size": normal(K)}, [], "does not show"),
        ({"codebooks.0.vocab_usage": normal(K), "codebooks.0.codebook.weight": normal(K, D)}, ["--decode", "raw"],
         "UniTok decodes to normalized rows"),
        ({"vq_layers.0.embedding.weight": normal(K, D), "vq_layers.2.embedding.weight": normal(K, D)}, [],
         "vq_layers.1 is missing"),
        ({"vq_layers.0.embedding.weight": normal(K, D), "vq_layers.0.scale": normal(1)}, [], "vq_layers.0.scale (1)"),
    ],
)  # fmt: skip
def test_what_a_family_does_not_have(tmp_path, capsys, arrays, flags, match):
    assert match in refuse(arrays, tmp_path, capsys, *flags)


def moss(*outer: str) -> dict[str, np.ndarray]:
    arrays = {"quantizers.0.codebook.weight": normal(K, 2)}
    layer(arrays, "quantizers.0.in_proj", C, 2, "new")
    layer(arrays, "quantizers.0.out_proj", 2, C, "new")
    for name in outer:
        layer(arrays, name, 7 if name == "input_proj" else C, C if name == "input_proj" else 8, "new")
    return arrays


def test_a_projection_around_all_stages_without_its_counterpart(tmp_path, capsys):
    assert "'output_proj.weight' is missing" in refuse(moss("input_proj"), tmp_path, capsys, "--metric", "cosine")


def test_decoded_latents_of_another_width(tmp_path, capsys):
    error = refuse(moss("input_proj", "output_proj"), tmp_path, capsys, "--metric", "cosine")
    assert "parts.0.proj_out.weight" in error


def test_the_third_metric_is_none_of_amphion_s(tmp_path, capsys):
    arrays = {"quantizers.0.codebook.weight": normal(K, 2)}
    layer(arrays, "quantizers.0.in_project", C, 2, "old")
    layer(arrays, "quantizers.0.out_project", 2, C, "old")
    assert "RepCodec is not searched by dot" in refuse(arrays, tmp_path, capsys, "--metric", "dot")


def test_s3_tokenizer_s_levels_are_known(tmp_path, capsys):
    arrays = {f"_codebook.{name}": array for name, array in linear("project_down", C, 3).items()}
    error = refuse(arrays, tmp_path, capsys, "--levels", "4,4,4")
    assert "S3Tokenizer has levels 3,3,3, not --levels 4,4,4" in error


def test_two_codebooks_by_name_are_a_choice(tmp_path, capsys):
    arrays = {"a.codebook.weight": normal(K, D), "b.codebook.weight": normal(K, D)}
    error = refuse(arrays, tmp_path, capsys, "--metric", "l2")
    assert "--key a.codebook.weight (12x4)" in error
    assert "--key b.codebook.weight (12x4)" in error


RESIDUAL = ["--kind", "residual_fsq"]
GRID = [*RESIDUAL, "--levels", "5,5", "--stages", "2"]


@pytest.mark.parametrize(
    ("arrays", "flags", "match"),
    [
        ({"a": normal(2)}, RESIDUAL, "needs --levels and --stages"),
        ({"a": normal(2)}, [*RESIDUAL, "--levels", "5,5"], "needs --levels and --stages"),
        ({"a": normal(2)}, GRID, "needs --library-version, for example --library-version 1.17.8, or --bound and"),
        ({"a": normal(2)}, [*GRID, "--bound", "atanh"], "needs --library-version"),
        ({"a": normal(2)}, [*GRID, "--bound", "tan", "--scales", "levels"], "'bound' is 'tan', it must be one of"),
        ({"a": normal(2)}, [*GRID[:-1], "0", "--library-version", "1.32"], "num_quantizers"),
        ({"a": normal(2)}, ["--kind", "fsq", "--levels", "5,5", "--stages", "2"], "--stages has no meaning for kind"),
        ({"a": normal(2)}, ["--kind", "fsq", "--levels", "5,5", "--bound", "soft_clamp"], "is 'soft_clamp', it"),
        ({**linear("rvqs.0.project_in", C, 2), **linear("rvqs.0.project_out", 2, C),
          **linear("rvqs.1.project_in", D, 2), **linear("rvqs.1.project_out", 2, D)},
         [*GRID, "--library-version", "1.32.0"], "its groups have projections of different sizes"),
        ({**linear("rvqs.0.project_in", C, 2), **linear("rvqs.0.project_out", 2, C), "rvqs.0.norm.weight": normal(C)},
         [*GRID, "--library-version", "1.32.0"], "rvqs.0.norm.weight (6) too"),
    ],
)  # fmt: skip
def test_residual_grids_that_are_not_described(tmp_path, capsys, arrays, flags, match):
    assert match in refuse(arrays, tmp_path, capsys, *flags)


@pytest.mark.parametrize("beside", [{}, {"decoder.weight": normal(12, 4)}])
def test_projections_alone_are_of_a_quantizer_without_a_codebook(tmp_path, capsys, beside):
    arrays = {**linear("q.project_in", C, 3), **linear("q.project_out", 3, C), **beside}
    error = refuse(arrays, tmp_path, capsys)
    assert (
        "q.project_in.weight (3x6) is of a quantizer without a codebook: pass --kind fsq or --kind residual_fsq"
        in error
    )
    assert "--levels, 3 numbers" in error
    assert "--key q." not in error


@pytest.mark.parametrize(
    ("version", "bound", "scales"),
    [
        ("1.17.8", "atanh_twice", "levels_minus_one"),
        ("1.18.3", "atanh_twice", "levels_minus_one"),
        ("1.18.5", "atanh", "levels_minus_one"),
        ("1.25.2", "atanh", "levels_minus_one"),
        ("1.26", "soft_clamp", "levels"),
        ("1.32.0", "soft_clamp", "levels"),
    ],
)
def test_a_version_has_the_formula_of_its_sources(tmp_path, version, bound, scales):
    status, path = import_of({"a": normal(2)}, tmp_path, *GRID, "--library-version", version)
    assert status == 0
    arguments = load_codebook(path).arguments
    assert (arguments["bound"], arguments["scales"]) == (bound, scales)


@pytest.mark.parametrize("version", ["1.18.4", "1.33.0", "2.0"])
def test_a_version_whose_formula_is_not_known_is_no_guess(tmp_path, capsys, version):
    error = refuse({"a": normal(2)}, tmp_path, capsys, *GRID, "--library-version", version)
    assert "none of the releases whose formula is known" in error


def test_xcodec_2_s_formula_is_known(tmp_path, capsys):
    arrays = {**linear("quantizer.project_in", 2048, 8), **linear("quantizer.project_out", 8, 2048)}
    error = refuse(arrays, tmp_path, capsys, "--library-version", "1.32.0")
    assert "--library-version of X-Codec 2 (or NeuCodec) is known: leave out --library-version" in error
    flags = ["--levels", ",".join(["4"] * 8), "--stages", "1", "--library-version", "1.32.0"]
    assert import_of(arrays, tmp_path, *RESIDUAL, *flags)[0] == 0
    assert "X-Codec 2 or NeuCodec" in refuse_again(arrays, tmp_path, capsys, "--kind", "fsq", *flags[:2])


def refuse_again(arrays: dict[str, np.ndarray], tmp_path: Path, capsys, *flags: str) -> str:
    (tmp_path / "out.safetensors").unlink()
    capsys.readouterr()
    return refuse(arrays, tmp_path, capsys, *flags)


def test_codes_of_different_widths(tmp_path, capsys):
    arrays = {f"vq_layers.{i}.embedding.weight": normal(K, D + i) for i in range(2)}
    assert "its stages have codes of different widths, 12x4 and 12x5" in refuse(arrays, tmp_path, capsys)


def test_normalised_residuals_are_for_stages(tmp_path, capsys):
    arrays = {"vq.embedding.weight": normal(K, D)}
    error = refuse(arrays, tmp_path, capsys, "--metric", "l2", "--normalize-residuals")
    assert "--normalize-residuals has no meaning for kind vq" in error
