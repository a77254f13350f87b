"""Reloads that are requested while one runs: one more, and never two at once."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from support.waiting import DEADLINE_S
from vqserve_server.repository import ReloadCounts, Reloader


class SlowRepository:
    """Reloads that end when the test says so; the first one fails if the test asks for it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.rescans = 0
        self.at_once = 0
        self._error = error

    def reload(self) -> Any:
        self.at_once += 1
        assert self.at_once == 1
        self.rescans += 1
        self.entered.release()
        self.gate.acquire()
        self.at_once -= 1
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return ReloadCounts(loaded=self.rescans)


async def until_idle(rescans: Reloader) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while rescans.is_busy:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("asked_meanwhile", [0, 1, 5])
def test_asked_for_while_one_goes_on(asked_meanwhile: int) -> None:
    async def run() -> tuple[int, int]:
        repository, done = SlowRepository(), []
        rescans = Reloader(repository, lambda: done.append(repository.rescans))  # type: ignore[arg-type]
        rescans.request()
        await asyncio.to_thread(repository.entered.acquire)
        for _ in range(asked_meanwhile):
            rescans.request()
        assert done == []
        repository.gate.release()
        repository.gate.release()
        await until_idle(rescans)
        return repository.rescans, len(done)

    expected = 1 + (asked_meanwhile > 0)
    assert asyncio.run(run()) == (expected, expected)


def test_a_failed_reload_is_logged_and_the_next_one_works(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def run() -> list[int]:
        repository, done = SlowRepository(RuntimeError("the disk is on fire")), []
        rescans = Reloader(repository, lambda: done.append(repository.rescans))  # type: ignore[arg-type]
        for _ in range(2):
            rescans.request()
            repository.gate.release()
            await until_idle(rescans)
        return done

    assert asyncio.run(run()) == [2]
    assert "reload_failed" in caplog.text
    assert "the disk is on fire" in caplog.text
    assert " loaded=2 " in caplog.records[-1].getMessage()
