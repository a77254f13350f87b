"""The connection between a worker and its parent: both may ask, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from vqserve_server.control import Control, ControlError

Handle = Callable[[str, str], Awaitable[Any]]


async def echo(command: str, argument: str) -> list[str]:
    return [command, argument]


def connected(test: Callable[[Control, Control, asyncio.Task[None]], Awaitable[None]], handle: Handle = echo) -> None:
    """Run a test with both ends of a connection, and the task of the second one."""

    async def run() -> None:
        first, second = (Control(end, handle) for end in socket.socketpair())
        tasks = [asyncio.create_task(each.run()) for each in (first, second)]
        # Both are open after a turn of the loop.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        try:
            await asyncio.wait_for(test(first, second, tasks[1]), 60)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_both_ends_may_ask_at_once() -> None:
    async def test(first: Control, second: Control, _: asyncio.Task[None]) -> None:
        asked = [each.ask("status", str(number)) for number in range(100) for each in (first, second)]
        answers = await asyncio.gather(*asked)
        assert answers == [["status", str(number)] for number in range(100) for _ in range(2)]

    connected(test)


def test_a_question_waits_until_the_connection_is_open() -> None:
    async def test() -> None:
        first, second = (Control(end, echo) for end in socket.socketpair())
        asking = asyncio.create_task(first.ask("status"))
        await asyncio.sleep(0.01)
        tasks = [asyncio.create_task(each.run()) for each in (first, second)]
        try:
            assert await asyncio.wait_for(asking, 60) == ["status", ""]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(test())


def test_answers_may_come_in_another_order_and_be_long() -> None:
    gate = asyncio.Event()

    async def handle(command: str, argument: str) -> str:
        if command == "slow":
            await gate.wait()
        else:
            gate.set()
        return argument * (1 << 20)

    async def test(first: Control, _second: Control, _: asyncio.Task[None]) -> None:
        slow, fast = await asyncio.gather(first.ask("slow", "ab"), first.ask("fast", "c"))
        assert (len(slow), len(fast)) == (2 << 20, 1 << 20)

    connected(test, handle)


def test_a_command_that_fails_is_an_error_of_the_one_who_asked(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(command: str, argument: str) -> None:
        raise ValueError("a secret reason")

    async def test(first: Control, _second: Control, _: asyncio.Task[None]) -> None:
        with pytest.raises(ControlError, match=r"^it failed; the log has the reason$"):
            await first.ask("reload")

    connected(test, handle)
    assert "command_failed command=reload" in caplog.text
    assert "a secret reason" in caplog.text


def test_the_end_of_the_other_side_ends_what_is_asked() -> None:
    async def handle(command: str, argument: str) -> None:
        await asyncio.Event().wait()

    async def test(first: Control, _second: Control, ending: asyncio.Task[None]) -> None:
        asked = asyncio.create_task(first.ask("reload"))
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(ControlError, match="the process has ended"):
            await asked
        with pytest.raises(ControlError, match="the process has ended"):
            await first.ask("reload")

    connected(test, handle)


def test_a_process_that_is_killed_with_something_unread_is_no_fault_of_this_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run() -> None:
        end, other = socket.socketpair()
        control = Control(end, echo)
        task = asyncio.create_task(control.run())
        asked = asyncio.create_task(control.ask("status"))
        # The question is there, and the process ends before it reads it.
        await asyncio.get_running_loop().run_in_executor(None, lambda: other.recv(1, socket.MSG_PEEK))
        other.close()
        with pytest.raises(ControlError, match="the process has ended"):
            await asyncio.wait_for(asked, 60)
        await asyncio.wait_for(task, 60)

    asyncio.run(run())
    assert not caplog.text


def test_nonsense_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        end, other = socket.socketpair()
        control = Control(end, echo)
        task = asyncio.create_task(control.run())
        other.sendall(b"{nonsense\n")
        await asyncio.wait_for(task, 60)
        with pytest.raises(ControlError):
            await control.ask("status")
        other.close()

    asyncio.run(run())
    assert "control_failed" in caplog.text
