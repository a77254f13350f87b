"""What a server says about itself, on the SDK and on the command line; and an older server, which says nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from vqserve import __version__
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve_client import ServerInfo
from vqserve_client.cli import main
from vqserve_server.codebook_files import DEMO_PATH
from vqserve_server.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.load(DEMO_PATH, device="cpu")


@pytest.fixture
def server(serving: Callable[..., Any], demo: Tokenizer) -> Any:
    return serving(demo)


def test_version_uptime_and_load(connect: Callable[..., Any], server: Any, demo: Tokenizer) -> None:
    client = connect(server.target)
    before = client.server_info()
    assert (before.version, before.requests, before.rows) == (__version__, 0, 0)
    assert before.requests_per_second == before.rows_per_second == 0
    latents = np.zeros((1, demo.info.input_dim, 8, 8), np.float32)
    for _ in range(3):
        client.encode(latents)
    after = client.server_info()
    # Canaries may be among them.
    assert after.requests_per_second > 0
    assert after.rows_per_second >= after.requests_per_second
    assert after.uptime_seconds > before.uptime_seconds > 0
    # This call itself.
    assert after.open_calls == 1


def test_speeds_are_those_of_the_last_seconds() -> None:
    from types import SimpleNamespace  # noqa: PLC0415

    from vqserve_server.rpc.server_info import ServerInfo as Info  # noqa: PLC0415

    stats = SimpleNamespace(requests=0, rows=0)
    engine: Any = SimpleNamespace(stats=stats, admission=SimpleNamespace(requests=1, rows=2, bytes=3))
    now = [0.0]
    info = Info(engine, lambda: 4, clock=lambda: now[0])
    for second in range(1, 31):
        now[0] = second
        stats.requests, stats.rows = 10 * second, 1000 * second
        info.tick()
    message = info.message()
    assert (message.requests_per_second, message.rows_per_second) == (10, 1000)
    assert (message.requests, message.rows, message.bytes, message.open_calls) == (1, 2, 3, 4)
    for second in range(31, 50):
        now[0] = second
        info.tick()
    assert info.message().requests_per_second == 0
    assert info.message().uptime_seconds == 49


def test_an_older_server_says_nothing(connect: Callable[..., Any], tiny: Any) -> None:
    client = connect(tiny.target)
    assert client.server_info() is None
    assert client.codebooks()[0].version is None


def test_what_no_server_should_say_can_be_shown(connect: Callable[..., Any], tiny: Any) -> None:
    def lie(reply: pb.ListCodebooksResponse) -> None:
        reply.server.CopyFrom(pb.ServerInfo(version="1\x1b[2J" * 100, uptime_seconds=math.inf, rows=1 << 63))
        reply.server.rows_per_second = math.nan

    tiny.list_script.append(lie)
    info = connect(tiny.target).server_info()
    assert "\x1b" not in str(info)
    assert len(str(info)) < 300


@pytest.mark.parametrize(
    ("info", "text"),
    [
        (
            ServerInfo(version="1.2.3", uptime_seconds=59.9),
            "vqserve 1.2.3, up 59 s; 0 requests of 0 tokens in the server, 0 open calls; 0 requests/s, 0 tokens/s",
        ),
        (
            ServerInfo(
                version="1.2.3",
                uptime_seconds=90_061,
                requests=12,
                rows=49_152,
                open_calls=5,
                requests_per_second=123.4,
                rows_per_second=1_234_567,
            ),
            "vqserve 1.2.3, up 1 d 1 h; 12 requests of 49.2k tokens in the server, 5 open calls; 123 requests/s, "
            "1.23M tokens/s",
        ),
    ],
)
def test_its_text(info: ServerInfo, text: str) -> None:
    assert str(info) == text


def test_the_command_line(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--target", server.target]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "SERVING"
    assert second.startswith(f"vqserve {__version__}, up ")
    assert main(["status", "--json", "--target", server.target]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["status"], status["server"]["version"]) == ("SERVING", __version__)
    assert main(["status", "--quiet", "--target", server.target]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_command_line_with_an_older_server(
    replicas: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    [old] = replicas("127.0.0.1")
    old.health.set("", health_pb2.HealthCheckResponse.SERVING)
    assert main(["status", "--target", old.target]) == 0
    assert capsys.readouterr() == ("SERVING\n", "")
    assert main(["status", "--json", "--target", old.target]) == 0
    assert json.loads(capsys.readouterr().out) == {"status": "SERVING", "server": None}


def test_nothing_but_the_status_where_a_token_is_missing(
    serving: Callable[..., Any], demo: Tokenizer, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokens.toml").write_text(f'[tokens.me]\nsha256 = "{"0" * 64}"\n')
    server = serving(demo, tokens=tmp_path / "tokens.toml")
    assert main(["status", "--target", server.target]) == 0
    assert capsys.readouterr() == ("SERVING\n", "")
