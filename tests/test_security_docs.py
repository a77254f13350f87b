"""docs/security.md: its commands work as they are printed, and what it shows is true."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.certificates import Pair, connect, replace
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from vqserve_server.access.token_file import grants
from vqserve_server.config import EngineConfig, RpcConfig, flag

PAGE = (Path(__file__).parents[1] / "docs" / "security.md").read_text()
BLOCKS = re.findall(r"^```(sh|toml)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def follow(vqserved: Callable[..., Any], tmp_path: Path) -> Callable[[str], list[Any]]:
    """Run the commands of a section in a folder; return the servers that it starts, on loopback and a free port.

    The commands of clients go to the newest server.
    """

    def run(section: str) -> list[Any]:
        servers = []
        for tag, block in re.findall(r"^```(sh|toml)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            if tag == "sh" and block.startswith("vqserved serve"):
                words = shlex.split(block)[2:]
                if "--host" in words:
                    del words[words.index("--host") : words.index("--host") + 2]
                paths = {word: str(tmp_path / word) for word in words if (tmp_path / word).is_file()}
                servers.append(vqserved("--device", "cpu", *(paths.get(word, word) for word in words)))
            elif tag == "sh":
                environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
                if servers:
                    environ["VQSERVE_TARGET"] = servers[-1].target
                ended = subprocess.run(
                    ["sh", "-e", "-c", block], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
                )
                assert ended.returncode == 0, ended.stderr
        return servers

    return run


def section(title: str) -> str:
    begin = PAGE.index(f"\n## {title}\n")
    end = PAGE.find("\n## ", begin + 1)
    return PAGE[begin:end]


def listed(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> list[str]:
    with channel:
        reply = TokenizerServiceStub(channel).ListCodebooks(pb.ListCodebooksRequest(), metadata=metadata, timeout=30)
        return [codebook.name for codebook in reply.codebooks]


def test_the_commands_of_tls(follow: Callable[[str], list[Any]], tmp_path: Path) -> None:
    plain, mutual = follow(section("TLS"))
    ca = (tmp_path / "ca.crt").read_bytes()
    client = Pair((tmp_path / "client.crt").read_bytes(), (tmp_path / "client.key").read_bytes())
    assert listed(connect(plain.target, ca)) == ["demo"]
    assert listed(connect(plain.target.replace("127.0.0.1", "localhost"), ca)) == ["demo"]
    assert listed(connect(mutual.target, ca, client)) == ["demo"]
    with pytest.raises(grpc.RpcError) as caught:
        listed(connect(mutual.target, ca))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_commands_of_access_tokens(follow: Callable[[str], list[Any]], tmp_path: Path) -> None:
    [server] = follow(section("Access tokens"))
    secret = (tmp_path / "trainer.token").read_text().strip()
    metadata = (("authorization", f"Bearer {secret}"),)
    # The token is for other codebooks than the demo.
    assert listed(grpc.insecure_channel(server.target), metadata) == []
    with pytest.raises(grpc.RpcError) as caught:
        listed(grpc.insecure_channel(server.target))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    # As the page says: a token is removed, and at SIGHUP the server notices.
    replace(tmp_path / "tokens.toml", b'[tokens.x]\nsha256 = "%s"\n' % (b"0" * 64))
    assert any(" access_reloaded what=tokens" in line for line in server.rescan())
    with pytest.raises(grpc.RpcError) as caught:
        listed(grpc.insecure_channel(server.target), metadata)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_entry_of_the_page_is_valid() -> None:
    [entry] = [block for tag, block in BLOCKS if tag == "toml"]
    [grant] = grants("page", entry.encode())
    fields = {name for name, value in vars(grant).items() if value is not None} - {"name"}
    rows = section("Access tokens").partition("|---|")[2]
    documented = {
        name for row in rows.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    }
    assert fields == documented


def test_the_page_has_every_limit() -> None:
    limits = {
        setting.name for group in (RpcConfig, EngineConfig) for setting in fields(group) if "max_" in setting.name
    }
    ours = {name for name in limits if not name.startswith(("max_batch_", "max_wait_"))}
    others = {"idle_seconds", "connection_idle_seconds", "allow_compression"}
    assert [name for name in ours | others if f"`{flag(name)}`" not in section("Limits")] == []
