"""Checkpoints of several files: an index, parts, and the folder of a hub are one checkpoint, or are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from vqserve.errors import ForeignCheckpointError
from vqserve_server.codebooks import load_codebook
from vqserve_tools import cli
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.importer import Import, import_checkpoint

Arrays = Mapping[str, npt.NDArray[np.float32]]

STAGES = [np.random.default_rng(stage).standard_normal((10, 4)).astype(np.float32) for stage in range(8)]
NAMES = [f"quantizer.layers.{stage}.codebook.embed" for stage in range(8)]
WHOLE = dict(zip(NAMES, STAGES, strict=True))
FIRST, LAST = dict(list(WHOLE.items())[:5]), dict(list(WHOLE.items())[5:])
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def write(path: Path, arrays: Arrays) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def write_index(path: Path, files: Mapping[str, Sequence[str]]) -> Path:
    places = {name: file for file, names in files.items() for name in names}
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return path


def split(folder: Path, *, index: bool = True) -> Path:
    """Write a residual quantizer of 8 stages in two parts, the first of which ends after 5."""
    for file, arrays in zip(PARTS, (FIRST, LAST), strict=True):
        write(folder / file, {**arrays, f"encoder.{file[6:11]}": STAGES[0]})
    if index:
        write_index(folder / INDEX, {PARTS[0]: [*FIRST, "encoder.00001"], PARTS[1]: [*LAST, "encoder.00002"]})
    return folder


def check(result: Import) -> None:
    stages = [stage.embedding.weight.detach().numpy() for stage in result.quantizer.parts[0].stages]
    assert len(stages) == 8
    assert all(np.array_equal(stage, expected) for stage, expected in zip(stages, STAGES, strict=True))


def refused(source: Path, match: str, **options: object) -> None:
    with pytest.raises(ForeignCheckpointError) as caught:
        import_checkpoint(source, Options(**options))  # type: ignore[arg-type]
    assert match in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(source.parent) not in str(caught.value)


# What is read as one checkpoint.


@pytest.mark.parametrize("index", [True, False])
def test_a_folder_with_parts(tmp_path, index):
    check(import_checkpoint(split(tmp_path / "model", index=index)))


def test_an_index(tmp_path):
    check(import_checkpoint(split(tmp_path) / INDEX))


def test_an_index_of_torch_files(tmp_path):
    files = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    for file, arrays in zip(files, (FIRST, LAST), strict=True):
        write(tmp_path / file, arrays)
    index = write_index(tmp_path / "pytorch_model.bin.index.json", dict(zip(files, (FIRST, LAST), strict=True)))
    check(import_checkpoint(index))
    check(import_checkpoint(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_a_folder_with_one_file(tmp_path, name):
    write(tmp_path / "snapshot" / name, WHOLE)
    # What training writes beside it is no model.
    write(tmp_path / "snapshot" / "optimizer.pt", {"exp_avg": STAGES[0]})
    write(tmp_path / "snapshot" / "training_args.bin", {"x": STAGES[0]})
    (tmp_path / "snapshot" / "config.json").write_text("{}")
    result = import_checkpoint(tmp_path / "snapshot")
    check(result)
    assert result.provenance["source"] == f"snapshot/{name}"


def test_a_folder_with_one_model_in_two_formats(tmp_path):
    write(tmp_path / "model.safetensors", WHOLE)
    write(tmp_path / "pytorch_model.bin", {name: array + 1 for name, array in WHOLE.items()})
    check(import_checkpoint(tmp_path))


def test_the_index_of_a_format_that_was_not_downloaded(tmp_path):
    write_index(tmp_path / "pytorch_model.bin.index.json", {"pytorch_model-00001-of-00001.bin": NAMES})
    write(tmp_path / "weights.safetensors", WHOLE)
    check(import_checkpoint(tmp_path))


def test_the_cache_of_a_hub(tmp_path, monkeypatch):
    # Its files are links to blobs in another folder, and have a digest as name.
    split(tmp_path / "real")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234abcd", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate((*PARTS, INDEX)):
        (tmp_path / "real" / file).rename(blobs / str(number))
        (snapshot / file).symlink_to(f"../../blobs/{number}")
    check(import_checkpoint(snapshot))
    refused(
        tmp_path / "models--a--b", "models--a--b: it has no weights itself: name a folder in it, snapshots/1234abcd"
    )
    monkeypatch.chdir(snapshot)
    result = import_checkpoint(Path())
    check(result)
    assert result.provenance["source"] == f"1234abcd/{INDEX}"


def test_a_part_of_one(tmp_path):
    check(import_checkpoint(write(tmp_path / "model-00001-of-00001.safetensors", WHOLE)))


def test_parts_that_are_counted_from_zero(tmp_path):
    write(tmp_path / "weights_0_of_2.pt", FIRST)
    write(tmp_path / "weights_1_of_2.pt", LAST)
    check(import_checkpoint(tmp_path))


def test_the_files_and_their_digests_are_recorded(tmp_path):
    folder = split(tmp_path / "model")
    provenance = import_checkpoint(folder).provenance
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted((*PARTS, INDEX))}
    assert provenance["source"] == f"model/{INDEX}"
    assert provenance["source_files"] == digests
    # As `sha256sum *` prints it.
    text = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    assert provenance["source_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    one = write(tmp_path / "one.safetensors", WHOLE)
    expected = {"source": "one.safetensors", "source_sha256": hashlib.sha256(one.read_bytes()).hexdigest()}
    assert {key: value for key, value in import_checkpoint(one).provenance.items() if "source" in key} == expected


def test_the_command_imports_a_folder_and_never_replaces_a_part(tmp_path, capsys):
    folder, out = split(tmp_path / "model"), tmp_path / "out.safetensors"
    assert cli.main(["import", str(folder), "-o", str(out)]) == 0
    assert load_codebook(out).quantizer.num_quantizers == 8
    part = folder / PARTS[0]
    assert cli.main(["import", str(folder), "-o", str(part), "--force"]) == 1
    assert f"{part} is what is read" in capsys.readouterr().err


# A part alone.


@pytest.mark.parametrize("file", PARTS)
def test_a_part_beside_the_others_is_not_imported_alone(tmp_path, file):
    folder = split(tmp_path)
    refused(folder / file, f"of 2 of a checkpoint: import all parts, by their index {INDEX} or by their folder")
    (folder / INDEX).unlink()
    refused(folder / file, "of 2 of a checkpoint: import all parts, by their folder")


@pytest.mark.parametrize(
    "name", [PARTS[0], "pytorch_model-00001-of-00002.bin", "model_1_of_2.pt", "model.part-1-of-2.safetensors"]
)
def test_a_part_without_the_others_is_not_imported(tmp_path, name):
    source = write(tmp_path / name, FIRST)
    refused(source, f"{name}: it is part 1 of 2 of a checkpoint, and the other parts may have more of the quantizer")
    # Stages that are named one by one are no better: the names come from this part.
    refused(source, "it is part 1 of 2 of a checkpoint", keys=tuple(NAMES[:5]), metric="l2")
    write(source, {"tokenizer.codebook": STAGES[0], "encoder.bias": STAGES[0][0]})
    result = import_checkpoint(source, Options(keys=("tokenizer.codebook",), metric="l2"))
    assert np.array_equal(result.quantizer.embedding.weight.detach().numpy(), STAGES[0])


# What is refused.


def test_a_part_is_missing(tmp_path):
    folder = split(tmp_path / "model")
    (folder / PARTS[1]).unlink()
    refused(folder / INDEX, f"{INDEX}: of its 2 files {PARTS[1]} is missing")
    refused(folder, f"model/{INDEX}: of its 2 files {PARTS[1]} is missing")
    (folder / INDEX).unlink()
    refused(folder, "model/model-*-of-00002.safetensors: part 2 of 2 is missing")


def test_an_array_of_the_index_is_missing(tmp_path):
    folder = split(tmp_path)
    write(folder / PARTS[1], dict(list(LAST.items())[:2]))
    refused(folder / INDEX, f"the index has 'quantizer.layers.7.codebook.embed' in {PARTS[1]}, which it has not")


def test_an_array_is_in_another_part_than_the_index_has(tmp_path):
    folder = split(tmp_path)
    write_index(folder / INDEX, {PARTS[0]: NAMES[:6], PARTS[1]: NAMES[6:]})
    refused(folder / INDEX, f"the index has 'quantizer.layers.5.codebook.embed' in {PARTS[0]}, which is in {PARTS[1]}")


def test_an_array_is_in_two_parts(tmp_path):
    folder = split(tmp_path)
    write(folder / PARTS[1], {**LAST, NAMES[0]: STAGES[1]})
    refused(folder, f"{PARTS[0]} and {PARTS[1]} both have 'quantizer.layers.0.codebook.embed'")
    (folder / INDEX).unlink()
    refused(folder, f"{PARTS[0]} and {PARTS[1]} both have 'quantizer.layers.0.codebook.embed'")


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "a/../../model.safetensors", "/etc/passwd", "..\\m.safetensors", "C:\\m", "a\0b", ".."],
)
def test_a_file_outside_the_folder(tmp_path, file):
    write(tmp_path / "model.safetensors", WHOLE)
    (tmp_path / "inner").mkdir()
    index = write_index(tmp_path / "inner" / INDEX, {file: NAMES})
    refused(index, "is not in the folder of the index")


def test_a_part_that_is_no_regular_file(tmp_path):
    folder = split(tmp_path)
    (folder / PARTS[1]).unlink()
    (folder / PARTS[1]).symlink_to("/dev/zero")
    refused(folder / INDEX, f"{PARTS[1]} is missing")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "it is no JSON object"),
        ("{}", "it has no weight_map"),
        ('{"weight_map": {}}', "it has no weight_map"),
        ('{"weight_map": {"a": 3}}', "it has no weight_map"),
        ('{"weight_map": {"a": "x.bin", "a": "y.bin"}}', "a name occurs twice"),
        ("[" * 100_000, "it is not JSON"),
        ('{"a":' * 100_000, "it is not JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "it is not JSON"),
        ('{"weight_map": {"a": ' + "9" * 5000 + "}}", "it is not JSON"),
        ("\xff", "it has no weight_map"),
    ],
)
def test_an_index_that_is_none(tmp_path, text, match):
    index = tmp_path / INDEX
    index.write_text(text if text != "\xff" else '\ufeff{"weight_map": []}')
    refused(index, match)


def test_an_index_that_is_too_large(tmp_path):
    index = tmp_path / INDEX
    with index.open("wb") as file:
        file.truncate(17 << 20)
    refused(index, "it has more than 16777216 bytes")
    write_index(index, {f"{number}.bin": [str(number)] for number in range(600)})
    refused(index, "it has 600 files, more than 512")


def test_weights_of_several_models(tmp_path):
    write(tmp_path / "m" / "model.safetensors", WHOLE)
    write(tmp_path / "m" / "speech_tokenizer.pt", WHOLE)
    refused(tmp_path / "m", "m: it has weights of several models: name one of model.safetensors, speech_tokenizer.pt")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], "m: it has no weights (.bin, "),
        (["README.md", "config.json"], "m: it has no weights (.bin, "),
        (["vae/model.safetensors", "text/config.json"], "m: it has no weights itself: name a folder in it, vae"),
        (["a.ckpt.index", "a.ckpt.data-00000-of-00001"], "m: it is a TensorFlow checkpoint"),
        (["saved_model.pb"], "m: it is a TensorFlow checkpoint"),
        (["flax_model.msgpack"], "m: it is a checkpoint of JAX"),
        ([".metadata", "__0_0.distcp"], "m: it is a folder of torch.distributed.checkpoint"),
        (["zero_to_fp32.py", "latest"], "m: it is a DeepSpeed checkpoint: run its zero_to_fp32.py"),
        (["model.safetensors.incomplete"], "m: a download into it is not complete"),
    ],
)
def test_a_folder_without_weights(tmp_path, files, match):
    (tmp_path / "m").mkdir()
    for name in files:
        path = tmp_path / "m" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    refused(tmp_path / "m", match)


def test_a_link_to_a_file_that_is_not_there(tmp_path):
    # A download that was interrupted, or a cache that was copied without its blobs.
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").symlink_to("../blobs/1234")
    refused(tmp_path / "m", "m: model.safetensors is a link to a file that is not there")
