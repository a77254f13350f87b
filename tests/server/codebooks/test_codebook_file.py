"""Codebook files: what is written is read, the digest moves with what encode and decode read, damage is named."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import re
import resource
import shlex
import stat
import struct
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kinds import ONE_OF_EACH, bounds
from vqserve_server.codebooks import codebook_digest, load_codebook, save_codebook
from vqserve_server.codebooks import file as codebook_file
from vqserve_server.codebooks.kinds import KINDS
from vqserve_server.codebooks.state import StateError, check_claims
from vqserve_server.errors import CodebookError, CodebookFileError
from vqserve_server.quantizers import (
    EMAVectorQuantizer,
    GumbelQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
    legacy_weight_norm_names,
)
from vqserve_tools.cli import main


def latents_for(quantizer, n=64):
    return torch.randn(n, quantizer.input_dim, generator=torch.Generator().manual_seed(1))


def all_indices(quantizer):
    """Every index, in a shape that the quantizer decodes."""
    ids = torch.arange(min(quantizer.decodable, 500))
    return ids[:, None].expand(-1, quantizer.num_quantizers) % bounds(quantizer) if quantizer.has_stages else ids


def rewrite(path: Path, *, tensors=None, metadata=None, drop=()) -> Path:
    """Write the file anew with the public library, changed."""
    with safe_open(path, framework="numpy") as file:
        entries = dict(file.metadata())
    arrays = load_file(path)
    arrays.update(tensors or {})
    entries.update(metadata or {})
    for name in drop:
        arrays.pop(name, None)
        entries.pop(name, None)
    changed = path.with_name("changed.safetensors")
    save_file(arrays, changed, entries)
    return changed


def with_arguments(path: Path, drop=(), *, ignore_missing=False, **changes) -> Path:
    with safe_open(path, framework="numpy") as file:
        arguments = json.loads(file.metadata()["vqserve.arguments"])
    arguments.update(changes)
    for name in drop:
        if name in arguments or not ignore_missing:
            del arguments[name]
    return rewrite(path, metadata={"vqserve.arguments": json.dumps(arguments)})


@pytest.fixture
def vq_path(tmp_path, make_quantizer):
    path = tmp_path / "vq.safetensors"
    save_codebook(make_quantizer("vq"), path)
    return path


# What is written is read.


def test_round_trip(tmp_path, quantizer):
    path = tmp_path / "c.safetensors"
    digest = save_codebook(quantizer, path, provenance={"run": 7})
    codebook = load_codebook(path)
    assert codebook.digest == digest == codebook_digest(quantizer) == codebook_digest(codebook.quantizer)
    assert type(codebook.quantizer) is type(quantizer)
    assert codebook.kind == quantizer.kind
    assert codebook.provenance == {"run": 7}
    assert not codebook.quantizer.training
    for name in ("beta", "decay", "eps", "loss_key", "temperature", "kl_weight", "straight_through", "re_embed"):
        assert getattr(codebook.quantizer, name, None) == getattr(quantizer, name, None)
    for name in ("unknown_index", "sane_index_shape", "log_perplexity", "vocab_size", "output_dim", "layout"):
        assert getattr(codebook.quantizer, name, None) == getattr(quantizer, name, None)
    ours, theirs = quantizer.state_dict(), codebook.quantizer.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    z = latents_for(quantizer)
    assert torch.equal(codebook.quantizer.encode(z), quantizer.encode(z))
    ids = all_indices(quantizer)
    assert torch.equal(codebook.quantizer.decode(ids), quantizer.decode(ids))


def test_the_same_quantizer_gives_the_same_bytes(tmp_path, quantizer):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_codebook(quantizer, first, provenance={"b": 1, "a": [2, None]})
    save_codebook(load_codebook(first).quantizer, second, provenance={"a": [2, None], "b": 1})
    assert first.read_bytes() == second.read_bytes()


def test_the_public_library_reads_our_files(tmp_path, quantizer):
    path = tmp_path / "c.safetensors"
    save_codebook(quantizer, path)
    state = quantizer.state_dict()
    arrays = load_file(path)
    assert set(arrays) == set(state)
    assert all(np.array_equal(arrays[name], state[name].numpy()) for name in state)


def test_a_file_saved_again_by_the_public_library_keeps_its_digest(tmp_path, quantizer):
    path = tmp_path / "c.safetensors"
    digest = save_codebook(quantizer, path)
    assert load_codebook(rewrite(path, metadata={"format": "np", "vqserve.provenance": '{"by":"x"}'})).digest == digest


def test_an_annealed_temperature_is_kept(tmp_path, make_quantizer):
    quantizer = make_quantizer("gumbel")
    quantizer.temperature = 0.125
    save_codebook(quantizer, tmp_path / "g.safetensors")
    assert load_codebook(tmp_path / "g.safetensors").quantizer.temperature == 0.125


def test_loading_leaves_the_global_generator_alone(vq_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_codebook(vq_path)
    assert torch.equal(torch.rand(4), expected)


def test_arguments_that_only_training_reads_may_be_left_out(tmp_path, make_quantizer):
    for kind, name in ONE_OF_EACH.items():
        path = tmp_path / f"{kind}.safetensors"
        digest = save_codebook(make_quantizer(name), path)
        training = [argument for argument, spec in KINDS[kind].arguments.items() if spec.optional]
        codebook = load_codebook(with_arguments(path, drop=training, ignore_missing=True))
        assert codebook.digest == digest
        assert all(codebook.arguments[argument] == KINDS[kind].arguments[argument].default for argument in training)


def test_there_is_an_example_of_every_kind():
    assert set(ONE_OF_EACH) == set(KINDS), "add the new kind to CASES in tests/kinds.py"


def test_defaults_are_the_constructors():
    classes = (VectorQuantizer, EMAVectorQuantizer, GumbelQuantizer, VectorQuantizerWithInputProjection)
    for cls in classes:
        parameters = dict(inspect.signature(cls).parameters)
        if cls is VectorQuantizerWithInputProjection:
            parameters = {**inspect.signature(VectorQuantizer).parameters, **parameters}
        for name, argument in cls.arguments.items():
            if name == "layout":
                # An attribute of every quantizer, and no argument of a constructor.
                continue
            default = parameters[name].default
            if not argument.served and default is not inspect.Parameter.empty:
                assert argument.default == default, (cls, name)
        known = set(cls.arguments) | {"remap", "kwargs", "vector_quantizer_options", "options"}
        if cls is not VectorQuantizerWithInputProjection:
            assert set(parameters) <= known


# The digest.

GOLDEN = "dfa109b6bbb818f4a1937aac8b332d7893f073e2001d42518f9a5095518d01ad"


def fixed_codebook():
    quantizer = VectorQuantizer(3, 2, remap=[2, 0], unknown_index="extra")
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0, 1.0], [-0.5, 0.25], [3.0, -4.0]]))
    return quantizer


def test_golden_digest():
    # Changing the canonical form makes every pinned digest in the world wrong: this constant never changes.
    assert codebook_digest(fixed_codebook()) == GOLDEN


def test_the_canonical_form_as_documented():
    def field(data: bytes) -> bytes:
        return struct.pack("<Q", len(data)) + data

    form = b"".join(
        field(data)
        for data in (
            b"vqserve codebook digest 1",
            b"vq",
            b'{"e_dim":2,"embedding_weight_norm":false,"n_e":3,"unknown_index":"extra"}',
            b"embedding.weight",
            b"F32",
            b"[3,2]",
            struct.pack("<6f", 0.0, 1.0, -0.5, 0.25, 3.0, -4.0),
            b"used",
            b"I64",
            b"[2]",
            struct.pack("<2q", 2, 0),
        )
    )
    assert hashlib.sha256(form).hexdigest() == GOLDEN


def test_the_page_has_the_example_s_digest():
    assert GOLDEN in (Path(__file__).parents[3] / "docs" / "codebooks.md").read_text()


def test_legacy_names_of_weight_norm_have_the_same_digest(tmp_path, make_quantizer):
    quantizer = make_quantizer("vq_weight_norm")
    path = tmp_path / "c.safetensors"
    digest = save_codebook(quantizer, path)
    legacy = legacy_weight_norm_names({name: tensor.numpy() for name, tensor in quantizer.state_dict().items()})
    changed = rewrite(path, tensors=legacy, drop=tuple(quantizer.state_dict()))
    codebook = load_codebook(changed)
    assert codebook.digest == digest
    z = latents_for(quantizer)
    assert torch.equal(codebook.quantizer.encode(z), quantizer.encode(z))
    both = rewrite(path, tensors=legacy)
    with pytest.raises(CodebookFileError, match="two names of one tensor"):
        load_codebook(both)


def test_training_does_not_change_the_digest(make_quantizer):
    for name, changes in {
        "vq": {"beta": 9.0, "loss_key": "x", "sane_index_shape": False, "log_perplexity": False},
        "gumbel": {"temperature": 0.1, "kl_weight": 2.0, "straight_through": True, "loss_key": "x"},
        "ema": {"beta": 3.0},
    }.items():
        quantizer = make_quantizer(name)
        before = codebook_digest(quantizer)
        for attribute, value in changes.items():
            setattr(quantizer, attribute, value)
        assert codebook_digest(quantizer) == before
    quantizer = make_quantizer("ema")
    before = codebook_digest(quantizer)
    quantizer.embedding.decay, quantizer.embedding.eps = 0.5, 0.5
    with torch.no_grad():
        quantizer.embedding.cluster_size.add_(1)
        quantizer.embedding.embed_avg.add_(1)
    assert codebook_digest(quantizer) == before


def test_unknown_index_counts_where_it_is_read():
    def digest(cls, *sizes, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return codebook_digest(cls(*sizes, **options))

    values = ["random", "extra", 1, 300]
    assert len({digest(VectorQuantizer, 12, 3, unknown_index=value) for value in values}) == 1
    assert len({digest(VectorQuantizer, 12, 3, remap=[1, 2], unknown_index=value) for value in values}) == 4
    # Only the used codes of a Gumbel compete: nothing unknown is reported, and only "extra" can be decoded.
    assert len({digest(GumbelQuantizer, 5, 3, 12, remap=[1, 2], unknown_index=value) for value in values}) == 2


def test_every_number_that_is_read_counts(quantizer):
    digests = {codebook_digest(quantizer)}
    count = 1
    for name, tensor in quantizer.state_dict(keep_vars=True).items():
        if name in ("embedding.cluster_size", "embedding.embed_avg"):
            continue
        with torch.no_grad():
            for position in (0, tensor.numel() - 1):
                flat = tensor.view(-1)
                old = flat[position].clone()
                flat[position] = (old + 1) % 12 if tensor.dtype == torch.int64 else old + 0.5
                digests.add(codebook_digest(quantizer))
                flat[position] = old
                count += 1
    assert len(digests) == count


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    codes=st.integers(1, 20),
    width=st.integers(1, 6),
    seed=st.integers(0, 1 << 30),
    used=st.none() | st.lists(st.integers(0, 19), min_size=1, max_size=25),
    unknown_index=st.sampled_from(["random", "extra", 0, 5, 70000]),
    double=st.booleans(),
    scale=st.sampled_from([1e-38, 1.0, 1e30]),
)
def test_any_codebook_survives(tmp_path, codes, width, seed, used, unknown_index, double, scale):
    remap = None if used is None else [id_ % codes for id_ in used]
    quantizer = VectorQuantizer(codes, width, remap=remap, unknown_index=unknown_index)
    with torch.no_grad():
        drawn = torch.randn(codes, width, generator=torch.Generator().manual_seed(seed))
        quantizer.embedding.weight.copy_(drawn * scale)
    if double:
        quantizer.double()
    path = tmp_path / "any.safetensors"
    digest = save_codebook(quantizer, path)
    codebook = load_codebook(path)
    assert codebook.digest == digest
    z = latents_for(quantizer, 20) * scale
    assert torch.equal(codebook.quantizer.encode(z), quantizer.encode(z))


# Writing.


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, make_quantizer, monkeypatch):
    path = tmp_path / "c.safetensors"
    save_codebook(make_quantizer("vq"), path)
    before = path.read_bytes()

    def fails(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        save_codebook(make_quantizer("ema"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_file(tmp_path, make_quantizer):
    path = tmp_path / "c.safetensors"
    versions = [make_quantizer("vq", seed) for seed in range(2)]
    digests = {save_codebook(quantizer, path) for quantizer in versions}
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for quantizer in versions:
                save_codebook(quantizer, path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {load_codebook(path).digest for _ in range(50)}
    finally:
        stop.set()
        writer.join()
    assert seen <= digests


def test_others_may_read_the_file(tmp_path, make_quantizer):
    path = tmp_path / "c.safetensors"
    old = os.umask(0o022)
    try:
        save_codebook(make_quantizer("vq"), path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


class Sub(VectorQuantizer):
    pass


def nan_weight():
    quantizer = VectorQuantizer(4, 2)
    with torch.no_grad():
        quantizer.embedding.weight[2, 1] = float("nan")
    return quantizer


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Sub(4, 2), "Sub is not one of VectorQuantizer, "),
        (lambda: VectorQuantizer(4, 2).half(), r"call .float\(\)"),
        (lambda: VectorQuantizer(4, 2).bfloat16(), r"call .float\(\)"),
        (lambda: VectorQuantizer(4, 2, remap=[1], unknown_index=-1), "'unknown_index' is -1"),
        (lambda: VectorQuantizer(4, 2, beta=float("nan")), "'beta' is nan, it must be a finite number"),
        (nan_weight, r"embedding.weight\[2, 1\] is nan"),
    ],
)
def test_what_cannot_be_kept_is_rejected(tmp_path, make, match):
    with pytest.raises(CodebookError, match=match):
        save_codebook(make(), tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("provenance", [{"a": float("nan")}, {"a": object()}, {"a": "x" * (1 << 18)}])
def test_provenance_must_be_json(tmp_path, make_quantizer, provenance):
    with pytest.raises(CodebookError, match="provenance"):
        save_codebook(make_quantizer("vq"), tmp_path / "c.safetensors", provenance=provenance)


def test_any_text_in_provenance_survives(tmp_path, make_quantizer):
    story = {"who": "Zoë\n\ud800", "n": -1, "nested": {"x": [1.5, None, True]}}
    save_codebook(make_quantizer("vq"), tmp_path / "c.safetensors", provenance=story)
    assert load_codebook(tmp_path / "c.safetensors").provenance == story


# Damage.


def rejected(path: Path, match: str) -> None:
    with pytest.raises(CodebookFileError, match=match) as caught:
        load_codebook(path)
    assert caught.value.path == str(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_codebook_file_is_to_be_imported_first(tmp_path, monkeypatch):
    state = {"weight": torch.zeros(3, 2)}
    torch.save(state, tmp_path / "vqgan.ckpt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    np.save(tmp_path / "my codes.npy", np.eye(3, 2, dtype=np.float32))
    np.save(tmp_path / "codes.npy", np.eye(3, 2, dtype=np.float32))
    (tmp_path / "codes.safetensors").write_bytes((tmp_path / "codes.npy").read_bytes())
    (tmp_path / "README.md").write_text("# {where}\n\nA text.\n")
    np.savez(tmp_path / "codes.npz", np.zeros((3, 2), np.float32))
    save_file({"weight": np.zeros((3, 2), np.float32)}, tmp_path / "vqgan.safetensors")
    monkeypatch.chdir(tmp_path)
    for name, what, out in (
        ("vqgan.ckpt", "a torch file", None),
        ("old.pth", "a torch file", None),
        ("my codes.npy", "a .npy file", "codebook.safetensors"),
        ("codes.safetensors", "a .npy file", None),
        ("codes.npz", "an .npz file", None),
        ("vqgan.safetensors", "a safetensors file", None),
        ("README.md", "a text file", None),
        ("codes.npy", "a .npy file", "codes.safetensors"),
    ):
        with pytest.raises(CodebookFileError, match="not a codebook file") as caught:
            load_codebook(tmp_path / name)
        text = str(caught.value)
        assert text.startswith(f"{tmp_path / name}: it is {what}, ")
        for command in re.findall("`(.*?)`", text):
            program, *words = shlex.split(command)
            assert program == "vqserved"
            if "--help" in words:
                with pytest.raises(SystemExit, match=r"^0$"):
                    main(words)
            else:
                assert main([*words, "--force"]) == 0
                assert load_codebook(tmp_path / out).kind == "vq"
                (tmp_path / out).unlink()


WEIGHT = "embedding.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda p: rewrite(p, drop=["vqserve.format"]),
            "is a safetensors file, but not a codebook file: `vqserved ",
        ),
        (lambda p: rewrite(p, metadata={"vqserve.format": "3"}), "has format '3', this vqserve reads '1' and '2'"),
        (lambda p: rewrite(p, drop=["vqserve.kind"]), "'vqserve.kind' is missing"),
        (lambda p: rewrite(p, metadata={"vqserve.colour": "red"}), "'vqserve.colour' is unknown"),
        (lambda p: rewrite(p, metadata={"vqserve.kind": "pq"}), "unknown kind 'pq', not one of vq, ema"),
        (lambda p: with_arguments(p, layout="nchw"), "'layout' is 'nchw', it must be one of null, \"channels_first\""),
        (lambda p: with_arguments(p, layout=["channels_first"]), "'layout' is"),
        (lambda p: rewrite(p, metadata={"vqserve.kind": "ema"}), "argument 'e_dim' is not one of kind 'ema'"),
        (lambda p: rewrite(p, metadata={"vqserve.arguments": "[]"}), "no JSON object"),
        (lambda p: rewrite(p, metadata={"vqserve.arguments": "{"}), "no JSON object"),
        (lambda p: rewrite(p, metadata={"vqserve.arguments": '{"n_e":1,"n_e":2}'}), "no JSON object"),
        (lambda p: rewrite(p, metadata={"vqserve.provenance": '{"a":1e999}'}), "no JSON object"),
        (lambda p: with_arguments(p, drop=["n_e"]), "'n_e' is missing"),
        (lambda p: with_arguments(p, colour=1), "'colour' is not one of kind"),
        (lambda p: with_arguments(p, n_e=0), r"'n_e' is 0, it must be an integer in \[1, 4294967296\]"),
        (lambda p: with_arguments(p, n_e=(1 << 32) + 1), "'n_e' is 4294967297"),
        (lambda p: with_arguments(p, n_e=True), "'n_e' is True"),
        (lambda p: with_arguments(p, n_e=12.0), "'n_e' is 12.0"),
        (lambda p: with_arguments(p, n_e=10**400), "'n_e' is 1000"),
        (lambda p: with_arguments(p, e_dim=1 << 40), "'e_dim'"),
        (lambda p: with_arguments(p, beta="0.25"), "'beta' is '0.25', it must be a finite number"),
        (lambda p: with_arguments(p, beta=10**400), "'beta'"),
        (lambda p: with_arguments(p, log_perplexity=1), "'log_perplexity' is 1, it must be true or false"),
        (lambda p: with_arguments(p, loss_key=None), "'loss_key' is None, it must be text"),
        (lambda p: with_arguments(p, unknown_index="last"), "'unknown_index' is 'last'"),
        (lambda p: with_arguments(p, unknown_index=-1), "'unknown_index' is -1"),
        (lambda p: with_arguments(p, unknown_index=1 << 32), "'unknown_index'"),
        (lambda p: with_arguments(p, unknown_index=["random"]), "'unknown_index'"),
        (lambda p: with_arguments(p, n_e=13), r"has shape \[12, 3\], the arguments make it \[13, 3\]"),
        (lambda p: with_arguments(p, n_e=1 << 32, e_dim=1 << 31), "the arguments make it"),
        (lambda p: with_arguments(p, embedding_weight_norm=True), "original0' is missing"),
        (lambda p: rewrite(p, tensors={"a": np.zeros(1, np.float32)}, drop=[WEIGHT]), "weight' is missing"),
        (lambda p: rewrite(p, tensors={"extra": np.zeros(1, np.float32)}), "'extra' does not belong"),
        (lambda p: rewrite(p, tensors={WEIGHT: np.zeros((3, 12), np.float32)}), "has shape"),
        (lambda p: rewrite(p, tensors={WEIGHT: np.zeros((12, 3), np.float16)}), "F16: weights are kept in F32"),
        (lambda p: rewrite(p, tensors={WEIGHT: np.zeros((12, 3), np.int64)}), "is I64, not F32 or F64"),
        (lambda p: rewrite(p, tensors={WEIGHT: np.full((12, 3), np.nan, np.float32)}), r"weight\[0, 0\] is nan"),
        (lambda p: rewrite(p, tensors={WEIGHT: np.full((12, 3), -np.inf, np.float32)}), r"weight\[0, 0\] is -inf"),
        (lambda p: rewrite(p, tensors={WEIGHT: np.zeros((12, 3), np.float32)}), "it was damaged or changed"),
        (lambda p: rewrite(p, drop=["vqserve.digest"]), "'vqserve.digest' is missing"),
        (lambda p: rewrite(p, metadata={"vqserve.digest": "0" * 64}), "it was damaged or changed"),
        (lambda p: rewrite(p, tensors={"used": np.array([0, 12])}), r"used\[1\] is 12, not in \[0, 12\)"),
        (lambda p: rewrite(p, tensors={"used": np.array([-1])}), r"used\[0\] is -1"),
        (lambda p: rewrite(p, tensors={"used": np.array([1], np.int32)}), "'used' is I32, not I64"),
        (lambda p: rewrite(p, tensors={"used": np.empty(0, np.int64)}), "not be empty"),
        (lambda p: rewrite(p, tensors={"used": np.array([[1]])}), "one axis"),
    ],
)
def test_inconsistent_files_are_rejected(vq_path, change, match):
    rejected(change(vq_path), match)


def test_mixed_types_are_rejected(tmp_path, make_quantizer):
    path = tmp_path / "p.safetensors"
    save_codebook(make_quantizer("projection_out"), path)
    rejected(rewrite(path, tensors={"proj_in.bias": np.zeros(3)}), "some tensors are F32 and some F64")
    rejected(with_arguments(path, output_dim=None), "'proj_out.bias' does not belong")
    rejected(with_arguments(path, output_dim=0), "'output_dim' is 0")


def test_a_direction_of_length_zero_is_rejected(tmp_path, make_quantizer):
    path = tmp_path / "w.safetensors"
    save_codebook(make_quantizer("vq_weight_norm"), path)
    name = "embedding.parametrizations.weight.original1"
    direction = load_file(path)[name]
    direction[:, 1] = 0
    rejected(rewrite(path, tensors={name: direction}), "column 1 of")
    norm = name.replace("original1", "original0")
    wide = {name: np.ones((12, 3)), norm: np.full((1, 3), 1e39)}
    rejected(rewrite(path, tensors=wide), "beyond float32's range")


def test_a_remap_longer_than_an_index_can_count_is_rejected():
    arguments = {"n_e": 3, "e_dim": 1, "embedding_weight_norm": False, "unknown_index": "extra", "layout": None}
    claims = {WEIGHT: ("F32", (3, 1)), "used": ("I64", (1 << 32,))}
    with pytest.raises(StateError, match="more than an index can count"):
        check_claims("vq", arguments, claims)
    check_claims("vq", {**arguments, "unknown_index": "random"}, claims)


def raw(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "body", "length", "match"),
    [
        (b"", b"", 1 << 63, "claims a header of"),
        (b"{}", b"", 3, "claims a header of"),
        (b" " * (1 << 20) + b"{}", b"", None, "claims a header of"),
        (b"{", b"", None, "not JSON"),
        (b"\xff", b"", None, "not JSON"),
        (b"[" * 100_000, b"", None, "not JSON"),
        (b'{"a":1,"a":1}', b"", None, "a name occurs twice"),
        ([], b"", None, "no JSON object"),
        ({"__metadata__": []}, b"", None, "does not map text to text"),
        ({"__metadata__": {"a": 1}}, b"", None, "does not map text to text"),
        ({"a": 1}, b"", None, "does not give dtype, shape"),
        ({"a": {**entry(), "x": 1}}, bytes(4), None, "does not give dtype, shape"),
        ({"a": entry(dtype=3)}, bytes(4), None, "malformed dtype"),
        ({"a": entry(shape=(-1,))}, bytes(4), None, "malformed dtype or shape"),
        ({"a": entry(shape=(1.0,))}, bytes(4), None, "malformed dtype or shape"),
        ({"a": entry(shape=(True,))}, bytes(4), None, "malformed dtype or shape"),
        ({"a": entry(shape=(1,) * 40)}, bytes(4), None, "malformed dtype or shape"),
        ({"a": entry(offsets=(4, 0))}, bytes(4), None, "malformed data_offsets"),
        ({"a": entry(offsets=(0, 4, 4))}, bytes(4), None, "malformed data_offsets"),
        ({"a": entry(offsets=(-4, 0))}, bytes(4), None, "malformed data_offsets"),
        ({"a": entry(shape=(1 << 62, 1 << 62))}, bytes(4), None, r"shape \[4611686018427387904, .* in 4 bytes"),
        ({"a": entry(shape=(1 << 40,), offsets=(0, 1 << 42))}, bytes(4), None, "should be"),
        ({"a": entry(), "b": entry()}, bytes(8), None, "gap or an overlap"),
        ({"a": entry(offsets=(4, 8))}, bytes(8), None, "gap or an overlap"),
        ({"a": entry()}, bytes(5), None, "cut short or added to"),
        ({"a": entry()}, bytes(3), None, "cut short or added to"),
    ],
)
def test_malformed_containers_are_rejected(tmp_path, header, body, length, match):
    rejected(raw(tmp_path / "m.safetensors", header, body, length), match)


def test_other_files_are_rejected(tmp_path):
    empty = tmp_path / "e.safetensors"
    empty.write_bytes(b"")
    rejected(empty, "too short")
    rejected(tmp_path / "nothing.safetensors", "there is no such file")
    rejected(tmp_path, "it is a folder: name a .safetensors file")
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    rejected(pipe, "no regular file")


def test_a_lying_header_takes_no_memory(tmp_path, vq_path):
    # A sparse file: everything is consistent but for the arguments, and nothing is read before they are compared.
    size = 1 << 40
    header = {
        "__metadata__": {
            "vqserve.format": "1",
            "vqserve.kind": "vq",
            "vqserve.arguments": '{"n_e":12,"e_dim":3,"unknown_index":"random","embedding_weight_norm":false}',
            "vqserve.digest": "0" * 64,
            "vqserve.provenance": "{}",
        },
        "embedding.weight": entry(shape=(size // 4, 1), offsets=(0, size)),
    }
    path = raw(tmp_path / "big.safetensors", header)
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError:
        pytest.skip("this file system has no sparse files of 1 TiB")
    tracemalloc.start()
    rejected(path, "the arguments make it")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_that_shrinks_while_it_is_read_is_rejected(tmp_path, monkeypatch):
    # Longer than what a reader takes in at once.
    path = tmp_path / "c.safetensors"
    save_codebook(VectorQuantizer(1 << 14, 8), path)
    read_header = codebook_file.read_header

    def shrinking(file, **options):
        header = read_header(file, **options)
        os.truncate(path, 64)
        return header

    monkeypatch.setattr(codebook_file, "read_header", shrinking)
    rejected(path, "became shorter")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    quantizer = VectorQuantizerWithInputProjection(4, 6, 2, output_dim=3, remap=[1, 5], unknown_index="extra")
    path = folder / "sound.safetensors"
    digest = save_codebook(quantizer, path, provenance={"a": 1})
    return path.read_bytes(), digest, folder / "damaged.safetensors"


def load_damaged(sound, data: bytes) -> None:
    _, digest, path = sound
    path.write_bytes(data)
    tracemalloc.start()
    try:
        codebook = load_codebook(path)
    except CodebookFileError:
        pass
    else:
        # What hit the provenance or an argument of training alone is no damage to what is served.
        assert codebook.digest == digest == codebook_digest(codebook.quantizer)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


def test_every_truncation_is_rejected(sound):
    data, _, path = sound
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CodebookFileError):
            load_codebook(path)


@settings(max_examples=300)
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits(sound, flips):
    damaged = bytearray(sound[0])
    for position, bit in flips:
        damaged[position % len(damaged)] ^= 1 << bit
    load_damaged(sound, bytes(damaged))


@settings(max_examples=150)
@given(
    st.integers(0, 1 << 20),
    st.sampled_from([b"[", b"9", b"-", b'"', b"1e9", b"\x00", b"null", b"{}", b"99999999999999999999", b"true"]),
    st.integers(0, 6),
)
@example(0, b"\xff" * 8, 8)
def test_bytes_put_in_and_taken_out(sound, position, text, removed):
    data = sound[0]
    position %= len(data)
    damaged = data[:position] + text + data[position + removed :]
    load_damaged(sound, damaged)
    # The same with an honest length in front, so that what is inside is reached.
    header = int.from_bytes(data[:8], "little")
    if 8 <= position < 8 + header:
        honest = struct.pack("<Q", header + len(text) - min(removed, 8 + header - position)) + damaged[8:]
        load_damaged(sound, honest)


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_noise_is_rejected(sound, noise):
    load_damaged(sound, noise)


def test_a_disk_that_is_full_is_named_and_keeps_nothing(tmp_path, make_quantizer):
    path = tmp_path / "book.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(OSError, match=r"book\.safetensors") as caught:
            save_codebook(make_quantizer("vq"), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["ema", "rvq", "gumbel", "fsq"])
def test_finding_the_shapes_of_a_file_loads_no_sympy(make_quantizer, tmp_path, kind):
    """torch would load it for initial values on the device meta: a second and 150 MB in every process that serves."""
    path = tmp_path / "book.safetensors"
    save_codebook(make_quantizer(kind), path)
    code = (
        "import sys; from vqserve_server.codebooks import load_codebook; load_codebook(sys.argv[1]); "
        "print('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
