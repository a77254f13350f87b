"""Codebook files of the kinds that only infer: their digests stay, and what a stranger's file claims is checked."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vqserve_server.codebooks import codebook_digest, load_codebook, save_codebook
from vqserve_server.codebooks.state import CodebookState
from vqserve_server.errors import CodebookError, CodebookFileError
from vqserve_server.quantizers import (
    CosineQuantizer,
    DotQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    ResidualFiniteScalarQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
)


def rewrite(path: Path, *, drop=(), tensors=None, **arguments) -> Path:
    """Write a file anew with the public library, with other arguments and tensors."""
    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata())
    given = {**json.loads(metadata["vqserve.arguments"]), **arguments}
    metadata["vqserve.arguments"] = json.dumps({name: value for name, value in given.items() if name not in drop})
    arrays = {name: array for name, array in {**load_file(path), **(tensors or {})}.items() if name not in drop}
    changed = path.with_name("changed.safetensors")
    save_file(arrays, changed, metadata)
    return changed


def rejected(path: Path, match: str) -> None:
    with pytest.raises(CodebookFileError, match=match) as caught:
        load_codebook(path)
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)


def counted(quantizer):
    """Fill the tensors with small numbers that everybody can write down."""
    with torch.no_grad():
        for number, parameter in enumerate(quantizer.parameters()):
            parameter.copy_((torch.arange(parameter.numel()) + number).reshape(parameter.shape) / 4)
    return quantizer


# Digests.

FIXED = {
    "cosine": (
        lambda: counted(CosineQuantizer(3, 2, decode_normalized=True)),
        '{"decode_normalized":true,"e_dim":2,"input_dim":null,"n_e":3,"output_dim":null}',
    ),
    "dot": (
        lambda: counted(DotQuantizer(3, 2, input_dim=4)),
        '{"e_dim":2,"input_dim":4,"n_e":3,"output_dim":null}',
    ),
    "rvq": (
        lambda: counted(ResidualQuantizer(3, 2, 1, 4, first_quantizers=1, inner_dim=1)),
        '{"decode_normalized":false,"e_dim":1,"first_quantizers":1,"groups":1,"inner_dim":1,"input_dim":4,'
        '"layout":"channels_first","metric":"l2","n_e":2,"num_quantizers":3,"stage_projections":false}',
    ),
    "rvq_sizes": (
        lambda: counted(ResidualQuantizer(3, [4, 2, 2], 2)),
        '{"decode_normalized":false,"e_dim":2,"first_quantizers":0,"groups":1,"inner_dim":null,"input_dim":2,'
        '"layout":"channels_first","metric":"l2","n_e":[4,2,2],"num_quantizers":3,"stage_projections":false}',
    ),
    "rvq_normalized_residuals": (
        lambda: counted(ResidualQuantizer(2, 3, 2, normalize_residuals=True)),
        '{"decode_normalized":false,"e_dim":2,"first_quantizers":0,"groups":1,"inner_dim":null,"input_dim":2,'
        '"layout":"channels_first","metric":"l2","n_e":3,"normalize_residuals":true,"num_quantizers":2,'
        '"stage_projections":false}',
    ),
    "fsq": (
        lambda: FiniteScalarQuantizer([8, 5, 5]),
        '{"bound":"atanh","input_dim":null,"levels":[8,5,5],"output_dim":null}',
    ),
    "residual_fsq": (
        lambda: counted(
            ResidualFiniteScalarQuantizer(
                [4, 4], 4, "atanh_twice", "levels_minus_one", groups=2, input_dim=6, output_dim=6
            )
        ),
        '{"bound":"atanh_twice","groups":2,"input_dim":6,"layout":"channels_first","levels":[4,4],"num_quantizers":4,'
        '"output_dim":6,"scales":"levels_minus_one"}',
    ),
    "lfq": (
        lambda: LookupFreeQuantizer(18, "little"),
        '{"bit_order":"little","bits":18,"input_dim":null,"output_dim":null,"spherical":false}',
    ),
}
# Changing the canonical form makes every pinned digest in the world wrong: these constants never change.
GOLDEN = {
    "cosine": "cff50ac5582f044d8b6cccfc643afc867d735764114723effb401dc89b9ba169",
    "dot": "36fd498e4ad8afd6b55db21a37945da95c5430e139310dd63631a784ddcd21ef",
    "rvq": "7f8679f662d169fe79216eed8e2e574f5f336a5a2182b161470c19860b3a9cb8",
    "rvq_sizes": "58d6c47c3274636d7303c16d6e36ebd5c1cfe5fcf7e17bb083d2971acd253661",
    "rvq_normalized_residuals": "63a2c51e4abd20e8d37272d2fec2e3a4f4b80864a7b852e3af23bcc15d7472ff",
    "fsq": "387bbd8e21035365835d27c03f9fc02bc87c6ac0a972dd11dae09dcc2a58aa65",
    "residual_fsq": "4aeff79a25919f6ef9a2bbdea5edb14a8908105661345cf98580c957f5b51e87",
    "lfq": "ed2d8b333aa8dfa94dde26cb7e523b9b2639e5c13d758ecc3bddfb800642cf67",
}


@pytest.mark.parametrize("name", FIXED)
def test_golden_digests(name):
    assert codebook_digest(FIXED[name][0]()) == GOLDEN[name]


@pytest.mark.parametrize("name", FIXED)
def test_the_canonical_form(name):
    make, arguments = FIXED[name]
    fields = [b"vqserve codebook digest 1", name.partition("_")[0].encode(), arguments.encode()]
    for key, tensor in sorted(make().state_dict().items()):
        shape = json.dumps(list(tensor.shape), separators=(",", ":")).encode()
        fields += [key.encode(), b"F32", shape, tensor.numpy().astype("<f4").tobytes()]
    form = b"".join(struct.pack("<Q", len(field)) + field for field in fields)
    assert hashlib.sha256(form).hexdigest() == GOLDEN[name]


def test_the_page_has_a_digest_to_compare_with():
    page = (Path(__file__).parents[3] / "docs" / "codebooks.md").read_text()
    assert GOLDEN["fsq"] in page


def test_the_layout_counts_where_it_is_said():
    quantizer = counted(VectorQuantizer(3, 2))
    digests = {None: codebook_digest(quantizer)}
    for layout in ("channels_first", "channels_last"):
        quantizer.layout = layout
        digests[layout] = codebook_digest(quantizer)
    assert len(set(digests.values())) == 3
    quantizer.layout = None
    assert codebook_digest(quantizer) == digests[None]


def test_a_file_without_a_layout_is_as_it_always_was(tmp_path):
    path = tmp_path / "c.safetensors"
    save_codebook(VectorQuantizer(3, 2), path)
    with safe_open(path, framework="numpy") as file:
        assert "layout" not in json.loads(file.metadata()["vqserve.arguments"])
    with_null = rewrite(path, layout=None)
    assert load_codebook(with_null).digest == load_codebook(path).digest
    # Of a residual codebook it is always said.
    save_codebook(ResidualQuantizer(2, 3, 2), path)
    with safe_open(path, framework="numpy") as file:
        assert json.loads(file.metadata()["vqserve.arguments"])["layout"] == "channels_first"


def test_arguments_that_change_what_is_computed_change_the_digest():
    def digests(*quantizers):
        return {codebook_digest(counted(quantizer)) for quantizer in quantizers}

    assert len(digests(CosineQuantizer(3, 2), CosineQuantizer(3, 2, True), DotQuantizer(3, 2))) == 3
    assert len(digests(*(FiniteScalarQuantizer([5, 5], bound) for bound in ("atanh", "tan", "symmetric")))) == 3
    assert len(digests(*(FiniteScalarQuantizer(levels) for levels in ([8, 5], [5, 8], [40])))) == 3
    versions = itertools.product(
        ("atanh_twice", "atanh", "symmetric", "soft_clamp"), ("levels_minus_one", "levels"), (2, 4), (1, 2)
    )
    assert len(digests(*(ResidualFiniteScalarQuantizer([5, 5], n, b, s, groups=g) for b, s, n, g in versions))) == 32
    orders, shapes = ("big", "little"), (False, True)
    assert len(digests(*(LookupFreeQuantizer(8, order, shape) for order in orders for shape in shapes))) == 4
    arrangements = (
        {"metric": "cosine"},
        {"metric": "cosine", "decode_normalized": True},
        {"metric": "l2"},
        {"first_quantizers": 1},
        {"first_quantizers": 2},
        {"normalize_residuals": True},
        {"metric": "cosine", "normalize_residuals": True},
    )
    assert len(digests(*(ResidualQuantizer(4, 3, 2, **options) for options in arrangements))) == 7


def test_the_number_of_codes_is_an_integer_where_all_stages_agree(tmp_path):
    path = tmp_path / "c.safetensors"
    digests = []
    for n_e in (3, [3, 3], (np.int64(3), 3), [3, 2], [2, 3]):
        quantizer = counted(ResidualQuantizer(2, n_e, 2))
        digests.append(save_codebook(quantizer, path))
        with safe_open(path, framework="numpy") as file:
            written = json.loads(file.metadata()["vqserve.arguments"])["n_e"]
        assert written == (3 if len(digests) <= 3 else n_e)
        codebook = load_codebook(path)
        assert (codebook.digest, codebook.arguments["n_e"]) == (digests[-1], written)
        again = path.with_name("again.safetensors")
        save_codebook(codebook.quantizer, again)
        assert again.read_bytes() == path.read_bytes()
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests)) == 3


def test_normalised_residuals_are_written_only_where_there_are_some(path_of, tmp_path):
    path = path_of("rvq")
    with safe_open(path, framework="numpy") as file:
        assert "normalize_residuals" not in json.loads(file.metadata()["vqserve.arguments"])
    assert load_codebook(rewrite(path, normalize_residuals=False)).digest == GOLDEN["rvq"]
    save_codebook(counted(ResidualQuantizer(2, 3, 2, normalize_residuals=True)), path)
    with safe_open(path, framework="numpy") as file:
        assert json.loads(file.metadata()["vqserve.arguments"])["normalize_residuals"] is True
    assert load_codebook(path).quantizer.structure.normalize_residuals


def test_a_file_that_lists_equal_numbers_is_the_same_codebook(path_of):
    path = path_of("rvq")
    listed = load_codebook(rewrite(path, n_e=[2, 2, 2]))
    assert (listed.digest, listed.arguments["n_e"]) == (GOLDEN["rvq"], 2)
    state = CodebookState.of(listed.quantizer)
    given = CodebookState.of_arrays("rvq", {**state.arguments, "n_e": [2, 2, 2]}, state.tensors)
    assert given.written_arguments() == state.written_arguments()
    assert given.digest() == GOLDEN["rvq"]


# What a stranger's file can claim.


@pytest.fixture
def path_of(tmp_path):
    def save(kind):
        path = tmp_path / f"{kind}.safetensors"
        save_codebook(FIXED[kind][0](), path)
        return path

    return save


STAGE = "parts.1.stages.0.embedding.weight"
PROJECTION = "parts.1.proj_in.weight"


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("cosine", {"n_e": 4}, r"has shape \[3, 2\], the arguments make it \[4, 2\]"),
        ("cosine", {"decode_normalized": 1}, "'decode_normalized' is 1, it must be true or false"),
        ("cosine", {"drop": ["decode_normalized"]}, "'decode_normalized' is missing"),
        ("cosine", {"input_dim": 5}, "'proj_in.bias' is missing"),
        ("cosine", {"input_dim": 1 << 40}, "'input_dim' is 1099511627776"),
        ("cosine", {"metric": "l2"}, "'metric' is not one of kind 'cosine'"),
        ("dot", {"input_dim": None}, "'proj_in.bias' does not belong to kind 'dot'"),
        ("dot", {"tensors": {"embedding.weight": np.full((3, 2), np.nan, np.float32)}}, r"weight\[0, 0\] is nan"),
        ("fsq", {"levels": []}, r"'levels' is \[\], it must have a product"),
        ("fsq", {"levels": [8, 1]}, "must be a list of integers in"),
        ("fsq", {"levels": [8, True]}, "must be a list of integers in"),
        ("fsq", {"levels": [8, 5.0]}, "must be a list of integers in"),
        ("fsq", {"levels": "885"}, "must be a list of integers in"),
        ("fsq", {"levels": {"a": 8}}, "must be a list of integers in"),
        ("fsq", {"levels": [1 << 17]}, "must be a list of integers in"),
        ("fsq", {"levels": [65536, 65536, 2]}, r"must have a product in \[2, 4294967296\]"),
        ("fsq", {"levels": [2] * 33}, "must have a product"),
        ("fsq", {"levels": [2] * 20000}, "must have a product"),
        ("fsq", {"bound": "tanh"}, "'bound' is 'tanh', it must be one of \"atanh\", \"tan\""),
        ("fsq", {"bound": None}, "'bound' is None"),
        ("fsq", {"tensors": {"used": np.array([1])}}, "'used' does not belong to kind 'fsq'"),
        ("fsq", {"tensors": {"codes": np.zeros(1, np.float32)}}, "'codes' does not belong"),
        ("fsq", {"levels": [8, 5]}, "has the digest"),
        ("fsq", {"unknown_index": "random"}, "'unknown_index' is not one of kind 'fsq'"),
        ("residual_fsq", {"levels": [4]}, "has shape"),
        ("residual_fsq", {"levels": [4, 5]}, "has the digest"),
        ("residual_fsq", {"levels": [4, 1]}, "must be a list of integers in"),
        ("residual_fsq", {"levels": [65536, 65536], "num_quantizers": 256}, "do not fit together: .* too fine"),
        ("residual_fsq", {"num_quantizers": 0}, r"'num_quantizers' is 0, it must be an integer in \[1, 256\]"),
        ("residual_fsq", {"num_quantizers": 257}, "'num_quantizers' is 257"),
        ("residual_fsq", {"num_quantizers": 3}, "do not fit together: 2 groups do not divide 3 quantizers"),
        ("residual_fsq", {"num_quantizers": 6}, "has the digest"),
        ("residual_fsq", {"bound": "tan"}, "'bound' is 'tan', it must be one of \"atanh_twice\", \"atanh\""),
        ("residual_fsq", {"bound": "soft_clamp"}, "has the digest"),
        ("residual_fsq", {"drop": ["bound"]}, "'bound' is missing"),
        ("residual_fsq", {"scales": 4}, "'scales' is 4, it must be one of"),
        ("residual_fsq", {"scales": "levels"}, "has the digest"),
        ("residual_fsq", {"drop": ["scales"]}, "'scales' is missing"),
        ("residual_fsq", {"groups": 4}, "do not fit together: 4 groups do not divide 6 channels of input_dim"),
        ("residual_fsq", {"groups": 1}, "'parts.1.proj_in.bias' does not belong"),
        ("residual_fsq", {"groups": 257}, "'groups' is 257"),
        ("residual_fsq", {"input_dim": 8}, "has shape"),
        ("residual_fsq", {"input_dim": None}, "'parts.0.proj_in.bias' does not belong"),
        ("residual_fsq", {"output_dim": None}, "'parts.0.proj_out.bias' does not belong"),
        ("residual_fsq", {"output_dim": 1 << 30}, "the arguments make it"),
        ("residual_fsq", {"layout": None}, "has the digest"),
        ("residual_fsq", {"drop": ["layout"]}, "'layout' is missing"),
        ("residual_fsq", {"drop": [PROJECTION]}, f"'{PROJECTION}' is missing"),
        ("residual_fsq", {"tensors": {PROJECTION: np.zeros((2, 3), np.float32)}}, "damaged or changed"),
        ("residual_fsq", {"tensors": {PROJECTION: np.full((2, 3), np.nan, np.float32)}}, r"weight\[0, 0\] is nan"),
        ("residual_fsq", {"tensors": {"used": np.array([1])}}, "'used' does not belong to kind 'residual_fsq'"),
        ("lfq", {"bits": 33}, r"'bits' is 33, it must be an integer in \[1, 32\]"),
        ("lfq", {"bits": 0}, "'bits' is 0"),
        ("lfq", {"bit_order": "middle"}, 'must be one of "big", "little"'),
        ("lfq", {"bit_order": ["big"]}, "must be one of"),
        ("lfq", {"spherical": 0}, "must be true or false"),
        ("lfq", {"output_dim": 4}, "'proj_out.bias' is missing"),
        ("rvq", {"n_e": [2, 2]}, "do not fit together: num_codes must have 3 numbers, one for each stage, not 2"),
        ("rvq", {"n_e": [2, 2, 2, 2]}, "do not fit together: num_codes must have 3 numbers, one for each stage, not 4"),
        ("rvq", {"n_e": []}, r"'n_e' is \[\], it must have 1 to 256 numbers"),
        ("rvq", {"n_e": [2] * 100000}, "it must have 1 to 256 numbers"),
        ("rvq", {"n_e": [2, 2, 0]}, r"'n_e' is \[2, 2, 0\], it must be an integer in \[1, 4294967296\]"),
        ("rvq", {"n_e": [2, 2, (1 << 32) + 1]}, "it must be an integer in"),
        ("rvq", {"n_e": [2, 2, 1 << 1000]}, "it must be an integer in"),
        ("rvq", {"n_e": [2, 2, 2.0]}, "it must be an integer in"),
        ("rvq", {"n_e": [2, 2, True]}, "it must be an integer in"),
        ("rvq", {"n_e": [2, 2, [2]]}, "it must be an integer in"),
        ("rvq", {"n_e": [2, 2, None]}, "it must be an integer in"),
        ("rvq", {"n_e": {"0": 2}}, "it must be an integer in"),
        ("rvq", {"n_e": "222"}, "it must be an integer in"),
        ("rvq", {"n_e": [2, 2, 3]}, r"has shape \[2, 1\], the arguments make it \[3, 1\]"),
        ("rvq", {"n_e": [2, 2, 1 << 32]}, "the arguments make it"),
        ("rvq", {"e_dim": 1 << 31, "inner_dim": 1 << 31, "n_e": [1 << 32, 1, 1]}, "the arguments make it"),
        ("cosine", {"n_e": [3]}, "it must be an integer in"),
        ("rvq", {"num_quantizers": 0}, "'num_quantizers' is 0"),
        ("rvq", {"num_quantizers": 257}, r"'num_quantizers' is 257, it must be an integer in \[1, 256\]"),
        ("rvq", {"num_quantizers": 4}, "'parts.1.stages.2.embedding.weight' is missing"),
        ("rvq", {"num_quantizers": 2}, "'parts.1.stages.1.embedding.weight' does not belong"),
        ("rvq", {"normalize_residuals": 1}, "'normalize_residuals' is 1, it must be true or false"),
        ("rvq", {"normalize_residuals": None}, "'normalize_residuals' is None, it must be true or false"),
        ("rvq", {"normalize_residuals": True}, "damaged or changed|has the digest"),
        ("rvq", {"first_quantizers": 3}, "do not fit together: first_quantizers must be an integer in"),
        ("rvq", {"first_quantizers": 0}, "is missing"),
        ("rvq", {"first_quantizers": -1}, "'first_quantizers' is -1"),
        ("rvq", {"groups": 3}, "do not fit together: groups and first_quantizers"),
        ("rvq", {"groups": 2, "first_quantizers": 0}, "do not fit together: 2 groups do not divide 3 quantizers"),
        ("rvq", {"metric": "l1"}, '\'metric\' is \'l1\', it must be one of "l2", "cosine", "dot"'),
        ("rvq", {"decode_normalized": True}, "do not fit together: decode_normalized is for"),
        ("rvq", {"inner_dim": None}, "do not fit together: codes of width 1 cannot be subtracted from 4"),
        ("rvq", {"inner_dim": 2}, "do not fit together: codes of width 1"),
        ("rvq", {"stage_projections": True}, "stages.0.proj_in.bias' is missing"),
        ("rvq", {"e_dim": 1 << 31, "inner_dim": 1 << 31, "n_e": 1 << 32}, "the arguments make it"),
        ("rvq", {"drop": ["layout"]}, "'layout' is missing"),
        ("rvq", {"layout": "nchw"}, "'layout' is 'nchw'"),
        ("rvq", {"layout": True}, "'layout' is True"),
        ("rvq", {"drop": [STAGE]}, f"'{STAGE}' is missing"),
        ("rvq", {"tensors": {"used": np.array([1])}}, "'used' does not belong to kind 'rvq'"),
        ("rvq", {"tensors": {STAGE: np.zeros((3, 1), np.float32)}}, "has shape"),
        ("rvq", {"tensors": {STAGE: np.zeros((2, 1))}}, "some tensors are F32 and some F64"),
        ("rvq", {"tensors": {STAGE: np.zeros((2, 1), np.float16)}}, "is F16"),
        ("rvq", {"tensors": {STAGE: np.full((2, 1), -np.inf, np.float32)}}, r"embedding.weight\[0, 0\] is -inf"),
        ("rvq", {"tensors": {STAGE: np.zeros((2, 1), np.float32)}}, "damaged or changed"),
    ],
)
def test_inconsistent_files_are_rejected(path_of, kind, change, match):
    rejected(rewrite(path_of(kind), **change), match)


def test_what_only_a_module_can_be_is_not_kept(tmp_path):
    for quantizer, match in (
        (CosineQuantizer(3, 2, remap=[1], unknown_index=-1), "'unknown_index' is -1"),
        (LookupFreeQuantizer(3, "big", input_dim=2).half(), r"call .float\(\)"),
        (ResidualQuantizer(2, 3, 2).bfloat16(), r"call .float\(\)"),
    ):
        with pytest.raises(CodebookError, match=match):
            save_codebook(quantizer, tmp_path / "c.safetensors")
    nan = ResidualQuantizer(2, 3, 2)
    nan.parts[0].stages[1].embedding.weight.data[2, 1] = torch.nan
    with pytest.raises(CodebookError, match=r"parts.0.stages.1.embedding.weight\[2, 1\] is nan"):
        save_codebook(nan, tmp_path / "c.safetensors")


def test_as_many_stages_as_there_may_be(tmp_path):
    path = tmp_path / "c.safetensors"
    quantizer = ResidualQuantizer(256, 2, 1, 3, "cosine", stage_projections=True)
    digest = save_codebook(quantizer, path)
    assert load_codebook(path).digest == digest


@pytest.fixture(scope="module", params=["rvq", "fsq", "cosine", "residual_fsq"])
def sound(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "sound.safetensors"
    digest = save_codebook(FIXED[request.param][0](), path)
    return path.read_bytes(), digest, path.with_name("damaged.safetensors")


@settings(max_examples=200)
@given(
    flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 7)), min_size=0, max_size=3),
    put=st.none() | st.tuples(st.integers(0, 1 << 20), st.sampled_from([b"9", b"-", b"[", b"1e9", b"null", b"9" * 40])),
)
def test_damage_is_rejected_or_does_not_matter(sound, flips, put):
    data, digest, path = sound
    damaged = bytearray(data)
    for position, bit in flips:
        damaged[position % len(damaged)] ^= 1 << bit
    if put is not None:
        header = int.from_bytes(data[:8], "little")
        position = 8 + put[0] % header
        damaged[position:position] = put[1]
        # An honest length in front, so that what is inside is reached.
        damaged[:8] = struct.pack("<Q", header + len(put[1]))
    path.write_bytes(bytes(damaged))
    tracemalloc.start()
    try:
        codebook = load_codebook(path)
    except CodebookFileError:
        pass
    else:
        assert codebook.digest == digest == codebook_digest(codebook.quantizer)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20
