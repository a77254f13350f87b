"""Tokens and metadata: what is sent, when it is not, and that no text has a token in it."""

from __future__ import annotations

import logging
import os
import pickle

import pytest

from support.certificates import Authority, Folder, replace
from vqserve_client import AsyncClient, Client, InvalidOption, Tls, Unauthenticated
from vqserve_client.cli import main
from vqserve_server.access.token_file import hash_of, new_secret

SECRET = "-".join(["s3cr3t", "t0ken"])


class Recorded:
    """The metadata that a tiny server is sent."""

    def __init__(self, server):
        self.sent = []
        self._server = server

    def __call__(self, request, context, honest):
        self.sent.append(tuple((one.key, one.value) for one in context.invocation_metadata()))
        return honest()

    def call(self, client, latents):
        """Make a call; return its metadata of these keys."""
        self._server.script.append(self)
        client.encode(latents)
        return [one for one in self.sent[-1] if one[0] in ("authorization", "x-gateway", "x-gateway-bin")]


@pytest.fixture
def recorded(tiny):
    return Recorded(tiny)


def bearer(token):
    return [("authorization", f"Bearer {token}")]


def test_a_token(tiny, recorded, connect, latents):
    assert recorded.call(connect(tiny.target, token=SECRET), latents(2, 4)) == bearer(SECRET)
    assert recorded.call(connect(tiny.target), latents(2, 4)) == []


def test_a_token_on_a_stream(streaming, connect, latents):
    recorded = Recorded(streaming)
    streaming.script.append(recorded)
    list(connect(streaming.target, token=SECRET).encode_many([latents(2, 4)]))
    assert ("authorization", f"Bearer {SECRET}") in recorded.sent[0]


def test_a_token_file_is_read_again_after_it_changed(tiny, recorded, connect, latents, tmp_path):
    path = tmp_path / "token"
    path.write_text("first\n")
    client = connect(tiny.target, token_file=path)
    assert recorded.call(client, latents(2, 4)) == bearer("first")
    replace(path, b"second")
    assert recorded.call(client, latents(2, 4)) == bearer("second")
    # While it is being written, or gone, the last one counts.
    path.write_text("")
    assert recorded.call(client, latents(2, 4)) == bearer("second")
    path.unlink()
    assert recorded.call(client, latents(2, 4)) == bearer("second")
    path.write_text("third")
    assert recorded.call(client, latents(2, 4)) == bearer("third")


def test_a_token_that_is_replaced_while_a_request_is_on_its_way(tiny, recorded, connect, failing, latents, tmp_path):
    path = tmp_path / "token"
    path.write_text("old")

    def replaced(request, context, honest):
        replace(path, b"new")
        failing("UNAUTHENTICATED")(request, context, honest)

    client = connect(tiny.target, token_file=path)
    tiny.script.append(replaced)
    assert recorded.call(client, latents(2, 4)) == bearer("new")
    # Once: a token that is wrong is an error.
    tiny.script.extend([failing("UNAUTHENTICATED")] * 3)
    with pytest.raises(Unauthenticated):
        client.encode(latents(2, 4))
    assert len(tiny.script) == 1


def test_metadata(tiny, recorded, connect, latents):
    client = connect(tiny.target, metadata={"x-gateway": "a b", "x-gateway-bin": b"\0\xff"}, token=SECRET)
    assert sorted(recorded.call(client, latents(2, 4))) == [
        *bearer(SECRET),
        ("x-gateway", "a b"),
        ("x-gateway-bin", b"\0\xff"),
    ]


def test_the_environment(tiny, recorded, monkeypatch, latents, tmp_path):
    path = tmp_path / "token"
    path.write_text("from-file")
    monkeypatch.setenv("VQSERVE_TOKEN_FILE", str(path))
    with Client(tiny.target) as client:
        assert recorded.call(client, latents(2, 4)) == bearer("from-file")
    monkeypatch.setenv("VQSERVE_TOKEN", "from-environment")
    with Client(tiny.target) as client:
        assert recorded.call(client, latents(2, 4)) == bearer("from-environment")
    with Client(tiny.target, token_file=path) as client:
        assert recorded.call(client, latents(2, 4)) == bearer("from-file")
    with Client(tiny.target, token=SECRET) as client:
        assert recorded.call(client, latents(2, 4)) == bearer(SECRET)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"token": ""}, "token must be of 1 to 2048 letters"),
        ({"token": SECRET + "\n"}, "token must be of 1 to 2048 letters"),
        ({"token": SECRET * 200}, "token must be of 1 to 2048 letters"),
        ({"token": SECRET, "token_file": "x"}, "give token= or token_file=, not both"),
        ({"token_file": "missing"}, "token_file: cannot read 'missing': No such file or directory"),
        ({"token_file": os.devnull}, "token_file: '/dev/null' must contain one token and nothing else"),
        ({"metadata": {"Upper": "x"}}, "metadata must have keys of lower-case letters"),
        ({"metadata": {"grpc-timeout": "1S"}}, "metadata must not have the key 'grpc-timeout', which is reserved"),
        ({"metadata": {"vqserve-request-id": "1"}}, "which is reserved"),
        ({"metadata": {"x": f"{SECRET}\n"}}, "metadata 'x' must have a value of printable ASCII characters"),
        ({"metadata": {"authorization": "x"}, "token": SECRET}, "must not have 'authorization' beside a token"),
    ],
)
def test_what_cannot_be_sent(options, text):
    with pytest.raises(InvalidOption) as caught:
        Client("localhost:1", **options)
    assert text in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"token": b"x"}, {"metadata": [("a", "b")]}, {"metadata": {"x": 1}}, {"metadata": {"x-bin": "text"}}],
)
def test_what_has_the_wrong_type(options):
    with pytest.raises(TypeError):
        Client("localhost:1", **options)


@pytest.mark.parametrize("target", ["vq.example:1", "vqserve:1", "10.0.0.1:1,10.0.0.2:1", "dns:///vq:1"])
def test_no_token_without_encryption_beyond_this_machine(target, tmp_path):
    path = tmp_path / "token"
    path.write_text(SECRET)
    for options in ({"token": SECRET}, {"token_file": path}, {"metadata": {"authorization": SECRET}}):
        with pytest.raises(InvalidOption, match=r"token would be sent to .* without encryption: .*tls=.*insecure="):
            Client(target, **options)
        Client(target, **options, insecure=True)
        Client(target, **options, tls=Tls(server_name="vq"))
    for here in ("localhost:1", "127.0.0.2:1,127.0.0.3:1", "unix:/run/vq.sock"):
        Client(here, token=SECRET)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_token_is_never_shown(kind, tiny, failing, latents, caplog):
    caplog.set_level(logging.DEBUG)
    client = kind(tiny.target, token=SECRET, metadata={"x": f"{SECRET}2"})
    assert SECRET not in repr(client)
    assert SECRET not in repr(client._core.config)
    copy = pickle.loads(pickle.dumps(client))  # noqa: S301
    assert copy._core.config.token == SECRET
    with Client(tiny.target, token=SECRET, retries=0) as blocking:
        tiny.script.append(failing("UNAUTHENTICATED", "no"))
        with pytest.raises(Unauthenticated) as caught:
            blocking.encode(latents(2, 4))
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(vars(caught.value))
    assert SECRET not in caplog.text


def test_a_server_that_wants_a_token(serving, put, tmp_path, connect, capsys, monkeypatch):
    tokenizer = put(tmp_path / "book.safetensors")
    secret, tokens = new_secret(), tmp_path / "tokens.toml"
    replace(tokens, f'[tokens.me]\nsha256 = "{hash_of(secret)}"\n'.encode())
    authority, files = Authority(), Folder(tmp_path)
    files.put(authority.issue())
    (tmp_path / "ca").write_bytes(authority.pem)
    server = serving(tokenizer, tokens=tokens, **files.settings())
    tls = Tls(ca=tmp_path / "ca")
    assert connect(server.target, tls=tls, token=secret).codebooks()
    for options in ({}, {"token": new_secret()}):
        with pytest.raises(Unauthenticated, match="the server needs a valid access token"):
            connect(server.target, tls=tls, **options).codebooks()
    path = tmp_path / "token"
    path.write_text(secret)
    shared = ["--target", server.target, "--tls-ca", str(tmp_path / "ca")]
    assert main(["codebooks", *shared, "--token-file", str(path)]) == 0
    assert main(["status", *shared, "--token-file", str(path)]) == 0
    bench = ["--concurrency=1", "--grid=2", "--warmup=0.1", "--window=0.1", "--max-windows=1"]
    assert main(["bench", *shared, "--token-file", str(path), *bench]) == 0
    capsys.readouterr()
    assert main(["codebooks", *shared]) == 1
    line = capsys.readouterr().err
    assert "the server needs a valid access token" in line
    assert "call with a valid VQSERVE_TOKEN or --token-file; " in line
    monkeypatch.setenv("VQSERVE_TOKEN", "not one")
    assert main(["codebooks", *shared]) == 1
    assert capsys.readouterr().err.startswith("vqserve: error: VQSERVE_TOKEN must be of 1 to 2048 letters")
