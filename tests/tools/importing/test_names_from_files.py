"""Names that a stranger chose: printable in every message, in one line, and usable in the commands that it has."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from vqserve.errors import ForeignCheckpointError
from vqserve_tools import cli
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.importer import import_checkpoint

CODES = np.random.default_rng(5).standard_normal((10, 4)).astype(np.float32)
NAMES = [
    "a\x1b[2J",
    "a\nb",
    "a\r\u202eb",
    "a  b",
    "it's",
    "back\\slash\x07",
    "é\x00",
    "-x",
    "{where}{option}{n=}",
    "$HOME`x`",
]


def saved(folder: Path, *names: str) -> Path:
    path = folder / "m.pt"
    torch.save({name: torch.from_numpy(CODES) for name in names}, path)
    return path


def message(source: Path, **options) -> str:
    with pytest.raises(ForeignCheckpointError) as caught:
        import_checkpoint(source, Options(**options))
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_messages_are_printable(tmp_path, name):
    quantizer = f"{name}.quantize.embedding.weight"
    source = saved(tmp_path, quantizer, f"{name}.quantize.extra", f"b{name}.quantize.embedding.weight", f"{name}0")
    errors = [
        message(source),
        message(source, prefix=f"{name}.quantize"),
        message(source, prefix=f"{name}.quantize", metric="l2"),
        message(source, keys=(quantizer,)),
        message(source, keys=("none",)),
        message(source, kind="fsq", levels=(8, 5)),
    ]
    assert all(error.isprintable() for error in errors)
    # Placeholders of messages are not filled.
    assert "{where}" not in name or name in errors[0]
    error = copy.copy(ForeignCheckpointError(f"{name} {{where}}"))
    assert str(error) == str(ForeignCheckpointError(f"{name} {{where}}"))


@pytest.mark.parametrize("name", [name for name in NAMES if "\0" not in name])
def test_the_commands_in_messages_have_the_names(tmp_path, name):
    source = saved(tmp_path, f"{name}.codes_of_it", f"{name}.more")
    _, found, options = message(source).partition("likely ones first: ")
    assert found
    command = f"printf '%s\\n.\\n' {options.rpartition(' (10x4)')[0]}"
    printed = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, check=True).stdout.decode()
    key = "".join(printed.split("\n.\n")).removeprefix("--key").removeprefix("=")
    assert key == f"{name}.codes_of_it"


def test_messages_have_a_bounded_length(tmp_path):
    source = saved(tmp_path, *(f"{'x' * 3000}.{number}.codebook_{'a' if number % 2 else 'b'}" for number in range(300)))
    assert len(message(source)) < 300_000


def test_an_index_names_files_that_can_be_shown(tmp_path):
    for file in ("a\x1b.safetensors", "x" * 5000, "a\nb", "\ud800"):
        escaped = "".join(f"\\u{ord(character):04x}" for character in file)
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{escaped}"}}}}')
        error = message(tmp_path)
        assert "is not in the folder of the index" in error
        assert error.isprintable()
        assert len(error) < 1000


def test_the_table_of_a_dry_run_is_printable(tmp_path, capsys):
    source = saved(tmp_path, *(f"{name}.w" for name in NAMES))
    assert cli.main(["import", str(source), "--dry-run"]) == 1
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in [*out.splitlines(), *err.splitlines()])
    assert len(out.split("\n")) == len(NAMES) + 2
