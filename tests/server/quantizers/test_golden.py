"""The numbers of the original implementation, for every file of tests/golden that holds a quantizer."""

from __future__ import annotations

import pytest
import torch

from vqserve_server.quantizers import (
    EMAVectorQuantizer,
    GumbelQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
    freeze,
    legacy_weight_norm_names,
    measure_perplexity,
)

VQ_CASES = [
    "vq_2d",
    "vq_3d",
    "vq_3d_remap_extra_sane",
    "vq_4d",
    "vq_4d_large",
    "vq_4d_perplexity",
    "vq_4d_remap_extra",
    "vq_4d_remap_int3_sane",
    "vq_4d_sane_beta",
    "vq_4d_weight_norm",
]
PROJ_CASES = [f"proj_{rank}d_{output}" for rank in (2, 3, 4, 5) for output in ("out", "same")]


def _build_vq(case):
    meta = case.meta
    module = VectorQuantizer(meta["n_e"], meta["e_dim"], remap=case.arrays.get("used"), **meta["kwargs"])
    # The files lack the remap; the weight-norm case has the legacy names.
    state = {**case.under("param."), **({"used": case["used"]} if "used" in case else {})}
    module.load_state_dict(state, strict=True)
    return module


@pytest.mark.parametrize("name", VQ_CASES)
@pytest.mark.parametrize("training", [True, False])
def test_vq_forward_and_gradients(golden, assert_close, name, training):
    case = golden(name)
    module = _build_vq(case).train(training)
    z = case["z"].requires_grad_()
    z_q, info = module(z)
    ((z_q * case["cotangent"]).sum() + info["loss/vq"]).backward()
    assert_close(z_q, case["z_q"])
    assert_close(info["loss/vq"], case["loss"])
    assert_close(z.grad, case["grad_z"])
    gradients = legacy_weight_norm_names({key: value.grad for key, value in module.named_parameters()})
    expected = case.under("grad.")
    assert set(gradients) == set(expected)
    for key, gradient in expected.items():
        assert_close(gradients[key], gradient)
    indices = info["min_encoding_indices"]
    assert torch.equal(indices.flatten(), case["indices"].flatten())
    assert indices.shape == (module.encode(z).shape if module.sane_index_shape else (indices.numel(),))
    if "perplexity" in case:
        assert_close(info["perplexity"], case["perplexity"])
        assert torch.equal(info["cluster_usage"], case["cluster_usage"])
    else:
        assert "perplexity" not in info
        assert "cluster_usage" not in info


@pytest.mark.parametrize("name", VQ_CASES)
def test_vq_encode_decode_and_entries(golden, assert_close, name):
    case = golden(name)
    module = _build_vq(case)
    indices = module.encode(case["z"])
    assert torch.equal(indices.flatten(), case["indices"].flatten())
    rows = case["z"].movedim(1, -1) if case["z"].ndim == 4 else case["z"]
    if "used" not in case:
        assert torch.equal(indices.flatten(), case["full_indices"])
        assert_close(module.decode(indices), case["z_q"])
        assert_close(module.get_codebook_entry(indices.flatten()), case["entry_flat"])
    else:
        known = torch.isin(case["full_indices"], case["used"])
        assert torch.equal(module.unmap_to_all(indices).flatten()[known], case["full_indices"][known])
    if "entry_with_shape" in case:
        assert_close(module.get_codebook_entry(indices.flatten(), rows.shape), case["entry_with_shape"])
        assert_close(module.get_codebook_entry(indices, rows.shape), case["entry_with_shape"])
    frozen = freeze(module, device="cpu")
    assert torch.equal(frozen.encode_rows(rows.reshape(-1, module.e_dim)), indices.flatten())


def _build_projection(case):
    meta = case.meta
    module = VectorQuantizerWithInputProjection(
        n_codes=meta["n_e"], codebook_dim=meta["e_dim"], **meta["proj"], **meta["kwargs"]
    )
    module.load_state_dict(case.under("param."), strict=True)
    return module


@pytest.mark.parametrize("name", PROJ_CASES)
@pytest.mark.parametrize("training", [True, False])
def test_projection(golden, assert_close, name, training):
    case = golden(name)
    module = _build_projection(case).train(training)
    z = case["z"].requires_grad_()
    z_q, info = module(z)
    ((z_q * case["cotangent"]).sum() + info["loss/vq"]).backward()
    assert_close(z_q, case["z_q"])
    assert_close(info["loss/vq"], case["loss"])
    assert_close(z.grad, case["grad_z"])
    gradients = dict(module.named_parameters())
    assert set(gradients) == set(case.under("grad."))
    for key, gradient in case.under("grad.").items():
        assert_close(gradients[key].grad, gradient)
    assert torch.equal(info["min_encoding_indices"], case["indices"])
    assert torch.equal(module.encode(z).flatten(), case["indices"])


@pytest.mark.parametrize("name", PROJ_CASES)
def test_projection_decode_is_the_hard_output(golden, assert_close, name):
    case = golden(name)
    module = _build_projection(case)
    decoded = module.decode(module.encode(case["z"]))
    if case["z_q"].ndim == case["z"].ndim:
        assert_close(decoded, case["z_q"])
    else:
        # Without an output_dim the original's forward keeps tokens in a row; decode does not.
        assert decoded.shape == (case["z"].shape[0], 8, *case["z"].shape[2:])
        assert_close(decoded.flatten(2).transpose(1, 2), case["z_q"])


def test_ema_training_and_eval(golden, assert_close):
    case = golden("ema_train3_eval")
    arguments = {key: value for key, value in case.meta.items() if key != "cls"}
    module = EMAVectorQuantizer(**arguments)
    module.load_state_dict({f"embedding.{key}": value for key, value in case.under("init.").items()}, strict=True)
    for step in ("step0", "step1", "step2", "eval"):
        module.train(step != "eval")
        z = case[f"{step}.z"].requires_grad_()
        indices = module.encode(z)
        z_q, info = module(z)
        assert_close(z_q, case[f"{step}.z_q"])
        assert_close(info["loss/vq"], case[f"{step}.loss"])
        assert_close(info["perplexity"], case[f"{step}.perplexity"])
        assert torch.equal(info["encoding_indices"], case[f"{step}.indices"])
        assert torch.equal(indices.flatten(), case[f"{step}.indices"])
        if step == "eval":
            break
        ((z_q * case[f"{step}.cotangent"]).sum() + info["loss/vq"]).backward()
        assert_close(z.grad, case[f"{step}.grad_z"])
        for name in ("weight", "embed_avg", "cluster_size"):
            assert_close(getattr(module.embedding, name), case[f"{step}.{name}"])


@pytest.mark.parametrize("name", ["gumbel_4d", "gumbel_4d_remap_extra"])
def test_gumbel(golden, assert_close, name):
    case = golden(name)
    arguments = {key: value for key, value in case.meta.items() if key not in {"cls", "note"}}
    remap = {"remap": case["used"], "unknown_index": "extra"} if "used" in case else {}
    module = GumbelQuantizer(**arguments, **remap)
    state = {**case.under("param."), **({"used": case["used"]} if "used" in case else {})}
    module.load_state_dict(state, strict=True)
    for training in (True, False):
        _, info = module.train(training)(case["z"], return_logits=True)
        assert_close(info["logits"], case["logits"])
        assert_close(info["loss/vq"], case["kl_loss"])
    indices = module.encode(case["z"])
    assert torch.equal(indices, case["argmax_indices"])
    assert_close(module.get_codebook_entry(indices, (2, 4, 4, 8)), case["entry"])
    assert_close(module.get_codebook_entry(indices.flatten(), (2, 4, 4, 8)), case["entry"])
    assert_close(module.decode(indices), case["entry"])


@pytest.mark.parametrize(("name", "unknown_index"), [("remap_extra", "extra"), ("remap_int5", 5)])
def test_remap(golden, name, unknown_index):
    case = golden(name)
    module = VectorQuantizer(32, 8, remap=case["used"], unknown_index=unknown_index)
    assert {"re_embed": module.re_embed, "unknown_index": module.unknown_index} == case.meta
    assert torch.equal(module.remap_to_used(case["inds"]), case["remapped"])
    assert torch.equal(module.unmap_to_all(case["remapped"]), case["unmapped"])


def test_perplexity(golden, assert_close):
    case = golden("perplexity")
    perplexity, in_use = measure_perplexity(case["indices"], case.meta["num_centroids"])
    assert_close(perplexity, case["perplexity"])
    assert torch.equal(in_use, case["cluster_use"])
