"""The memory of the counts: room for many codebooks, reused, and never misread."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from vqserve_server.usage.health import HealthReader
from vqserve_server.usage.memory import EPOCH, BlockText, UsageMemory, UsageReader, release

WINDOW = 1 << 14


def text(name="book", digest="d", sizes=(16,)):
    return BlockText(name, digest, "vq", sizes)


def new_memory(nbytes=1 << 20):
    return memoryview(bytearray(nbytes))


def add(block, code, rows=1):
    block.add(np.full(rows, code), np.empty(0), rows=rows, window_rows=WINDOW)


def test_a_memory_that_nobody_wrote_to_is_empty():
    assert UsageReader(new_memory()).blocks() == []
    assert HealthReader([new_memory(), new_memory()]).as_json() == []


def test_blocks_are_found_by_others():
    memory = new_memory()
    writer = UsageMemory(memory)
    for number in range(5):
        add(writer.block(text(f"book-{number}", sizes=(16,) * (number + 1))), number)
    blocks = UsageReader(memory).blocks()
    assert [block.text for block in blocks] == [text(f"book-{n}", sizes=(16,) * (n + 1)) for n in range(5)]
    assert [int(block.snapshot().usage.argmax()) for block in blocks] == list(range(5))


def test_the_same_codebook_gets_its_block_again():
    memory = new_memory()
    add(UsageMemory(memory).block(text()), 3, 7)
    assert UsageMemory(memory).block(text()).snapshot().usage[3] == 7
    assert len(UsageReader(memory).blocks()) == 1


def test_another_digest_starts_anew_and_keeps_the_number_of_rows():
    memory = new_memory()
    writer = UsageMemory(memory)
    add(writer.block(text()), 3, 7)
    snapshot = writer.block(text(digest="e")).snapshot()
    assert (snapshot.total_rows, int(snapshot.usage.sum())) == (7, 0)
    assert [block.text.digest for block in UsageReader(memory).blocks()] == ["e"]


def test_room_is_used_again():
    memory = new_memory(1 << 15)
    writer = UsageMemory(memory)
    for number in range(200):
        block = writer.block(text(digest=f"{number:03}", sizes=(256,)))
        assert block.snapshot().usage.sum() == 0
        assert block.snapshot().reference is None
        add(block, 7, 5)
        block.set_reference(3, np.ones(257, np.int64), 0.5)
    assert block.snapshot().total_rows == 1000


def test_a_full_memory_leaves_the_others_alone(caplog):
    memory = new_memory(1 << 15)
    writer = UsageMemory(memory)
    made = [writer.block(text(f"book-{number}", sizes=(256,))) for number in range(20)]
    assert made[0] is not None
    assert made[-1] is None
    assert "usage_lost name=book-19" in caplog.text
    add(made[0], 1)
    assert made[0].snapshot().usage[1] == 1
    writer.keep({"book-0"})
    assert writer.block(text("book-19", sizes=(256,))) is not None
    assert {block.text.name for block in UsageReader(memory).blocks()} == {"book-0", "book-19"}


def test_a_memory_of_another_version_is_left_alone(caplog):
    memory = new_memory()
    memory[:8] = b"strange!"
    writer = UsageMemory(memory)
    assert writer.block(text()) is None
    assert UsageReader(memory).blocks() == []
    assert bytes(memory[:8]) == b"strange!"
    assert "usage_lost" in caplog.text


def test_a_writer_that_was_killed_while_it_emptied_a_half_is_not_read():
    memory = new_memory()
    block = UsageMemory(memory).block(text())
    add(block, 3, 7)
    block.words[EPOCH] |= 1
    assert UsageReader(memory).blocks()[0].snapshot() is None
    again = UsageMemory(memory).block(text())
    assert (again.snapshot().total_rows, int(again.snapshot().usage.sum())) == (7, 0)


def test_a_block_that_was_given_away_is_not_read():
    memory = new_memory()
    writer = UsageMemory(memory)
    block = writer.block(text())
    old = UsageReader(memory).blocks()[0]
    release(block)
    assert old.snapshot() is None
    writer.block(text("other"))
    assert old.snapshot() is None


def test_262144_codes_take_no_more_than_16_bytes_each():
    memory = new_memory(5 << 20)
    block = UsageMemory(memory).block(text(sizes=(262144,)))
    assert block.halves.nbytes + block.reference.nbytes == 16 * 262145


def test_readers_never_see_a_half_that_is_being_emptied():
    """A reader beside a writer sees at least one full half, from the second on."""
    memory = new_memory()
    block = UsageMemory(memory).block(text())
    stop = threading.Event()
    rows, window = 64, 256

    def write():
        while not stop.is_set():
            block.add(np.zeros(rows, np.int64), np.ones(rows), rows=rows, window_rows=window)

    for _ in range(8):
        block.add(np.zeros(rows, np.int64), np.ones(rows), rows=rows, window_rows=window)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = []
        for _ in range(500):
            snapshot = UsageReader(memory).blocks()[0].snapshot()
            if snapshot is not None:
                seen.append((int(snapshot.usage.sum()), snapshot.total_rows))
    finally:
        stop.set()
        writer.join()
    assert len(seen) > 100
    assert all(window <= used <= 2 * window + rows for used, _ in seen)
    totals = [total for _, total in seen]
    assert totals == sorted(totals)


# Several processes.


def test_the_counts_of_several_processes_are_added_up():
    memories = [new_memory(), new_memory()]
    for number, memory in enumerate(memories):
        block = UsageMemory(memory).block(text())
        block.set_reference(2, np.array([2, *[0] * 16]), 0.5)
        block.add(np.array([number, 5]), np.array([1.0, 3.0]), rows=2, window_rows=WINDOW)
    [health] = HealthReader(memories).codebooks()
    assert (health.sampled_rows, health.error, health.error_ratio) == (4, 2.0, 4.0)
    assert health.stages[0].usage[:6] == [0.25, 0.25, 0, 0, 0, 0.5]
    assert health.stages[0].reference[0] == 1.0


def test_in_the_middle_of_a_reload_the_newest_counts():
    memories = [new_memory(), new_memory()]
    add(UsageMemory(memories[0]).block(text()), 1, 10)
    add(UsageMemory(memories[1]).block(text(digest="new", sizes=(8,))), 2, 3)
    [health] = HealthReader(memories).codebooks()
    assert (health.digest, health.stages[0].codes, health.stages[0].sampled_rows) == ("new", 8, 3)
    assert health.sampled_rows == 13


def test_what_is_not_known_is_no_metric():
    memory = new_memory()
    writer = UsageMemory(memory)
    writer.block(text())
    assert list(HealthReader([memory]).samples()) == [("codebook_sampled_rows", {"codebook": "book"}, 0)]


def test_metrics():
    memory = new_memory()
    block = UsageMemory(memory).block(text(sizes=(4, 2)))
    reference = np.array([1000, 1000, 0, 0, 0, 1000, 1000, 0])
    block.set_reference(2000, reference, 0.5)
    block.add(np.repeat([0, 1], 1000), np.full(2000, 1.0), rows=2000, window_rows=WINDOW)
    block.add(np.repeat([5], 2000), np.empty(0), rows=0, window_rows=WINDOW)
    found = {(name, labels.get("stage")): value for name, labels, value in HealthReader([memory]).samples()}
    drifts = [found.pop(("codebook_drift_bits", stage)) for stage in "01"]
    assert drifts[0] == pytest.approx(0, abs=0.003)
    # Half of the divergence of (1, 0) and (1/2, 1/2) from their middle.
    assert drifts[1] == pytest.approx(0.311, abs=0.02)
    assert found == {
        ("codebook_sampled_rows", None): 2000,
        ("codebook_error", None): 1.0,
        ("codebook_error_ratio", None): 2.0,
        ("codebook_window_rows", "0"): 2000,
        ("codebook_window_rows", "1"): 2000,
        ("codebook_used_ratio", "0"): 0.5,
        ("codebook_dead_codes", "0"): 2,
        ("codebook_perplexity", "0"): 2.0,
        ("codebook_used_ratio", "1"): 0.5,
        ("codebook_dead_codes", "1"): 1,
        ("codebook_perplexity", "1"): 1.0,
    }


@pytest.mark.parametrize(("reference_error", "error"), [(5e-324, 1.0), (0.5, float("inf")), (0.5, float("nan"))])
def test_figures_that_no_float_can_hold_are_not_known(reference_error, error):
    memory = new_memory()
    block = UsageMemory(memory).block(text(sizes=(4,)))
    block.set_reference(2000, np.array([2000, 0, 0, 0, 0]), reference_error)
    block.add(np.zeros(10, np.int64), np.array([error]), rows=10, window_rows=WINDOW)
    [book] = HealthReader([memory]).as_json()
    assert book["error_ratio"] is None
    json.dumps(book, allow_nan=False)


def test_a_picture_has_at_most_1024_groups():
    memory = new_memory(4 << 20)
    block = UsageMemory(memory).block(text(sizes=(100_000, 1024)))
    add(block, 99_999)
    [health] = HealthReader([memory]).codebooks()
    first, second = health.stages
    assert (len(first.usage), len(second.usage)) == (1021, 1024)
    assert first.usage[-1] == 1.0
