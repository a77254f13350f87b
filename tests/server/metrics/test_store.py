"""Numbers in shared memory: a reader finds what was written, however the writer has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqserve_server.metrics.memory import SharedMemory, inherited_part, private_part
from vqserve_server.metrics.store import Reader, Store

NBYTES = 1 << 16


def read(memory: memoryview) -> dict[tuple[str, ...], list[float]]:
    reader = Reader(memory)
    return {(each.name, *(value for _, value in each.labels)): reader.values(each) for each in reader.series()}


def test_a_reader_finds_what_was_added_before_and_after_it() -> None:
    memory = private_part(NBYTES)
    reader = Reader(memory)
    assert reader.series() == []
    store = Store(memory)
    first = store.cell("rows", operation="encode", codebook="a")
    store.cells[first] = 3
    assert [each.name for each in reader.series()] == ["rows"]
    second = store.cell("seconds", 5, codebook='ä/@2 "x"\\')
    store.cells[second + 4] += 0.25
    store.cells[first] += 1
    [rows, seconds] = reader.series()
    assert rows.labels == (("codebook", "a"), ("operation", "encode"))
    assert reader.values(rows) == [4]
    assert seconds.labels == (("codebook", 'ä/@2 "x"\\'),)
    assert reader.values(seconds) == [0, 0, 0, 0, 0.25]


def test_equal_names_and_labels_have_the_same_cells() -> None:
    store = Store(private_part(NBYTES))
    assert store.cell("a", x="1", y="2") == store.cell("a", y="2", x="1")
    assert len({store.cell("a", x="1"), store.cell("a", x="2"), store.cell("b", x="1"), store.cell("a")}) == 4


def test_a_later_writer_goes_on_counting() -> None:
    memory = private_part(NBYTES)
    for count in range(1, 4):
        store = Store(memory)
        store.cells[store.cell("a", x="1")] += 1
        store.cell("new", x=str(count))
        assert read(memory)["a", "1"] == [count]
    assert len(read(memory)) == 4


def test_what_finds_no_room_is_not_counted_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    memory = private_part(NBYTES)
    store = Store(memory)
    for number in range(3000):
        store.cells[store.cell("a", 3, x=str(number)) + 2] += 1
    found = read(memory)
    assert 500 < len(found) < 3000
    assert all(values == [0, 0, 1] for values in found.values())
    assert caplog.text.count("metrics_lost") == 1
    # What has room stays.
    store.cells[store.cell("a", 3, x="0")] += 1
    assert read(memory)["a", "0"] == [1, 0, 1]


def test_memory_of_another_layout_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    memory = private_part(NBYTES)
    memory.cast("Q")[0] = 1
    store = Store(memory)
    store.cells[store.cell("a")] += 1
    assert read(memory) == {}
    assert "metrics_lost" in caplog.text


WRITER = """
import os, sys
from vqserve_server.metrics.memory import inherited_part
from vqserve_server.metrics.store import Store
store = Store(inherited_part("test", os.environ))
cell = store.cell("a", worker=sys.argv[1])
while True:
    store.cells[cell] += 1
    store.cell("more", x=str(int(store.cells[cell]) % 1000))
    os.write(1, b".")
"""


def test_what_a_killed_process_has_counted_stays() -> None:
    memory = SharedMemory("test", 1 << 20, parts=2)
    written = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, "1"],
            env={**os.environ, **memory.environment(1)},
            pass_fds=(memory.descriptor,),
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        written += len(process.stdout.read(500))
        process.kill()
        written += len(process.stdout.read())
        process.wait()
        process.stdout.close()
        # It may have been killed between counting and writing.
        [count] = read(memory.part(1))["a", "1"]
        assert written <= count <= written + 3
        written = int(count)
    assert read(memory.part(0)) == {}


def test_a_process_without_a_parent_inherits_nothing() -> None:
    assert inherited_part("test", {}) is None
    memory = SharedMemory("test", 100)
    assert len(memory.part(0)) % os.sysconf("SC_PAGE_SIZE") == 0
    assert not os.get_inheritable(memory.descriptor)
    assert Path(f"/proc/self/fd/{memory.descriptor}").readlink().name.startswith("memfd:vqserve-test")
