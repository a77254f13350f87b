"""Parts of a quantizer that an import would leave out: each is an error that names them, or is accepted by the user."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vqserve.errors import ForeignCheckpointError
from vqserve_tools.importing.families.names import Modules
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.importer import Import, import_checkpoint

RNG = np.random.default_rng(3)
CODES = RNG.standard_normal((10, 4)).astype(np.float32)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def imported(folder: Path, arrays: dict[str, np.ndarray], **options) -> Import:
    source = folder / "m.pt"
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, source)
    return import_checkpoint(source, Options(**options))


@pytest.mark.parametrize(
    ("name", "beside", "module"),
    [
        ("quantize.embedding.weight", [], "quantize."),
        ("first_stage_model.quantize.embedding.weight", ["first_stage_model.encoder.w"], "first_stage_model.quantize."),
        ("regularization.embedding.weight", [], "regularization."),
        ("quantizer.vq.layers.0._codebook.embed", ["encoder.w"], "quantizer."),
        ("quantizer.semantic_quantizer.quantizers.0.codebook.weight", [], "quantizer."),
        ("generator.quantizer.project_in.weight", ["generator.head.w"], "generator.quantizer."),
        ("encoder.quantizer.rvqs.0.embed", ["encoder.encoder.w"], "encoder.quantizer."),
        ("rq.vq_layers.3.embedding.weight", ["encoder.w", "decoder.w"], "rq."),
        ("vq._embedding.weight", [], "vq."),
        ("_vq_vae._embedding.weight", ["_encoder._conv_1.weight"], "_vq_vae."),
        ("vqvae.quantize_t.embed", ["vqvae.enc_b.w"], "vqvae.quantize_t."),
        ("vq_model.quantize.embedding.weight", ["vq_model.encoder.w"], "vq_model.quantize."),
        ("codebook.weight", ["layers.0.fc1.weight"], "codebook."),
        ("residual_vq.project_in.weight", [], "residual_vq."),
        # No module around these has a quantizer's name.
        ("embedding.weight", [], None),
        ("quant_conv.weight", [], None),
        ("ae.post_quant_conv.weight", [], None),
        ("_pre_vq_conv.weight", [], None),
        ("model_ema.quantizeembeddingweight", ["model_ema.encoderconv_inweight"], None),
        ("head.codes", [], None),
    ],
)
def test_the_module_of_a_quantizer(name, beside, module):
    assert Modules([name, *beside]).quantizer_of(name) == module


def layers(at: str, *names: str, inputs: int = 4, outputs: int = 4) -> dict[str, np.ndarray]:
    return {
        f"{at}{name}.{end}": array
        for name in names
        for end, array in (("weight", RNG.standard_normal((outputs, inputs)).astype("f4")), ("bias", ones(outputs)))
    }


def projections(at: str, outer: int, inner: int) -> dict[str, np.ndarray]:
    return layers(at, "project_in", inputs=outer, outputs=inner) | layers(
        at, "project_out", inputs=inner, outputs=outer
    )


def dac(at: str) -> dict[str, np.ndarray]:
    arrays = {}
    for i in range(2):
        arrays |= layers(f"{at}quantizers.{i}.", "in_proj", inputs=6) | layers(
            f"{at}quantizers.{i}.", "out_proj", outputs=6
        )
        arrays[f"{at}quantizers.{i}.codebook.weight"] = CODES + i
    return arrays


def encodec(at: str, count: int = 3) -> dict[str, np.ndarray]:
    arrays = {}
    for i in range(count):
        arrays[f"{at}layers.{i}._codebook.embed"] = CODES + i
        arrays[f"{at}layers.{i}._codebook.embed_avg"] = CODES
        arrays[f"{at}layers.{i}._codebook.cluster_size"] = ones(10)
    return arrays


VAR = {"quantize.embedding.weight": CODES, "quantize.ema_vocab_hit_SV": ones(10, 10)}
KEY = {"metric": "l2", "keys": ("quantize.embedding.weight",)}
FSQ = {"kind": "fsq", "levels": (4,) * 4}

# Arrays, options, and the names in the error.
LEFT_OUT = {
    # MOSS-Audio-Tokenizer has such layers, under other names.
    "outer_projections_around_dac": (
        dac("quantizer.") | layers("quantizer.", "pre_project", inputs=8, outputs=6),
        {},
        ["quantizer.pre_project.weight (6x8)", "quantizer.pre_project.bias (6)"],
    ),
    "norm_around_encodec": (
        encodec("quantizer.vq.") | {"quantizer.norm.weight": ones(4)},
        {},
        ["quantizer.norm.weight (4)"],
    ),
    "second_quantizer_of_the_same_module": (
        encodec("quantizer.vq.") | {"quantizer.acoustic.levels": ones(3)},
        {},
        ["quantizer.acoustic.levels (3)"],
    ),
    "misspelt_stage": (
        encodec("quantizer.vq.") | {"quantizer.vq.layerz.3._codebook.embed": CODES},
        {},
        ["quantizer.vq.layerz.3._codebook.embed (10x4)"],
    ),
    "scale_at_the_root": (
        encodec("") | {"residual_scale": ones(3)},
        {},
        ["residual_scale (3)"],
    ),
    "scale_in_a_wrapper": (
        {f"module.{name}": array for name, array in {**encodec(""), "residual_scale": ones(3)}.items()},
        {},
        ["module.residual_scale (3)"],
    ),
    "multi_scale_by_key": (
        VAR | {f"quantize.quant_resi.qresi_ls.{i}.weight": ones(2, 2) for i in range(2)},
        KEY,
        ["quantize.quant_resi.qresi_ls.0.weight (2x2)"],
    ),
    "multi_scale_with_an_inner_quantizer": (
        encodec("quantize.vq.", 1) | {"quantize.quant_resi.0.weight": ones(2, 2)},
        {},
        ["quantize.quant_resi.0.weight (2x2)"],
    ),
    "remap_by_key": (VAR | {"quantize.used": np.arange(3)}, KEY, ["quantize.used (3)"]),
    "projection_beside_a_key": (
        {"embedding.weight": CODES, **layers("", "project_in")},
        {"metric": "l2", "keys": ("embedding.weight",)},
        ["project_in.weight (4x4)", "project_in.bias (4)"],
    ),
    "codes_beside_their_running_sum": (
        {"vq._embedding.weight": CODES, "vq._ema_w": CODES, "vq._ema_cluster_size": ones(10)},
        {"metric": "l2", "keys": ("vq._ema_w",)},
        ["vq._embedding.weight (10x4)"],
    ),
    "one_of_several_stages": (
        {f"rq.vq_layers.{i}.embedding.weight": CODES + i for i in range(3)},
        {"metric": "l2", "keys": ("rq.vq_layers.1.embedding.weight",)},
        [f"pass {' '.join(f'--key rq.vq_layers.{i}.embedding.weight' for i in range(3))} for stages"],
    ),
    "last_stage_not_named": (
        {f"ceps{i}": CODES + i for i in range(12)},
        {"metric": "l2", "keys": tuple(f"ceps{i}" for i in range(11))},
        ["ceps11 (10x4) may be further stages", f"pass {' '.join(f'--key ceps{i}' for i in range(12))} for stages"],
    ),
    "stage_with_fewer_codes_not_named": (
        {"ceps0": CODES, "ceps1": CODES[:7], "ceps2": CODES[:5]},
        {"metric": "l2", "keys": ("ceps0", "ceps1")},
        ["ceps2 (5x4) may be further stages", "pass --key ceps0 --key ceps1 --key ceps2 for stages"],
    ),
    "stage_with_fewer_columns_not_named": (
        {"ceps0": CODES.T.copy(), "ceps1": CODES[:7].T.copy()},
        {"metric": "l2", "keys": ("ceps0",), "transpose": True},
        ["ceps1 (4x7) may be further stages"],
    ),
    "one_quantizer_of_a_list": (
        encodec("quantizer.0.") | encodec("quantizer.1."),
        {"prefix": "quantizer.0"},
        ["quantizer.1.layers.2._codebook.embed (10x4)"],
    ),
    "xcodec2": (
        projections("generator.quantizer.", 6, 4),
        FSQ,
        ["generator.quantizer.project_in.weight is of X-Codec 2 or NeuCodec"],
    ),
    "xcodec2_in_transformers": (
        projections("quantizer.", 2048, 8),
        {"kind": "fsq", "levels": (4,) * 8},
        ["quantizer.project_in.weight is of X-Codec 2 or NeuCodec"],
    ),
    "cosyvoice": (
        layers("quantizer._codebook.", "project_down", inputs=6) | {"encoder.w": ones(2)},
        {"kind": "fsq", "levels": (3,) * 4, "bound": "tan"},
        ["quantizer._codebook.project_down.weight (4x6)", "quantizer._codebook.project_down.bias (4)"],
    ),
    "fsq_of_other_levels": (
        projections("quantizer.", 6, 4),
        {"kind": "fsq", "levels": (8, 5, 5)},
        ["quantizer.project_in.weight"],
    ),
    "norm_after_the_projection_of_fsq": (
        projections("model.", 6, 4) | {"model.project_in_norm.weight": ones(4), "model.scale": ones(4)},
        FSQ,
        ["model.scale (4)", "model.project_in_norm.weight (4)"],
    ),
    "projection_of_an_encoder": (
        projections("mlp.", 6, 4) | {"quantizer.project_down.weight": ones(4, 6)},
        FSQ,
        ["quantizer.project_down.weight (4x6)"],
    ),
    "fsq_of_other_levels_in_a_module_of_any_name": (
        projections("tokenizer.", 6, 4),
        {"kind": "fsq", "levels": (8, 5, 5)},
        ["tokenizer.project_in.weight (4x6)", "tokenizer.project_out.weight (6x4)"],
    ),
    "projections_of_fsq_by_other_names": (
        layers("bottleneck.", "proj_in", inputs=6),
        FSQ,
        ["bottleneck.proj_in.weight (4x6)", "bottleneck.proj_in.bias (4)"],
    ),
    "projections_of_lfq_with_weight_norm": (
        {"model.neck.project_in.weight_v": ones(4, 6), "model.neck.project_in.weight_g": ones(4, 1)},
        {"kind": "lfq", "bits": 4},
        ["model.neck.project_in.weight_v (4x6)", "model.neck.project_in.weight_g (4x1)"],
    ),
    "second_quantizer_by_its_name": (
        encodec("acoustic_vq.") | {"semantic_vq.codebook.weight": CODES},
        {},
        ["pass --prefix acoustic_vq. for the first, or --key semantic_vq.codebook.weight for"],
    ),
    "second_quantizer_with_a_number": (
        {f"{at}.embedding.weight": CODES for at in ("quantize", "quantize2")},
        {"metric": "l2"},
        ["pass --prefix quantize. for the first, or --key quantize2.embedding.weight for"],
    ),
    "projections_around_a_quantizer_that_is_saved_alone": (
        {"vq._codebook.embed": CODES[None], "rand_projs": ones(1, 6, 4), "project_in.weight": ones(4, 6)},
        {"metric": "cosine"},
        ["rand_projs (1x6x4), project_in.weight (4x6)"],
    ),
    "norm_of_a_codebook": (
        {"codebook.weight": CODES, "codebook_norm.weight": ones(4), "encoder.w": ones(3)},
        {"metric": "l2"},
        ["codebook_norm.weight (4)"],
    ),
    "codebook_without_a_module": (
        {"quantize.embedding.weight": CODES, "semantic_codebook": CODES},
        {"metric": "l2"},
        ["semantic_codebook (10x4)"],
    ),
    "moments_of_a_batch_norm": (
        encodec("quantizer.vq.") | {"quantizer.norm.running_mean": ones(4), "quantizer.norm.running_var": ones(4)},
        {},
        ["quantizer.norm.running_mean (4)", "quantizer.norm.running_var (4)"],
    ),
    "codes_where_fsq_is_named": (VAR, FSQ, ["quantize.embedding.weight (10x4)"]),
    "codes_where_lfq_is_named": (VAR, {"kind": "lfq", "bits": 4}, ["quantize.embedding.weight (10x4)"]),
    "two_masks": (
        {f"{at}.lfq.mask": np.array([4, 2, 1]) for at in "ab"},
        {"kind": "lfq", "bits": 3, "bit_order": "big"},
        ["a.lfq.mask (3), b.lfq.mask (3)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_belongs_to_the_quantizer_is_not_left_out(tmp_path, name):
    arrays, options, named = LEFT_OUT[name]
    with pytest.raises(ForeignCheckpointError) as caught:
        imported(tmp_path, arrays, **options)
    for text in named:
        assert text in str(caught.value)


def test_many_arrays_are_named_by_module(tmp_path):
    arrays = encodec("quantizer.vq.") | {f"quantizer.upsample.{i}.weight": ones(2) for i in range(20)}
    with pytest.raises(
        ForeignCheckpointError, match=r"pass --accept-left 'quantizer\.upsample\.\*' quantizer"
    ) as caught:
        imported(tmp_path, arrays | {"quantizer.downsample.weight": ones(2)})
    assert "quantizer.upsample.* (20 arrays)" in str(caught.value)


LEAVE = {
    "taming": (
        {"ae.quantize.embedding.weight": CODES} | layers("ae.", "quant_conv", "post_quant_conv"),
        {"metric": "l2"},
    ),
    "averages": (encodec("quantizer.vq."), {}),
    "averages_beside_a_key": (
        {"vq._embedding.weight": CODES, "vq._ema_w": CODES, "vq._ema_cluster_size": ones(10)},
        {"metric": "l2", "keys": ("vq._embedding.weight",)},
    ),
    "counter_beside_a_key": (VAR, KEY),
    "other_layers_beside_a_key": (
        {"codebook.weight": CODES, "layers.0.weight": CODES, "layer_norm.weight": ones(4)},
        {"metric": "l2", "keys": ("codebook.weight",)},
    ),
    "average_of_a_model_by_key": (
        {f"model_ema.{name}": CODES for name in ("quantizeembeddingweight", "encoderconv_inweight", "decay")},
        {"metric": "l2", "keys": ("model_ema.quantizeembeddingweight",)},
    ),
    "second_quantizer_beside_a_prefix": (
        encodec("acoustic_vq.") | {"semantic_vq.codebook.weight": CODES},
        {"prefix": "acoustic_vq"},
    ),
    "second_quantizer_beside_a_key": (
        encodec("acoustic_vq.") | {"semantic_vq.codebook.weight": CODES},
        {"metric": "l2", "keys": ("semantic_vq.codebook.weight",)},
    ),
    "projections_of_an_encoder_beside_those_of_fsq": (
        projections("quantizer.", 6, 4) | projections("encoder.", 9, 6),
        FSQ,
    ),
    "layers_around_fsq": (
        {"encoder.w": ones(2, 2), "quant_conv.weight": ones(6, 6), "decoder.conv_out.bias": ones(3)},
        {"kind": "fsq", "levels": (8, 5, 5)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAVE)
def test_what_is_known_to_be_left_is_left(tmp_path, name):
    arrays, options = LEAVE[name]
    assert imported(tmp_path, arrays, **options).left


@pytest.mark.parametrize(
    ("accepted", "rest"),
    [
        (["quantizer.norm.weight", "quantizer.norm.bias", "quantizer.scale"], []),
        (["quantizer.norm.*", "quantizer.scale"], []),
        (["quantizer.*"], []),
        (["quantizer.norm.*"], ["quantizer.scale (1)"]),
        (["quantizer.norm"], ["no array of the name 'quantizer.norm' was left: leave out --accept-left for it"]),
        (["quantizer.*", "quantizer.vq.layers.0._codebook.embed"], ["leave out --accept-left"]),
    ],
)
def test_the_user_accepts_what_is_left(tmp_path, accepted, rest):
    arrays = encodec("quantizer.vq.") | {"quantizer.norm.weight": ones(4), "quantizer.norm.bias": ones(4)}
    arrays["quantizer.scale"] = ones(1)
    if not rest:
        result = imported(tmp_path, arrays, accept_left=tuple(accepted))
        assert {"quantizer.norm.weight", "quantizer.scale"} <= set(result.left)
        assert result.provenance["accepted_left"] == accepted
        return
    with pytest.raises(ForeignCheckpointError) as caught:
        imported(tmp_path, arrays, accept_left=tuple(accepted))
    assert all(text in str(caught.value) for text in rest)


def test_unknown_keys_of_a_family_are_accepted_too(tmp_path):
    arrays = encodec("vq.") | {"vq.layers.0.norm.weight": ones(4)}
    with pytest.raises(ForeignCheckpointError, match=r"pass --accept-left vq\.layers\.0\.norm\.weight$"):
        imported(tmp_path, arrays)
    assert imported(tmp_path, arrays, accept_left=("vq.layers.0.norm.weight",)).state.kind == "rvq"


# Orientation, groups, shared codebooks.


def rows_of(result: Import) -> list[np.ndarray]:
    return [tensor for name, tensor in result.state.tensors.items() if name.endswith("embedding.weight")]


def test_codes_in_columns(tmp_path):
    arrays = {"q.embed": CODES.T.copy()}
    result = imported(tmp_path, arrays, keys=("q.embed",), metric="l2", transpose=True)
    assert np.array_equal(rows_of(result)[0], CODES)
    assert "q.embed was transposed: its columns are the codes, 10 of width 4" in result.notes
    assert result.provenance["transposed"] is True
    stack = {"q.embed": np.stack([CODES.T, CODES.T + 1])}
    result = imported(tmp_path, stack, keys=("q.embed",), metric="l2", transpose=True, kind="rvq")
    assert np.array_equal(np.stack(rows_of(result)), np.stack([CODES, CODES + 1]))


@pytest.mark.parametrize("name", ["vq.embeddings", "codebook"])
def test_a_square_codebook_that_only_its_name_tells_is_asked_about(tmp_path, name):
    arrays = {name: CODES[:4], "encoder.w": ones(2)}
    with pytest.raises(ForeignCheckpointError, match=f"{name} is 4x4.* pass --key {name} if they are rows"):
        imported(tmp_path, arrays, metric="l2")
    # An embedding of torch has a code in each row.
    assert imported(tmp_path, {f"{name}.weight": CODES[:4]}, metric="l2").state.kind == "vq"


def test_a_square_codebook_has_a_note(tmp_path):
    square = {"q.embed": RNG.standard_normal((4, 4)).astype(np.float32)}
    options = {"keys": ("q.embed",), "metric": "l2"}
    note = "q.embed is square: its rows are the codes; if the columns are, pass --transpose"
    assert note in imported(tmp_path, square, **options).notes
    assert note not in imported(tmp_path, square, **options, transpose=True).notes


@pytest.mark.parametrize("count", ["cluster_size", "_ema_cluster_size", "ema_cluster_size", "cluster_usage"])
@pytest.mark.parametrize("transpose", [False, True])
def test_counts_say_which_axis_the_codes_are(tmp_path, count, transpose):
    codes = CODES if transpose else CODES.T.copy()
    arrays = {"q.embed": codes, f"q.{count}": ones(10)}
    remedy = "leave out --transpose" if transpose else "pass --transpose"
    with pytest.raises(ForeignCheckpointError, match=remedy):
        imported(tmp_path, arrays, keys=("q.embed",), metric="l2", transpose=transpose)
    result = imported(tmp_path, arrays, keys=("q.embed",), metric="l2", transpose=not transpose)
    assert np.array_equal(rows_of(result)[0], CODES)
    assert not any("pass --transpose" in note for note in result.notes)


def test_counts_beside_codes_of_a_family(tmp_path):
    arrays = encodec("vq.", 1)
    arrays["vq.layers.0._codebook.embed"] = CODES.T.copy()
    with pytest.raises(ForeignCheckpointError, match="they should have one shape"):
        imported(tmp_path, arrays)
    del arrays["vq.layers.0._codebook.embed_avg"]
    remedy = r"its codes are the columns: pass --key vq\.layers\.0\._codebook\.embed --transpose"
    with pytest.raises(ForeignCheckpointError, match=remedy):
        imported(tmp_path, arrays)
    arrays["vq.layers.0._codebook.embed"] = CODES[:9]
    with pytest.raises(ForeignCheckpointError, match="a number for each code, so one of them is damaged"):
        imported(tmp_path, arrays)


@pytest.mark.parametrize("stacked", [False, True])
def test_groups_of_the_channels(tmp_path, stacked):
    codes = RNG.standard_normal((3, 10, 4)).astype(np.float32)
    if stacked:
        arrays, keys = {"codes": codes}, ("codes",)
    else:
        keys = tuple(f"codebooks.{g}.codebook.weight" for g in range(3))
        arrays = dict(zip(keys, codes, strict=True))
    result = imported(tmp_path, arrays, keys=keys, metric="l2", groups=True)
    z = RNG.standard_normal((50, 12)).astype(np.float32)
    distances = ((z.reshape(50, 3, 1, 4) - codes.astype(np.float64)) ** 2).sum(-1)
    assert np.array_equal(result.quantizer.encode(torch.from_numpy(z)).numpy(), distances.argmin(-1))


def test_an_array_of_three_axes_is_asked_about(tmp_path):
    with pytest.raises(ForeignCheckpointError, match=r"pass --kind rvq or --groups$"):
        imported(tmp_path, {"codes": CODES[None]}, keys=("codes",), metric="l2")
    with pytest.raises(ForeignCheckpointError, match="--groups needs a codebook for each group"):
        imported(tmp_path, {"codes": CODES}, keys=("codes",), metric="l2", groups=True)
    for option in ({"groups": True}, {"transpose": True}):
        with pytest.raises(ForeignCheckpointError, match=r"is for arrays named by --key: leave out --"):
            imported(tmp_path, encodec("vq."), **option)


def test_stages_that_share_a_codebook_name_it_again(tmp_path):
    result = imported(tmp_path, {"shared": CODES, "own": CODES + 1}, keys=("shared", "own", "shared"), metric="l2")
    assert np.array_equal(np.stack(rows_of(result)), np.stack([CODES, CODES + 1, CODES]))


def test_a_running_sum_that_is_taken_has_a_note(tmp_path):
    for name in ("vq._ema_w", "vq.embed_avg", "optimizer.state.0.exp_avg"):
        notes = imported(tmp_path, {name: CODES}, keys=(name,), metric="l2").notes
        assert f"{name} is a running sum or a counter by its name: it may not be the codes" in notes


def test_likely_candidates_come_first(tmp_path):
    codes = [f"net.{name}" for name in ("codebook_a", "z_dictionary", "embed_table", "vq.w", "my_quant")]
    others = ["net.a.weight", "net._ema_w", "net.embed_avg", "optimizer.state.0.exp_avg", "net.vq.proj.weight"]
    arrays = {name: RNG.standard_normal((10, 4 + i)).astype("f4") for i, name in enumerate(sorted(codes + others))}
    arrays |= {"net.vq.bias": ones(4), "net.embed.step": np.array(3)}
    with pytest.raises(ForeignCheckpointError) as caught:
        imported(tmp_path, arrays)
    text = str(caught.value)
    assert all(f"--key {name} (10x" in text for name in codes)
    assert not any(name in text for name in [*others, "net.vq.bias"])
    assert text.endswith("; --dry-run lists all arrays, 5 more may be it")
    # Where none has a codebook's name, running sums come last.
    with pytest.raises(ForeignCheckpointError) as caught:
        imported(tmp_path, {name: arrays[name] for name in others if name != "net.vq.proj.weight"})
    places = [str(caught.value).index(name) for name in others[:-1]]
    assert places[0] == min(places)


def test_numbered_siblings_are_offered_as_stages(tmp_path):
    arrays = {f"rq.levels.{i}.codes_of_level": CODES + i for i in range(12)}
    with pytest.raises(ForeignCheckpointError) as caught:
        imported(tmp_path, arrays | {"encoder.w": ones(2, 2)})
    keys = " ".join(f"--key {name}" for name in arrays)
    assert f"likely ones first: {keys} (12 stages of 10x4)" in str(caught.value)
    # A stage may have fewer codes; another width is another codebook.
    arrays["rq.levels.5.codes_of_level"] = CODES[:9]
    with pytest.raises(ForeignCheckpointError, match=r"\(12 stages of 10x4, 9x4\)"):
        imported(tmp_path, arrays)
    arrays["rq.levels.5.codes_of_level"] = CODES[:, :3]
    with pytest.raises(
        ForeignCheckpointError, match=r"11 stages of 10x4\), --key rq\.levels\.5\.codes_of_level \(10x3"
    ):
        imported(tmp_path, arrays)


def test_a_stage_is_no_quantizer_of_its_own(tmp_path):
    # A stage of SimVQ with the keys of LlamaGen in it.
    arrays = {f"simvq.layers.{i}.frozen_codebook": CODES + i for i in range(2)}
    arrays |= {f"simvq.layers.{i}.code_transform.weight": np.eye(4, dtype=np.float32) for i in range(2)}
    arrays |= {f"simvq.layers.0.{name}": CODES for name in ("embedding.weight", "codebook_used")}
    with pytest.raises(ForeignCheckpointError, match=r"there is simvq\.layers\.0\.codebook_used .* too"):
        imported(tmp_path, arrays)
    # At the root is a language model: its embedding is no quantizer around a numbered module.
    arrays = {"embedding.weight": CODES, **{f"blocks.0.{name}": a for name, a in encodec("vq.").items()}}
    assert imported(tmp_path, arrays).place == "blocks.0.vq."


def test_groups_of_residual_fsq_are_found_inside_a_model(tmp_path):
    arrays = projections("net.rvqs.0.", 6, 3) | projections("net.rvqs.1.", 6, 3) | {"encoder.w": ones(2)}
    options = {"kind": "residual_fsq", "levels": (8, 5, 5), "stages": 2, "library_version": "1.17.8"}
    found = imported(tmp_path, arrays, **options)
    named = imported(tmp_path, arrays, prefix="net", **options)
    assert found.state.arguments["groups"] == 2
    assert found.state.arguments == named.state.arguments
    assert all(np.array_equal(found.state.tensors[name], array) for name, array in named.state.tensors.items())
