"""How long batches take is learned from them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vqserve_server.config import EngineConfig
from vqserve_server.engine import EncodeKey
from vqserve_server.engine.speed import LEAST_ROWS, Speed, Speeds

MAX_ROWS, BATCH_S = 16384, 4e-3
# Seconds for a batch, for each of its jobs, and for each row: a large codebook on a CPU, a small one, a GPU.
DEVICES = {"slow": (1e-4, 5e-5, 8e-5), "usual": (1e-4, 5e-5, 1.5e-6), "fast": (3e-4, 2e-5, 5e-8)}


def learn(speed: Speed, device: tuple[float, float, float], batches: int, seed: int = 0) -> None:
    """Half of the batches have small jobs, the others are full."""
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        jobs, rows = int(rng.integers(1, 4)), speed.batch_rows
        if rng.random() < 0.5:
            jobs = int(rng.integers(1, 33))
            rows = jobs * int(rng.integers(1, 64))
        speed.measure(jobs, rows, device[0] + jobs * device[1] + rows * device[2])


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_what_it_expects_comes_close(device: tuple[float, float, float]) -> None:
    speed = Speed(MAX_ROWS, BATCH_S)
    learn(speed, device, 300)
    for jobs, rows in ((10, 300), (2, speed.batch_rows)):
        really = device[0] + jobs * device[1] + rows * device[2]
        assert speed.seconds(jobs, rows) == pytest.approx(really, rel=0.5)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_full_batch_takes_its_time(device: tuple[float, float, float]) -> None:
    speed = Speed(MAX_ROWS, BATCH_S)
    learn(speed, device, 300)
    if speed.batch_rows == LEAST_ROWS:
        assert speed.seconds(1, LEAST_ROWS) > BATCH_S
    elif speed.batch_rows < MAX_ROWS:
        assert device[0] + device[1] + speed.batch_rows * device[2] == pytest.approx(BATCH_S, rel=0.3)
    else:
        assert speed.seconds(1, MAX_ROWS) < BATCH_S


def test_a_batch_that_takes_long_whatever_its_rows_is_not_made_small() -> None:
    speed = Speed(MAX_ROWS, BATCH_S)
    for _ in range(50):
        speed.measure(1, speed.batch_rows, 5 * BATCH_S)
    assert speed.batch_rows == LEAST_ROWS
    assert Speed(5, BATCH_S).batch_rows == 5


def test_a_slow_first_batch_is_soon_forgotten() -> None:
    speed = Speed(MAX_ROWS, BATCH_S)
    speed.measure(1, 100, 3.0)
    assert speed.seconds(1, 100) < 0.02
    learn(speed, DEVICES["usual"], 30)
    assert speed.seconds(1, 100) < 1e-3


def test_a_few_batches_that_are_held_up_do_not_make_batches_small() -> None:
    speed = Speed(MAX_ROWS, BATCH_S)
    learn(speed, DEVICES["usual"], 100)
    before = speed.batch_rows
    for number in range(100):
        speed.measure(1, speed.batch_rows, BATCH_S * (20 if number % 20 == 0 else speed.batch_rows / before))
    assert speed.batch_rows > before / 2


def test_a_device_that_becomes_slow_is_known_after_a_few_batches() -> None:
    speed = Speed(MAX_ROWS, BATCH_S)
    learn(speed, DEVICES["usual"], 100)
    for _ in range(15):
        speed.measure(1, 1000, 0.5)
    assert speed.seconds(1, 1000) > 0.25
    for _ in range(15):
        speed.measure(1, 1000, 1e-3)
    assert speed.seconds(1, 1000) < 0.02


def test_no_limit_in_time_means_full_batches() -> None:
    speed = Speed(MAX_ROWS, 0.0)
    learn(speed, DEVICES["slow"], 10)
    assert speed.batch_rows == speed.full_rows == MAX_ROWS


def test_a_codebook_that_was_replaced_is_not_kept(fake: Callable[..., Any]) -> None:
    speeds = Speeds(EngineConfig())
    tokenizer = fake()
    key = EncodeKey(tokenizer, np.dtype(np.float32))
    assert speeds.of(key) is speeds.of(EncodeKey(tokenizer, np.dtype(np.float32)))
    assert speeds.of(key) is not speeds.of(EncodeKey(tokenizer, np.dtype(np.float64)))

    class Replaced:
        info = tokenizer.info

    other: Any = Replaced()
    speeds.of(EncodeKey(other, np.dtype(np.float32)))
    seen = weakref.ref(other)
    del other
    gc.collect()
    assert seen() is None
