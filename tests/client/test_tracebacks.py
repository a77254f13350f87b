"""The traceback of an error shows the caller's code, not the insides of the SDK."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest

import vqserve_client
from vqserve_client import AsyncClient, DigestMismatch, VqserveError

OURS = str(Path(vqserve_client.__file__).parent)
WRONG = {
    "channels": lambda client: client.encode(np.zeros((2, 5), np.float32)),
    "dtype of the array": lambda client: client.encode(np.zeros((2, 4), np.int32)),
    "option": lambda client: client.decode(np.zeros(2, np.uint8), output="rows"),
    "codebook": lambda client: client.encode(np.zeros((2, 4), np.float32), codebook="none"),
    "index, which the server finds": lambda client: client.decode(np.full(2, 9999)),
    "one of many": lambda client: list(client.encode_many([np.zeros((2, 5), np.float32)])),
    "timeout": lambda client: client.codebooks(timeout=1e-9),
}
PROGRAM = """
import numpy as np, sys
from vqserve import Client
with Client(sys.argv[1]) as client:
    client.encode(np.zeros((2, 5), np.float32))
"""


def ours(error: BaseException) -> list[str]:
    """The frames of the SDK that a traceback shows, with those of its causes."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return [line for line in lines if OURS in line]


@pytest.mark.parametrize("wrong", WRONG)
def test_at_most_three_frames_are_the_sdk(connect, tiny, wrong):
    with pytest.raises(VqserveError) as caught:
        WRONG[wrong](connect(tiny.target))
    assert len(ours(caught.value)) <= 3


def test_what_led_to_an_error_is_not_shown_but_logged(connect, tiny, latents, failing, caplog):
    tiny.script.extend([failing("FAILED_PRECONDITION")] * 20)
    client = connect(tiny.target, digest=tiny.codes["small"].info.digest)
    with caplog.at_level(logging.DEBUG, "vqserve_client"), pytest.raises(DigestMismatch) as caught:
        client.encode(latents(2, 4))
    shown = "".join(traceback.format_exception(caught.value))
    assert "direct cause" not in shown
    assert "During handling" not in shown
    assert "reconsider" in caplog.text


def arrays_of_a_caller():
    yield np.zeros((2, 4), np.float32)
    try:
        raise KeyError("what the caller met")
    except KeyError as error:
        raise VqserveError("the caller's own") from error


async def later(arrays):
    for array in arrays:
        yield array


def assert_is_whole(error):
    assert isinstance(error.__cause__, KeyError)
    assert "arrays_of_a_caller" in "".join(traceback.format_tb(error.__traceback__))


def test_an_error_of_the_caller_s_iterator_keeps_its_frames_and_its_cause(connect, tiny):
    with pytest.raises(VqserveError, match="the caller's own") as caught:
        list(connect(tiny.target, codebook="small").encode_many(arrays_of_a_caller()))
    assert_is_whole(caught.value)


@pytest.mark.parametrize("prepare", [lambda arrays: arrays, later])
def test_an_error_of_the_caller_s_iterator_keeps_its_frames_in_asyncio(tiny, prepare):
    async def convert():
        async with AsyncClient(tiny.target, codebook="small") as client:
            async for _ in client.encode_many(prepare(arrays_of_a_caller())):
                pass

    with pytest.raises(VqserveError, match="the caller's own") as caught:
        asyncio.run(convert())
    assert_is_whole(caught.value)


@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_in_an_except_block_keeps_what_the_caller_handles(connect, tiny, wrong):
    client = connect(tiny.target)
    met = KeyError("what the caller met")

    def convert():
        try:
            raise met
        except KeyError:
            WRONG[wrong](client)

    with pytest.raises(VqserveError) as caught:
        convert()
    assert caught.value.__context__ is met
    assert not caught.value.__suppress_context__


@pytest.mark.parametrize("many", [False, True])
def test_an_error_in_an_except_block_of_asyncio_keeps_what_the_caller_handles(tiny, many):
    wrong = np.zeros((2, 5), np.float32)
    met = KeyError("what the caller met")

    async def convert():
        async with AsyncClient(tiny.target, codebook="small") as client:
            try:
                raise met
            except KeyError:
                await (anext(client.encode_many([wrong])) if many else client.encode(wrong))

    with pytest.raises(VqserveError) as caught:
        asyncio.run(convert())
    assert caught.value.__context__ is met


def test_all_frames_are_shown_on_demand(connect, tiny, monkeypatch):
    monkeypatch.setenv("VQSERVE_TRACEBACK", "full")
    with pytest.raises(VqserveError) as caught:
        WRONG["channels"](connect(tiny.target))
    assert len(ours(caught.value)) > 3


def test_a_program_ends_with_a_short_traceback(tiny):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, tiny.target], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.count('File "') <= 4
    assert ended.stderr.splitlines()[-1].startswith("vqserve.errors.InvalidShape: latents of shape (2, 5)")
