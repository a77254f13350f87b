"""Torch files, mutated: whatever comes of it, nothing is run, and work and memory are bounded by the file's length.

`--fuzz-pickles N` is the number of files; the number of a file is the seed of its mutations.
"""

from __future__ import annotations

import argparse
import collections
import copyreg
import pickletools
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from support.hostile import LIMIT, members_of, memory, text, watching, write_members
from vqserve.errors import ForeignCheckpointError
from vqserve_data.foreign import torch_containers
from vqserve_data.foreign.pickle_machine import Machine
from vqserve_tools.importing.files import open_foreign

EXTENSION = 242
# Instructions that name, call, refer and build, to be put anywhere.
SNIPPETS = (
    *(b"cos\nsystem\n", b"ctrap\nrun\n", b"cbuiltins\neval\n", text("trap") + text("run") + b"\x93"),
    *(b"ctrap\nrun\n)R", b"ctrap\nrun\n)\x81", b"ctrap\nrun\n)}\x92", b"(ctrap\nrun\no", b"(Nitrap\nrun\n"),
    *(b"\x82\xf2", b"\x83\xf2\x00", b"\x84\xf2\x00\x00\x00", b"Pid\n", b"NQ", b"2Q"),
    *(bytes([code]) for code in b"RboQ\x81\x92(t)]}\x85\x86\x87aesudl012\x8f\x90\x91N\x88\x94\x97\x98."),
    *(b"q\x00", b"h\x00", b"h\x01", b"h\x05", b"r\xff\xff\x00\x00", b"g3\n", b"p3\n"),
    *(b"K\x00", b"J\xff\xff\xff\xff", b"G" + bytes(8), b"F1e999\n", b"L123456789L\n", b"\x8a\x08" + b"\xff" * 8),
    *(text("state_dict"), text("_parameters"), b"C\x04abcd", b"\x80\x04", b"\x95" + bytes(8)),
    *(b"X\xff\xff\xff\xff", b"B\xff\xff\xff\x7f", b"\x96" + b"\xff" * 8, b"2\x86" * 40, b")\x85\x85\x85\x85"),
)
CODES = [code.encode("latin-1") for code in pickletools.code2op]
# A tensor of Python and its place in a dictionary take some hundred bytes, and its description about as many.
BYTES_OF_MEMORY = 200
FIXED_MEMORY = 1 << 20


def pickled() -> dict[str, object]:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    extras = {
        "args": argparse.Namespace(lr=np.float64(0.1)),
        "array": np.arange(4.0),
        "losses": collections.defaultdict(list, {"a": [1.5]}),
        "names": {"a", "é"},
        "numbers": (1 << 80, -1, 2.5, None, True),
        3: (1, (2, (3,))),
    }
    return {
        "plain": {"embedding.weight": torch.arange(6.0).view(3, 2), "used": torch.arange(3), "T": torch.ones(2, 3).T},
        "module": module,
        "trainer": {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()], **extras},
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Small real files: three contents, in both formats and three protocols, and a TorchScript program."""
    folder, files = tmp_path_factory.mktemp("files"), []
    for name, content in pickled().items():
        for protocol, is_zip in ((2, True), (4, True), (5, True), (2, False)):
            files.append(folder / f"{name}-{protocol}-{is_zip}.pt")
            torch.save(content, files[-1], pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    files.append(folder / "program.pt")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(files[-1]))
    return files


def boundaries(data: bytes) -> list[int]:
    """Return the places between the instructions of a pickle."""
    return [position for _, _, position in pickletools.genops(data)]


def mutated_pickle(data: bytes, chance: random.Random) -> bytes:
    places = boundaries(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        start, end = sorted(chance.choices(places, k=2))
        match chance.randrange(10):
            case 0:
                data = data[:start] + chance.choice(SNIPPETS) + data[start:]
            case 1:
                # One to four instructions less.
                index = chance.randrange(len(places))
                data = data[: places[index]] + data[places[min(index + chance.randint(1, 4), len(places) - 1)] :]
            case 2:
                data = (
                    data[:start]
                    + bytes([chance.choice(list(pickletools.code2op)).encode("latin-1")[0]])
                    + data[start + 1 :]
                )
            case 3:
                position = chance.randrange(len(data))
                data = data[:position] + bytes([data[position] ^ 1 << chance.randrange(8)]) + data[position + 1 :]
            case 4:
                data = data[: chance.randrange(len(data))] + chance.choice((b"", b".", b"u.", b"s."))
            case 5:
                data = data[:end] + data[start:end] * chance.choice((1, 1, 2, 30)) + data[end:]
            case 6:
                data = data[:start] + data[end:]
            case _:
                # What a pickle drops again.
                data = data[:start] + chance.choice(SNIPPETS) + b"0" + data[start:]
        data = data or b"."
        places = [place for place in places if place < len(data)] or [0]
    return data


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        changed[chance.randrange(len(changed))] = chance.choice((0, 1, 255, chance.randrange(256)))
    return bytes(changed[: chance.choice((len(changed), len(changed), chance.randrange(1, len(changed))))])


def mutate(source: Path, target: Path, chance: random.Random) -> bool:
    """Write a mutated file; return whether only its pickles differ."""
    data = source.read_bytes()
    if chance.random() < 0.2:
        target.write_bytes(mutated_bytes(data, chance))
        return False
    if "False" in source.name:
        # The older format: its first three pickles are 50 bytes or so, and its numbers are at the end.
        target.write_bytes(mutated_pickle(data, chance))
        return True
    members = members_of(source)
    name = next(name for name in members if name.endswith(("/data.pkl", "/constants.pkl")))
    members[name] = mutated_pickle(members[name], chance)
    write_members(target, members)
    return True


@pytest.fixture
def machines(monkeypatch) -> Iterator[list[Machine]]:
    """The interpreters that a file made, with what they counted."""
    made: list[Machine] = []

    def make(data: bytes) -> Machine:
        made.append(Machine(data))
        return made[-1]

    monkeypatch.setattr(torch_containers, "Machine", make)
    copyreg.add_extension("trap", "run", EXTENSION)
    yield made
    copyreg.remove_extension("trap", "run", EXTENSION)


def read(source: Path) -> dict[str, np.ndarray]:
    values = {}
    with open_foreign(source) as arrays:
        for name, array in arrays.items():
            try:
                values[name] = array.read()
            except ForeignCheckpointError:
                continue
    return values


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(7200)
def test_mutated_files_run_nothing_and_cost_little(files, tmp_path, machines, request, record_property):
    for file in files:
        assert read(file)
    Path("/proc/self/clear_refs").write_text("5")
    before, number_of_files = memory("VmRSS"), request.config.getoption("--fuzz-pickles")
    counts = fuzzed(files, tmp_path / "mutated.pt", machines, range(number_of_files))
    assert memory("VmHWM") - before < 4 * LIMIT
    for name, count in counts.items():
        assert count > 0.002 * number_of_files
        record_property(name, count)


def fuzzed(files: list[Path], target: Path, machines: list[Machine], numbers: range) -> collections.Counter[str]:
    """Mutate and read files; return how many were read and refused, and the instructions that were interpreted."""
    counts: collections.Counter[str] = collections.Counter()
    for number in numbers:
        chance = random.Random(number)
        source = chance.choice(files)
        is_pickle = mutate(source, target, chance)
        machines.clear()
        # Counting memory takes several times as long as reading.
        with peak_memory() if number % 20 == 0 else nullcontext([0]) as peak, watching(target) as seen:
            values, message = read_or_message(target)
        where = f"{source.name}, number {number}: {message}"
        length = target.stat().st_size
        assert seen == [], (seen, where)
        assert sum(machine.instructions for machine in machines) <= 2 * length, where
        assert peak[0] <= FIXED_MEMORY + BYTES_OF_MEMORY * length, where
        # What is wrong with a pickle is found by checks, not by accident.
        assert "it cannot be read:" not in message or not is_pickle, where
        counts["instructions"] += sum(machine.instructions for machine in machines)
        counts["read" if values else "refused"] += 1
        # torch believes more of an archive's directory than this importer, and gives memory that nobody has set.
        if is_pickle and source.name.startswith("plain"):
            counts["read by torch too"] += compared(values, target, where)
    return counts


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yield a list that holds, in the end, how many bytes of memory were in use at most."""
    peak = [0]
    tracemalloc.start()
    try:
        yield peak
        peak[0] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def read_or_message(source: Path) -> tuple[dict[str, np.ndarray], str]:
    try:
        return read(source), ""
    except ForeignCheckpointError as error:
        return {}, str(error)


def compared(values: dict[str, np.ndarray], source: Path, where: str) -> bool:
    """Check that torch, if it reads a file without objects, finds the same numbers in it."""
    try:
        state = torch.load(source, weights_only=True)
    except Exception:
        return False
    if not isinstance(state, dict):
        return False
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and isinstance(name, str) and name in values:
            assert np.array_equal(values[name], tensor.detach().numpy(), equal_nan=True), where
    return True


def test_the_mutations_change_what_python_would_run(files):
    # Python's own unpickler would run some of them: those are counted in the text, not run.
    chance = random.Random(0)
    data = members_of(files[0])["plain-2-True/data.pkl"]
    assert sum(b"trap" in mutated_pickle(data, chance) for _ in range(100)) > 3
