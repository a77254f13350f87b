"""Pickles made by an enemy: each instruction that could run something, and descriptions that could take for ever."""

from __future__ import annotations

import copyreg
import pickle
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from support.hostile import LIMIT, members_of, read_watched, text, torch_archive, watching, write_members
from vqserve.errors import ForeignCheckpointError
from vqserve_tools.importing.files import open_foreign

STATE = {"embedding.weight": torch.arange(6.0).reshape(3, 2)}
COMMAND = text("exit 1")
# An extension code that Python's unpickler would look up in a table of this process.
EXTENSION = 241

# Each leaves one value on the stack.
RUNS = {
    "reduce": b"cos\nsystem\n" + COMMAND + b"\x85R",
    "reduce of eval": b"cbuiltins\neval\n" + text("trap.run()") + b"\x85R",
    "reduce, Python 2": b"c__builtin__\neval\n" + text("trap.run()") + b"\x85R",
    "reduce of a name on the stack": text("trap") + text("run") + b"\x93)R",
    "reduce of a dotted name": text("trap") + text("run.again.and_again") + b"\x93)R",
    "reduce of what a reduce gave": b"cbuiltins\ngetattr\nctrap\nmodule\n" + text("run") + b"\x86R)R",
    "reduce of a string": COMMAND + b")R",
    "reduce with a list": b"cos\nsystem\n]R",
    "a name alone": b"ctrap\nname\n",
    "new": b"ctrap\nClass\n)\x81",
    "new with keywords": b"ctrap\nClass\n)}\x92",
    "a call of what is above a mark": b"(ctrap\nClass\n" + COMMAND + b"o",
    "a call by name": b"(" + COMMAND + b"itrap\nClass\n",
    "state": b"ctrap\nClass\n)\x81}" + text("__class__") + b"ctrap\nOther\nsb",
    "state in slots": b"ctrap\nClass\n)\x81N}" + text("__dict__") + b"Ns\x86b",
    "state of a dictionary": b"}}" + text("__class__") + b"ctrap\nOther\nsb",
    "entries of an object": b"ctrap\nClass\n)\x81" + text("a") + b"Ns",
    "elements of an object": b"ctrap\nClass\n)\x81Na",
    "extension of 1 byte": b"\x82" + bytes([EXTENSION]) + b")R",
    "extension of 2 bytes": b"\x83" + bytes([EXTENSION, 0]) + b")R",
    "extension of 4 bytes": b"\x84" + bytes([EXTENSION, 0, 0, 0]) + b")R",
    "reference by a line": b"Pctrap\n",
    "reference of no kind": b"NQ",
    "reference by an object": b"ctrap\nClass\n)\x81Q",
    "reference to a class": b"(" + text("module") + b"ctrap\nClass\nNNtQ",
    "reference of too few parts": text("storage") + b"\x85Q",
    "reference that is a list": b"]" + text("storage") + b"aQ",
    "a key that is an object": b"}ctrap\nKey\n)\x81Ns",
    "a key that is a list": b"}]Ns",
    "a member that is an object": b"\x8f(ctrap\nKey\n)\x81\x90",
    "a rebuild of something else": b"ctorch._utils\n_rebuild_device_tensor_from_cpu\nctrap\nClass\n\x85R",
    "bytes of a tensor": b"ctorch.storage\n_load_from_bytes\n" + b"C\x04evil" + b"\x85R",
    "an array of objects": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    b"(K\x01K\x01\x85cnumpy\ndtype\n" + text("O8") + b"\x85R\x89]tb",
}


def with_more(path: Path, more: bytes) -> Path:
    """Write a harmless file whose pickle has more instructions, which leave a value, and drop it."""
    torch.save(STATE, path)
    members = members_of(path)
    [name] = [name for name in members if name.endswith("data.pkl")]
    members[name] = members[name][:-1] + more + b"0."
    return write_members(path, members)


@pytest.fixture(autouse=True)
def extension():
    copyreg.add_extension("trap", "run", EXTENSION)
    yield
    copyreg.remove_extension("trap", "run", EXTENSION)


@pytest.mark.parametrize("more", RUNS.values(), ids=RUNS)
def test_nothing_is_run(tmp_path, more):
    values, seen = read_watched(with_more(tmp_path / "m.pt", more))
    assert values == {"embedding.weight": STATE["embedding.weight"].tolist()}
    assert seen == []


@pytest.mark.parametrize("more", RUNS.values(), ids=RUNS)
def test_nothing_is_run_where_tensors_are_looked_for(tmp_path, more):
    # In the dictionary instead of beside it.
    torch.save(STATE, tmp_path / "m.pt")
    members = members_of(tmp_path / "m.pt")
    [name] = [name for name in members if name.endswith("data.pkl")]
    members[name] = members[name][:-1] + text("callbacks") + more + b"s."
    values, seen = read_watched(write_members(tmp_path / "m.pt", members))
    assert values == {"embedding.weight": STATE["embedding.weight"].tolist()}
    assert seen == []


def test_the_witness_sees_what_python_would_run(tmp_path):
    for more in (RUNS["a name alone"], RUNS["new"], RUNS["extension of 1 byte"]):
        with watching(tmp_path) as seen, suppress(pickle.UnpicklingError):
            pickle.loads(b"\x80\x02" + more + b".")  # noqa: S301
        assert any(event.startswith("trap.") for event in seen)
        copyreg.clear_extension_cache()


# Descriptions that take for ever, or all memory, if they are taken at their word.

REPEATED = 100_000
LONG = 4_000_000
DEEP_TUPLE = b")" + b"\x85" * REPEATED
WIDE_TUPLE = b")" + b"2\x86" * 60
PAIRS = b"](" + (text("a") + b"N\x86") * 1000 + b"eq\x000"
PARTS = b"".join(text(name) + b"h\x00" for name in ("_parameters", "_buffers", "_modules"))
COSTS = {
    "tuples 2^60 wide as a key": b"}" + WIDE_TUPLE + b"Ns",
    "tuples 2^60 wide as a member": b"\x8f(" + WIDE_TUPLE + b"\x90",
    "tuples 32 deep as a key, twice": b"}" + (b")" + b"2\x86" * 32 + b"Ns") * 2,
    "tuples nested deeply": DEEP_TUPLE,
    "tuples nested deeply as a key": b"}" + DEEP_TUPLE + b"Ns",
    "lists nested deeply": b"]" + b"]" * REPEATED + b"a" * REPEATED,
    "objects nested deeply": b"ctrap\nA\n)\x81" * REPEATED + b"b" * (REPEATED - 1),
    "objects as attributes, nested deeply": b"ctrap\nA\n)\x81" + (b"}" + text("a") + b"ctrap\nA\n)\x81") * 10_000
    + b"sb" * 10_000,
    "calls of calls": b"N" + b")R" * REPEATED,
    "parameters around parameters": b"N\x85" + b"q\x000ctorch._utils\n_rebuild_parameter\nh\x00R\x85" * 10_000,
    "marks": b"(" * REPEATED + b"1" * (REPEATED - 1) + b"t",
    "a long string as a key, often": b"}" + text("a" * LONG) + b"q\x00" + text("a" * LONG) + b"q\x0100"
    + b"h\x00Nsh\x01Ns" * REPEATED,
    "keys whose hashes collide": b"}("
    + b"".join(b"\x8a\x0a" + (number * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for number in range(REPEATED))
    + b"u",
    "pairs of a dictionary that is made often": PAIRS + b"](" + b"ccollections\nOrderedDict\nh\x00\x85R" * 4000 + b"e",
    "modules that share a table": b"}(" + b"".join(text(f"{i}") + b"N" for i in range(1000)) + b"uq\x000("
    + (b"ctrap\nModule\n)\x81}(" + PARTS + b"ub") * 3000 + b"t",
    "names that are long, often": text("a" * LONG) + b"q\x000(" + b"h\x00h\x00\x93)R" * REPEATED + b"t",
    "an encoding of a long text, often": text("a" * LONG) + b"q\x000" + text("latin1") + b"q\x010("
    + b"c_codecs\nencode\nh\x00h\x01\x86R" * 10_000 + b"t",
    "sets of a long list, often": b"](" + b"N" * REPEATED + b"eq\x000("
    + b"cbuiltins\nset\nh\x00\x85R" * REPEATED + b"t",
    "shapes of very many axes, often": b"(" + b"K\x00" * REPEATED + b"tq\x000(" + b"ctorch\nSize\nh\x00\x85R" * REPEATED
    + b"t",
}  # fmt: skip


@pytest.mark.parametrize("more", COSTS.values(), ids=COSTS)
def test_what_costs_nothing(imported, tmp_path, more):
    status, err, grown = imported(with_more(tmp_path / "m.pt", more))
    assert status == 0, err
    assert grown < 3 * LIMIT


@pytest.mark.parametrize("more", COSTS.values(), ids=COSTS)
def test_what_costs_nothing_beside_a_tensor(imported, tmp_path, more):
    torch.save(STATE, tmp_path / "m.pt")
    members = members_of(tmp_path / "m.pt")
    [name] = [name for name in members if name.endswith("data.pkl")]
    # The tensor lies beside the hostile value, in a list that is not at the root.
    members[name] = members[name][:-1] + more + b"\x86."
    imported(write_members(tmp_path / "m.pt", members), "--key", "0.embedding.weight")


DAMAGED = {
    "a name in the memo that is not there": b"h\xf0",
    "a number in the memo beyond the limit": b"Nr\xff\xff\xff\xff",
    "a number in the memo far away": b"Nr\xff\xff\x01\x00",
    "a number in the memo below zero": b"Np-1\n",
    "a value in the memo below zero": b"g-1\n",
    "a frame that lies": b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
    "a string that lies": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc",
    "bytes that lie": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc",
    "a bytearray that lies": b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc",
    "an integer that lies": b"\x8b\xff\xff\xff\x7fabc",
    "a line without an end": b"cos",
    "a buffer that is nowhere": b"\x97",
    "a protocol of the future": b"\x80\x06",
    "an unknown instruction": b"\xff",
    "nothing below": b"0" * 10,
    "no mark below": b"t" * 10,
    "a value of a mark": b"(s",
    "an entry of a number": b"K\x00NNs",
    "half an entry": b"}(Nu",
    "an element of a number": b"K\x00Na",
    "a member of a list": b"](N\x90",
    "a call of nothing": b"(o",
    "a name that is a number": b"K\x00K\x00\x93",
    "text that is no text": b"X\x01\x00\x00\x00\xff",
    "text in no quotes": b"Sabc\n",
    "a number that is none": b"Iabc\n",
    "a long number": b"\x8b" + struct.pack("<i", 257) + bytes(257),
    "a long number in decimal": b"I" + b"9" * 100_000 + b"\n",
    "a long fraction": b"F0." + b"9" * 100_000 + b"\n",
}


@pytest.mark.parametrize("more", DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged(refused, tmp_path, more):
    refused(with_more(tmp_path / "m.pt", more), "m.pt: it ")


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("instruction", [b"}\x94", b"(", b"]", b")R", b"\x8f"])
def test_the_most_instructions_that_are_read(imported, tmp_path, instruction):
    description = b"N" + instruction * ((1 << 21) // len(instruction) + 1)
    status, err, grown = imported(torch_archive(tmp_path / "m.pt", description))
    assert status == 1
    assert "more than 2097152 instructions" in err
    assert grown < 8 * LIMIT


def test_names_in_messages_have_no_control_characters(refused, tmp_path):
    name = text("os\x1b[31m\n")
    refused(torch_archive(tmp_path / "m.pt", name + name + b"\x93)R."), r"an object of os\x1b[31m\n.os\x1b[31m\n,")


def test_errors_of_our_own(tmp_path):
    # Whatever is wrong with a file, the interpreter says so itself.
    for more in DAMAGED.values():
        with pytest.raises(ForeignCheckpointError) as error, open_foreign(with_more(tmp_path / "m.pt", more)):
            pass
        assert "cannot be read:" not in str(error.value)
