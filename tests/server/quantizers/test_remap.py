"""The remap: what is reported, what can be decoded, and that nothing else is touched."""

from __future__ import annotations

import io
import logging
import pickle

import numpy as np
import pytest
import torch

from vqserve_server.errors import IndexOutOfRange, InvalidDtype, InvalidOption, InvalidShape
from vqserve_server.quantizers import VectorQuantizer
from vqserve_server.quantizers.remap import hashed_positions, splitmix64

USED = [9, 3, 12, 3, 0]


def _splitmix64(value: int) -> int:
    mask = 2**64 - 1
    x = (value + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_splitmix64_is_the_published_generator():
    assert _splitmix64(0) == 0xE220A8397B1DCDAF
    ids = [0, 1, 2, 1023, 2**31, 2**40 + 7]
    got = [value % 2**64 for value in splitmix64(torch.tensor(ids)).tolist()]
    assert got == [_splitmix64(value) for value in ids]


@pytest.mark.parametrize("num_used", [1, 2, 5, 1000, 2**31 + 11])
def test_hashed_positions_are_unsigned_remainders(num_used):
    ids = torch.arange(300)
    assert hashed_positions(ids, num_used).tolist() == [_splitmix64(i) % num_used for i in range(300)]


@pytest.mark.parametrize("kind", ["vq", "ema", "vq_projection"])
def test_encode_maps_an_unknown_id_to_a_fixed_position(make, kind, latents):
    module, full = make(kind, remap=USED), make(kind)
    z = latents(module, 4)
    ids = full.encode(z).flatten().tolist()
    expected = [USED.index(i) if i in USED else _splitmix64(i) % len(USED) for i in ids]
    assert any(i not in USED for i in ids)
    assert any(i in USED for i in ids)
    assert module.encode(z).flatten().tolist() == expected
    generator = torch.get_rng_state()
    assert module.encode(z).flatten().tolist() == expected
    assert torch.equal(torch.get_rng_state(), generator)


def test_random_draws_fresh_positions_of_the_global_generator(make):
    module = make("vq", remap=USED)
    ids = torch.arange(16).repeat(50).reshape(20, 40)
    torch.manual_seed(3)
    first = module.remap_to_used(ids)
    again = module.remap_to_used(ids)
    unknown = ~torch.isin(ids, torch.tensor(USED))
    assert not torch.equal(first, again)
    assert torch.equal(first[~unknown], again[~unknown])
    # The original's draw: one for each unknown id, in order.
    torch.manual_seed(3)
    assert torch.equal(first[unknown], torch.randint(0, 5, (int(unknown.sum()),)))
    assert set(first[unknown].tolist()) == set(range(5))


@pytest.mark.parametrize("kind", ["vq", "ema", "vq_projection"])
def test_forward_draws_what_encode_hashes(make, latents, kind):
    module = make(kind, remap=USED).eval()
    z = latents(module, 4)
    key = "encoding_indices" if kind == "ema" else "min_encoding_indices"
    first, second = (torch.stack([module(z)[1][key] for _ in range(4)]) for _ in range(2))
    assert not torch.equal(first, second)
    known = torch.isin(make(kind).encode(z).flatten(), torch.tensor(USED))
    assert torch.equal(first[0][known], module.encode(z).flatten()[known])


@pytest.mark.parametrize(
    ("unknown_index", "re_embed", "attribute", "emitted"),
    [("extra", 6, 5, 5), (2, 5, 2, 2), (77, 5, 77, 77), (-1, 5, -1, -1)],
)
def test_unknown_ids_become_unknown_index(make, kind, unknown_index, re_embed, attribute, emitted):
    module = make(kind, remap=USED, unknown_index=unknown_index)
    assert (module.re_embed, module.unknown_index) == (re_embed, attribute)
    ids = torch.arange(16).reshape(4, 4)
    expected = [USED.index(i) if i in USED else emitted for i in range(16)]
    assert module.remap_to_used(ids).flatten().tolist() == expected
    assert module.reported(ids.flatten()).tolist() == expected


def test_vocabulary(make, kind):
    # What is reported or decoded lies below vocab_size, what is decoded below decodable.
    for unknown_index, decodable, vocab_size in [("random", 5, 5), ("extra", 6, 6), (2, 5, 5), (77, 5, 78), (-1, 5, 5)]:
        module = make(kind, remap=USED, unknown_index=unknown_index)
        assert module.decodable == decodable
        assert module.vocab_size == (decodable if kind == "gumbel" else vocab_size)
    for unknown_index in ("random", "extra", 77):
        module = make(kind, unknown_index=unknown_index)
        assert (module.decodable, module.vocab_size) == (16, 16)


def test_unmap_and_its_bounds(make, kind):
    module = make(kind, remap=USED, unknown_index="extra")
    assert module.unmap_to_all(torch.arange(6)).tolist() == [*USED, USED[0]]
    with pytest.raises(IndexOutOfRange, match=r"indices\[0\] is 6, not in \[0, 6\)"):
        module.decode(torch.tensor([6]))
    sentinel = make(kind, remap=USED, unknown_index=77)
    assert sentinel.unmap_to_all(torch.arange(5)).tolist() == USED
    for index in (5, 77, -1):
        with pytest.raises(IndexOutOfRange, match=rf"is {index}, not in \[0, 5\)"):
            sentinel.decode(torch.tensor([index]))
        with pytest.raises(IndexOutOfRange, match=rf"is {index}, not in \[0, 5\)"):
            sentinel.get_codebook_entry(torch.tensor([index]), (1, module.code_dim))


def test_decode_under_a_remap_gives_the_used_rows(make, kind):
    module, full = make(kind, remap=USED, unknown_index="extra"), make(kind)
    positions = torch.tensor([[0, 5, 3], [4, 2, 1]])
    ids = torch.tensor([[9, 9, 3], [0, 12, 3]])
    assert torch.equal(module.decode(positions), full.decode(ids))
    assert torch.equal(module.get_codebook_entry(positions), full.get_codebook_entry(ids))


def test_arguments_are_never_changed(make, kind):
    given = torch.tensor(USED)
    module = make(kind, remap=given, unknown_index="extra")
    ids, positions = torch.arange(16).reshape(4, 4), torch.arange(6).reshape(2, 3)
    module.remap_to_used(ids)
    module.unmap_to_all(positions)
    module.decode(positions)
    module.get_codebook_entry(positions)
    assert torch.equal(ids, torch.arange(16).reshape(4, 4))
    assert torch.equal(positions, torch.arange(6).reshape(2, 3))
    # Nor does the module share the caller's memory.
    module.load_state_dict({**module.state_dict(), "used": torch.tensor([1, 1, 1, 1, 1])})
    assert given.tolist() == USED
    array = np.array(USED)
    from_array, from_tensor = make(kind, remap=array), make(kind, remap=given)
    array[:] = 0
    given.zero_()
    assert from_array.used.tolist() == from_tensor.used.tolist() == USED


def test_the_remap_touches_only_the_reported_indices(make, latents):
    # The original of EMA cannot be built with a remap; VQ must train on full ids as without one.
    for kind, key in (("vq", "min_encoding_indices"), ("ema", "encoding_indices")):
        arguments = {"log_perplexity": True} if kind == "vq" else {}
        plain, remapped = make(kind, **arguments).train(), make(kind, remap=USED, unknown_index=-5, **arguments).train()
        z = latents(plain, 4)
        z_q, info = plain(z)
        z_q_remapped, info_remapped = remapped(z)
        assert torch.equal(z_q, z_q_remapped)
        for name in set(info) - {key}:
            assert torch.equal(info[name], info_remapped[name])
        assert set(info) == set(info_remapped)
        assert torch.equal(info_remapped[key], remapped.remap_to_used(info[key]))
        for name, value in plain.state_dict().items():
            assert torch.equal(value, remapped.state_dict()[name])


def test_a_token_whose_code_is_not_used_keeps_its_true_code_in_z_q(make, latents):
    module, full = make("vq", remap=USED).eval(), make("vq")
    z = latents(module, 4)
    ids = full.encode(z)
    unknown = ~torch.isin(ids, torch.tensor(USED))
    torch.testing.assert_close(module(z)[0], full.decode(ids))
    replaced = (module.decode(module.encode(z)) != full.decode(ids)).any(dim=1)
    assert torch.equal(replaced, unknown)


def test_gumbel_restricts_the_competition_to_used_codes(make, latents):
    module, full = make("gumbel", remap=USED, unknown_index="extra"), make("gumbel")
    z = latents(module, 4)
    _, info = full(z, return_logits=True)
    expected = info["logits"][:, USED].argmax(dim=1)
    assert torch.equal(module.encode(z), expected)
    assert not (module.encode(z) == 3).any(), "an id that is listed twice competes once, at its first position"
    assert module(z, return_logits=True)[1]["logits"].shape == (2, 5, 3, 4)
    assert int(module(z)[1]["indices"].max()) < 5


@pytest.mark.parametrize("form", ["path", "str", "list", "int32", "tensor", "uint8 tensor"])
def test_forms_of_a_remap(make, kind, tmp_path, form):
    path = tmp_path / "used.npy"
    np.save(path, np.array(USED, np.int32))
    remap = {
        "path": path,
        "str": str(path),
        "list": USED,
        "int32": np.array(USED, np.int32),
        "tensor": torch.tensor(USED),
        "uint8 tensor": torch.tensor(USED, dtype=torch.uint8),
    }[form]
    module = make(kind, remap=remap)
    assert module.used.dtype == torch.int64
    assert module.used.tolist() == USED
    assert module.remap is remap


@pytest.mark.parametrize(
    ("remap", "error", "text"),
    [
        ([], InvalidDtype, "float64"),
        (np.array([], np.int64), InvalidShape, "not empty"),
        ([[1, 2]], InvalidShape, r"\(1, 2\)"),
        (5, InvalidShape, r"\(\)"),
        ([1.0], InvalidDtype, "float64"),
        ([True], InvalidDtype, "bool"),
        (torch.tensor([1.0]), InvalidDtype, "float32"),
        (torch.tensor([True]), InvalidDtype, "bool"),
        ([0, 16], IndexOutOfRange, "0 to 16"),
        ([-1], IndexOutOfRange, "-1"),
        (torch.tensor([-1]), IndexOutOfRange, "-1"),
        (np.array([2**64 - 1], np.uint64), IndexOutOfRange, "18446744073709551615"),
    ],
)
def test_bad_remaps_are_rejected(make, kind, remap, error, text):
    with pytest.raises(error, match=text) as caught:
        make(kind, remap=remap)
    assert caught.value.advice() == ""


def test_remap_files_are_never_unpickled(make, tmp_path):
    path = tmp_path / "used.npy"
    np.save(path, np.array([{"not": "an integer"}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        make("vq", remap=path)
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="pickle"):
        make("vq", remap=path)


def test_an_archive_and_a_missing_file_are_rejected(make, tmp_path):
    path = tmp_path / "used.npz"
    np.savez(path, used=np.array(USED))
    with pytest.raises(InvalidOption, match="npz"):
        make("vq", remap=path)
    with pytest.raises(FileNotFoundError):
        make("vq", remap=tmp_path / "none.npy")


@pytest.mark.parametrize("unknown_index", [True, False, None, 1.0, "Extra", "5", np.int64(3), 2**63, -(2**63) - 1])
def test_other_unknown_indices_are_rejected(make, kind, unknown_index):
    for remap in (None, USED):
        with pytest.raises(InvalidOption, match="unknown_index must"):
            make(kind, remap=remap, unknown_index=unknown_index)


def test_one_info_line_when_built_with_a_remap(make, kind, caplog):
    with caplog.at_level(logging.INFO):
        make(kind)
        assert not caplog.records
        make(kind, remap=USED, unknown_index="extra")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.name.startswith("vqserve_server.quantizers")
    assert record.getMessage() == "remap of 16 codes: re_embed 6, unknown_index 5"


def test_without_a_remap_there_is_no_used(make, kind):
    for unknown_index, re_embed, attribute in [("random", 16, "random"), ("extra", 17, 16), (4, 16, 4)]:
        module = make(kind, unknown_index=unknown_index)
        assert module.used is None
        assert module.remap is None
        assert "used" not in module.state_dict()
        assert (module.re_embed, module.unknown_index) == (re_embed, attribute)
        ids = torch.arange(16).reshape(2, 8)
        assert torch.equal(module.remap_to_used(ids), ids)
        assert torch.equal(module.unmap_to_all(ids), ids)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("built_with", [None, [5], [1, 2, 3, 4, 5]])
def test_a_remap_is_loaded_from_a_checkpoint(make, latents, kind, built_with, assign):
    source = make(kind, remap=USED, unknown_index="extra")
    module = make(kind, remap=built_with, unknown_index="extra", seed=9)
    result = module.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert module.used.tolist() == USED
    assert (module.re_embed, module.unknown_index) == (6, 5)
    assert list(module.state_dict()) == list(source.state_dict())
    assert module.remap is not None
    z = latents(module, 4)
    assert torch.equal(module.encode(z), source.encode(z))


def test_a_nested_module_loads_a_remap_of_any_integer_type(make, kind):
    source = torch.nn.ModuleDict({"first_stage": torch.nn.ModuleList([make(kind, remap=USED)])})
    target = torch.nn.ModuleDict({"first_stage": torch.nn.ModuleList([make(kind)])})
    state = source.state_dict()
    state["first_stage.0.used"] = state["first_stage.0.used"].to(torch.int32)
    for assign in (False, True):
        target.load_state_dict(state, strict=True, assign=assign)
        assert target["first_stage"][0].used.tolist() == USED
        assert target["first_stage"][0].used.dtype == torch.int64
    assert state["first_stage.0.used"].dtype == torch.int32


@pytest.mark.parametrize("bad", [[], [[1]], [16], [-1], [0.5]])
def test_a_checkpoint_s_bad_remap_is_an_error_and_changes_no_remap(make, kind, bad):
    for remap in (None, USED):
        module = make(kind, remap=remap)
        state = {**make(kind).state_dict(), "used": torch.tensor(bad)}
        with pytest.raises(RuntimeError, match="used: "):
            module.load_state_dict(state)
        assert (module.used is None) if remap is None else (module.used.tolist() == USED)
        assert module.re_embed == (16 if remap is None else 5)


def test_a_missing_remap_is_an_error_only_when_strict(make, kind):
    module = make(kind, remap=USED)
    state = make(kind).state_dict()
    with pytest.raises(RuntimeError, match="used"):
        module.load_state_dict(state)
    assert module.load_state_dict(state, strict=False).missing_keys == ["used"]
    assert module.used.tolist() == USED


def test_used_changed_in_place_is_seen(make):
    # There is no table to go stale.
    module = make("vq", remap=USED)
    module.used.data.copy_(torch.tensor([1, 2, 3, 4, 5]))
    assert module.remap_to_used(torch.tensor([4])).tolist() == [3]


def test_lookup_tables_are_not_in_the_state_dict(make, kind, latents):
    module = make(kind, remap=USED)
    module.encode(latents(module))
    assert set(module.state_dict()) - set(make(kind).state_dict()) == {"used"}
    assert [name for name, _ in module.named_buffers()] == ["used"]


def test_a_float_conversion_leaves_the_remap_alone(make, kind):
    module = make(kind, remap=USED).half().double()
    assert module.used.dtype == torch.int64
    assert module.remap_to_used(torch.tensor([12, 3])).tolist() == [2, 1]


def test_a_large_remap_needs_no_match_matrix():
    # N x U would be 2^36 elements here.
    used = torch.randperm(1 << 18)
    module = VectorQuantizer(1 << 18, 1, remap=used)
    ids = torch.arange(1 << 18)
    positions = module.remap_to_used(ids)
    assert torch.equal(used[positions], ids)
    assert torch.equal(module.unmap_to_all(positions), ids)


def test_a_saved_remap_loads_with_weights_only(make, kind):
    file = io.BytesIO()
    torch.save(make(kind, remap=USED).state_dict(), file)
    file.seek(0)
    module = make(kind)
    module.load_state_dict(torch.load(file, weights_only=True))
    assert module.used.tolist() == USED
