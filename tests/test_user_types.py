"""mypy --strict over a user's file: what is right passes, each wrong call is found on its line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A line that ends in "# error: CODE" is wrong, and mypy must say so with that code; all others are right.
PROGRAM = """
from collections.abc import AsyncGenerator, Generator
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import torch

from vqserve import AsyncClient, Client, CodebookInfo, InvalidArgument, Layout, VqserveError
from vqserve_server import Tokenizer

Numpy = npt.NDArray[Any]
array = np.zeros((2, 4), np.float32)
tensor = torch.zeros(2, 4)


def swapped(client: Client | Tokenizer) -> None:
    assert_type(client.encode(array), Numpy)
    assert_type(client.encode(tensor), torch.Tensor)
    assert_type(client.decode(array, dtype="float16", output="code_rows"), Numpy)
    assert_type(client.decode(tensor, dtype=torch.bfloat16), torch.Tensor)
    assert_type(client.decode(array, dtype=np.float64, layout=Layout.CHANNELS_FIRST), Numpy)
    for indices in client.encode_many([array, array], layout="channels_last"):
        assert_type(indices, Numpy)
    assert_type(client.encode(array, batched=False), Numpy)
    client.encode(array, batched="no")  # error: arg-type
    client.encode([1.0, 2.0])  # error: type-var
    client.encode(array, layout="first")  # error: arg-type
    client.encode(array, layer="channels_last")  # error: call-arg
    client.encode(array, "channels_last")  # error: call-arg
    client.decode(array, output="rows")  # error: arg-type
    client.decode(array, dtype="int8")  # error: arg-type
    client.decode(array, num_quantizers="2")  # error: arg-type
    for key, indices in client.encode_many([("a", array)]):
        assert_type(key, str)
        assert_type(indices, Numpy)
    for result in client.decode_many([tensor], on_error="return", dtype="float16"):
        assert_type(result, torch.Tensor | VqserveError)
    for pair in client.encode_many([(1, array)], on_error="return", batched=False):
        assert_type(pair, tuple[int, Numpy | VqserveError])
    client.encode_many(["a"])  # error: type-var
    client.encode_many([array], on_error="skip")  # error: call-overload
    client.encode_many([array], layout="first")  # error: call-overload
    client.decode_many([array], layer="channels_last")  # error: call-overload
    names: list[str] = client.encode(array)  # error: assignment


def remote(client: Client) -> list[CodebookInfo]:
    assert_type(client.decode_many(iter([tensor])), Generator[torch.Tensor, None, None])
    try:
        return client.codebooks(timeout=1.0)
    except InvalidArgument as error:
        assert_type(error.item, int | None)
        client.encode(array, timeout="1")  # error: arg-type
        return client.codebooks(1.0)  # error: call-arg


async def awaited(client: AsyncClient) -> None:
    assert_type(await client.encode(array), Numpy)
    assert_type(await client.decode(tensor), torch.Tensor)
    assert_type(client.encode_many([array]), AsyncGenerator[Numpy, None])
    assert_type(
        client.decode_many([("a", array)], on_error="return"), AsyncGenerator[tuple[str, Numpy | VqserveError], None]
    )
    client.encode(array)  # error: unused-coroutine
    await client.encode("latents")  # error: type-var
    await client.decode(array, layout="last")  # error: arg-type
"""


def found(text: str) -> set[tuple[int, str]]:
    errors = re.findall(r"^user\.py:(\d+): error: .*\[([\w-]+)\]$", text, re.MULTILINE)
    return {(int(line), code) for line, code in errors}


@pytest.mark.timeout(300)
def test_mypy_finds_each_wrong_call_and_nothing_else(tmp_path):
    (tmp_path / "user.py").write_text(PROGRAM)
    path = os.pathsep.join(str(ROOT / root) for root in ("proto", "server", "client"))
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MYPYPATH": path}, capture_output=True, text=True, check=False
    )
    wanted = {
        (number, code)
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        for code in re.findall(r"# error: ([\w-]+)$", line)
    }
    assert found(ended.stdout) == wanted, ended.stdout + ended.stderr
