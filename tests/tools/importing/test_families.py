"""A small checkpoint of every foreign family, imported by the command line and held against the family's formula.

The formulas are written once more in `support.foreign`, in float64 and by brute force, from the models' papers and
code; the numbers that the libraries themselves give are another test's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support.foreign import CASES, RNG, Case, N, audio, lucidrains, normal, write
from support.foreign import case as cases
from support.foreign.case import C, D, K
from vqserve_client import Client
from vqserve_server.codebooks import load_codebook
from vqserve_server.tokenizer import Tokenizer
from vqserve_tools import cli

# Of DAC, Mimi and SimVQ, as imported when this test was written.
DIGESTS = [
    "4b20bc8970fe84c283f35947b9b302027e04df17fbc523be610bef0ce220c7e3",
    "c1f6b4e6f4c94f480ff6fbef50763df3588db115a8e1b4d48bdf113bb9dbca60",
    "2661d5f57e5fc3fa9cab8c3d5c42a9a6de2732b659c09f4194dc81fec5145e09",
]


def run(capsys, *args: object) -> tuple[int, str, str]:
    status = cli.main([str(arg) for arg in args])
    return status, *capsys.readouterr()


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest) -> Case:
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
    return CASES[request.param]()


@pytest.fixture
def imported(made: Case, tmp_path: Path, capsys) -> tuple[Path, str]:
    """The codebook file, and what its import printed."""
    source, out = write(tmp_path, made), tmp_path / "out.safetensors"
    status, text, err = run(capsys, "import", *([source] if source else []), "-o", out, *made.flags)
    assert (status, err) == (0, "")
    return out, text


def test_what_the_import_says(made, imported):
    out, text = imported
    lines = text.splitlines()
    assert lines[0].startswith("found  ")
    assert made.found in lines[0]
    taken = [line.split("  ")[1] for line in lines if line.startswith("took  ")]
    left = [line.removeprefix("left  ") for line in lines if line.startswith("left  ")]
    if len(made.arrays) > 1:
        assert sorted([*taken, *left]) == sorted(made.arrays)
        assert set(made.left) <= set(left)
    assert lines[-1].startswith(f"wrote {out}: {made.kind}, ")
    codebook = load_codebook(out)
    assert lines[-1].endswith(codebook.digest)
    assert codebook.provenance["tensors"] == taken or made.suffix == ".npy"


def test_indices_and_latents_are_the_formula_s(made, imported):
    z = normal(N, made.channels)
    indices, decoded = made.oracle(z.astype(np.float64))
    with Tokenizer.load(imported[0], device="cpu") as tokenizer:
        assert tokenizer.info.kind == made.kind
        assert tokenizer.info.output_dim == decoded.shape[1]
        ours = tokenizer.encode(z)
        assert np.array_equal(ours, indices)
        assert np.abs(tokenizer.decode(ours) - decoded).max() <= 1e-6 * max(1.0, np.abs(decoded).max())


def test_what_the_keys_do_not_tell_is_asked_for(made, tmp_path, capsys):
    if made.asks is None:
        return
    flag, question = made.asks
    at = made.flags.index(flag)
    flags = made.flags[:at] + made.flags[at + 2 :]
    out = tmp_path / "out.safetensors"
    status, text, err = run(capsys, "import", write(tmp_path, made), "-o", out, *flags)
    assert (status, text) == (1, "")
    assert question in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_an_imported_file_is_inspected_and_keeps_its_digest(made, imported, tmp_path, capsys):
    out, text = imported
    status, report, _ = run(capsys, "inspect", out, "--json")
    assert status == 0
    report = json.loads(report)
    assert report["kind"] == made.kind
    assert report["digest"] in text
    again, sources = tmp_path / "again.safetensors", list(tmp_path.glob("model*"))
    assert run(capsys, "import", *sources, "-o", again, *made.flags)[0] == 0
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    "pairs",
    [
        {"quantizer.vq.layers.0._codebook.embed": "quantizer.layers.0.codebook.embed"},
        {
            f"quantizer.rvq_{old}.{inner}": f"quantizer.{new}_residual_vector_quantizer.{outer}"
            for old, new in (("first", "semantic"), ("rest", "acoustic"))
            for inner, outer in (
                ("vq.layers.0._codebook.embedding_sum", "layers.0.codebook.embed_sum"),
                ("vq.layers.0._codebook.cluster_usage", "layers.0.codebook.cluster_usage"),
                ("input_proj.weight", "input_proj.weight"),
                ("output_proj.weight", "output_proj.weight"),
            )
        },
    ],
    ids=["encodec", "mimi"],
)
def test_one_model_in_two_namings_has_one_digest(tmp_path, capsys, pairs):
    arrays = {}
    for name in pairs:
        shape = (D, C, 1) if "input_proj" in name else (C, D, 1) if "output_proj" in name else (K, D)
        arrays[name] = torch.from_numpy(np.abs(normal(*((K,) if "usage" in name else shape))) + 0.1)
    digests = set()
    for number, state in enumerate((arrays, {pairs[name]: array for name, array in arrays.items()})):
        source, out = tmp_path / f"{number}.safetensors", tmp_path / f"{number}.out.safetensors"
        save_file(state, source)
        assert run(capsys, "import", source, "-o", out)[0] == 0
        digests.add(load_codebook(out).digest)
    assert len(digests) == 1


def counted(*shape: int) -> np.ndarray:
    """Return numbers that everybody can write down, whatever becomes of numpy's generators."""
    return (((np.arange(np.prod(shape)) * 7919 + 13) % 997 - 498) / 64).astype(np.float32).reshape(shape)


def test_a_digest_stays_what_it_is(tmp_path, capsys, monkeypatch):
    # Of what is computed on the way in: weight norm and the quotient of averages must not change by a bit.
    for module in (cases, audio, lucidrains):
        monkeypatch.setattr(module, "normal", counted)
    digests = []
    for make in (audio.dac, audio.mimi, lucidrains.simvq):
        folder = tmp_path / make.__name__
        folder.mkdir()
        source, out = write(folder, make()), folder / "out.safetensors"
        assert run(capsys, "import", source, "-o", out)[0] == 0
        digests.append(load_codebook(out).digest)
    assert digests == DIGESTS


def test_imported_files_are_served(tmp_path, capsys, serving):
    tokenizers: list[Any] = []
    for number, (name, make) in enumerate(CASES.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        source, out = write(folder, made := make()), tmp_path / f"{name}.safetensors"
        assert run(capsys, "import", *([source] if source else []), "-o", out, *made.flags)[0] == 0
        tokenizers.append(Tokenizer.load(out, device="cpu"))
    with Client(serving(*tokenizers).target) as client:
        for tokenizer in tokenizers:
            z = normal(8, tokenizer.info.input_dim)
            indices = client.encode(z, codebook=tokenizer.name, digest=tokenizer.digest)
            assert np.array_equal(indices, tokenizer.encode(z))
            latents = client.decode(indices, codebook=tokenizer.name)
            assert np.array_equal(latents, tokenizer.decode(indices))
