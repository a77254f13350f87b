"""Encrypted connections, with real certificates, to real servers; and what is said when they cannot be made."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import grpc
import pytest

from support.certificates import Authority, Folder, replace
from support.names import name_server
from support.waiting import eventually
from vqserve_client import AsyncClient, Client, InvalidOption, Tls, Unavailable
from vqserve_client.cli import main
from vqserve_client.status import Failure

NOT_TRUSTED = "the server's certificate is not from an authority that this client trusts"


class Secure:
    """A server with TLS, and the files of an authority, of its clients' authority, and of a client."""

    def __init__(self, serving, tokenizer, folder, pair, *, mutual=False):
        self.clients = Authority()
        files = Folder(folder)
        files.put(pair)
        replace(files.client_ca, self.clients.pem)
        self.server = serving(tokenizer, **files.settings(mutual=mutual))
        self.target = self.server.target
        self.folder = folder

    def certificate(self, authority=None, **validity):
        """Write a client's certificate and key; return their paths as arguments of Tls."""
        pair = (authority or self.clients).issue("client", **validity)
        cert, key = self.folder / "client.crt", self.folder / "client.key"
        replace(cert, pair.chain)
        replace(key, pair.key)
        return {"cert": cert, "key": key}


@pytest.fixture
def authority(tmp_path):
    made = Authority()
    made.path = tmp_path / "authority.crt"
    made.path.write_bytes(made.pem)
    return made


@pytest.fixture
def secure(serving, put, tmp_path):
    """Start a server that has this certificate: secure(pair, mutual=False) -> Secure."""
    tokenizer = put(tmp_path / "book.safetensors")
    return lambda pair, **how: Secure(serving, tokenizer, tmp_path, pair, **how)


def refused(connect, target, cause, **options):
    """Check that a connection is refused for this cause, in one short line, and return the line."""
    with pytest.raises(Unavailable) as caught:
        connect(target, retries=0, timeout=60, **options).codebooks()
    assert caught.value.message == f"cannot connect to the server: {cause}"
    line = str(caught.value)
    assert len(line) < 400
    assert line.isprintable()
    assert "SSL" not in line
    return line


def test_encode_over_tls(secure, authority, connect, latents):
    server = secure(authority.issue())
    client = connect(server.target, tls=Tls(ca=authority.path))
    assert client.encode(latents(3, 4)).shape == (3,)
    assert len(list(client.encode_many([latents(3, 4)] * 5))) == 5


def test_an_authority_that_is_not_trusted(secure, authority, connect, tmp_path):
    server = secure(authority.issue())
    other = tmp_path / "other.crt"
    other.write_bytes(Authority().pem)
    line = refused(connect, server.target, NOT_TRUSTED, tls=Tls(ca=other))
    assert "Tls(ca=...), --tls-ca or VQSERVE_TLS_CA" in line


def test_the_authorities_of_the_system(secure, authority, connect, monkeypatch):
    server = secure(authority.issue())
    refused(connect, server.target, NOT_TRUSTED, tls=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
    assert connect(server.target, tls=True).codebooks()


def test_a_certificate_that_has_expired(serve_tiny, authority, connect):
    """Of another server: `vqserved` does not start with one."""
    pair = authority.issue(days=-1)
    server = serve_tiny(credentials=grpc.ssl_server_credentials([(pair.key, pair.chain)]))
    refused(connect, server.target, "the server's certificate has expired", tls=Tls(ca=authority.path))


def test_a_certificate_that_is_not_valid_yet(secure, authority, connect):
    server = secure(authority.issue(days=1100))
    line = refused(connect, server.target, "the server's certificate is not valid yet", tls=Tls(ca=authority.path))
    assert line.endswith("is the clock of this machine right?")


def test_a_certificate_for_another_name(secure, authority, connect):
    server = secure(authority.issue("vq.example"))
    another = "the server's certificate is for another name"
    refused(connect, server.target, another, tls=Tls(ca=authority.path))
    refused(connect, server.target, another, tls=Tls(ca=authority.path, server_name="other.example"))
    assert connect(server.target, tls=Tls(ca=authority.path, server_name="vq.example")).codebooks()
    several = f"{server.target},127.0.0.1:1"
    assert connect(several, tls=Tls(ca=authority.path, server_name="vq.example")).codebooks()
    # Without it, each server of a list is to have its own name.
    with pytest.raises(Unavailable):
        connect(several, retries=0, tls=Tls(ca=authority.path)).codebooks()


def test_servers_of_a_name_are_held_to_the_name(secure, authority, connect, latents):
    with name_server("127.0.0.1", "127.0.0.2") as names:
        server = secure(authority.issue("replicas.test"))
        client = connect(names.target(server.target.rpartition(":")[2]), tls=Tls(ca=authority.path))

        def is_connected_by_address():
            client.encode(latents(2, 4))
            return client._core.pool.size == 2 and client._core.pool.has_other(())

        eventually(is_connected_by_address)
        assert client.encode(latents(2, 4)).shape == (2,)


def test_a_server_without_tls(tiny, authority, connect):
    line = refused(connect, tiny.target, "the server does not use TLS", tls=Tls(ca=authority.path))
    assert line.endswith("connect without tls=, or give the server a certificate")


@pytest.mark.parametrize("is_encrypted", [True, False])
def test_what_listens_on_one_of_two_addresses_of_a_name(is_encrypted):
    """Nothing listens on ::1 of localhost, which gRPC may try last: the first failure says more."""
    listens = (
        "SSL_ERROR_SSL: error:100000f7:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER: OK"
        if is_encrypted
        else "UNAVAILABLE: ipv4:127.0.0.1:1: Socket closed"
    )
    refused_last = "UNKNOWN: ipv6:%5B::1%5D:1: Failed to connect to remote host: Connection refused"
    for error, says_more in ((listens, True), (refused_last, False)):
        details = f"failed to connect to all addresses; last error: {error}"
        failure = Failure(grpc.StatusCode.UNAVAILABLE, details, {}, is_encrypted=is_encrypted)
        assert failure.is_misunderstood is says_more


def test_a_client_without_tls(secure, authority, connect):
    server = secure(authority.issue())
    line = refused(connect, server.target, "the server closed it")
    assert line.endswith("does it use TLS? then connect with tls=")


def test_a_certificate_of_the_client(secure, authority, connect):
    server = secure(authority.issue(), mutual=True)
    tls = Tls(ca=authority.path, **server.certificate())
    assert connect(server.target, tls=tls).codebooks()


def test_a_certificate_of_the_client_that_is_renewed(secure, authority, connect, latents):
    """The client notices at its next connection, which the server refuses with the old one."""
    server = secure(authority.issue(), mutual=True)
    tls = Tls(ca=authority.path, **server.certificate(days=-1))
    client = connect(server.target, tls=tls, timeout=60)
    with pytest.raises(Unavailable, match="the server closed it"):
        client.encode(latents(2, 4))
    new = server.clients.issue("client")
    # One file after the other: in between they do not fit.
    replace(server.folder / "client.key", new.key)
    with pytest.raises(Unavailable, match="the server closed it"):
        client.encode(latents(2, 4))
    replace(server.folder / "client.crt", new.chain)
    assert client.encode(latents(2, 4)).shape == (2,)


def test_an_authority_that_is_replaced(secure, authority, connect, latents):
    server = secure(authority.issue())
    new = Authority()
    client = connect(server.target, tls=Tls(ca=authority.path))
    assert client.encode(latents(2, 4)).shape == (2,)
    replace(authority.path, authority.pem + new.pem)
    # The connection that is open stays.
    opened = client._core.pool.pick(0).channel()
    assert client.encode(latents(2, 4)).shape == (2,)
    assert client._core.pool.pick(0).channel() is opened


@pytest.mark.parametrize("how", ["none", "another authority", "expired"])
def test_a_client_without_the_right_certificate(secure, authority, connect, how):
    server = secure(authority.issue(), mutual=True)
    given = {
        "none": dict,
        "another authority": lambda: server.certificate(Authority()),
        "expired": lambda: server.certificate(days=-1),
    }[how]()
    line = refused(connect, server.target, "the server closed it", tls=Tls(ca=authority.path, **given))
    assert "does it ask for a client certificate, of an authority that it trusts? Tls(cert=..., key=...)" in line


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: {"ca": folder / "missing"}, r"tls: cannot read '.*missing': No such file or directory"),
        (lambda folder: {"ca": folder / "text"}, r"tls: '.*text' is not a certificate in PEM format"),
        (lambda folder: {"cert": folder / "client.crt"}, "tls needs both, the client's certificate and its key"),
        (
            lambda folder: {"cert": folder / "client.crt", "key": folder / "text"},
            r"tls: '.*client.crt' is not a certificate in PEM format whose private key, not encrypted, is '.*text'",
        ),
        (
            lambda folder: {"cert": folder / "client.crt", "key": folder / "other.key"},
            r"tls: '.*client.crt' is not a certificate in PEM format whose private key",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path, make, text):
    pair = Authority().issue("client")
    (tmp_path / "client.crt").write_bytes(pair.chain)
    (tmp_path / "other.key").write_bytes(Authority().issue("client").key)
    (tmp_path / "text").write_text("no certificate")
    with pytest.raises(InvalidOption) as caught:
        Client("localhost:1", tls=Tls(**make(tmp_path)))
    assert re.match(text, str(caught.value))


@pytest.mark.parametrize("tls", ["yes", 1, {"ca": "x"}])
def test_what_is_no_tls(tls):
    with pytest.raises(TypeError, match="tls must be True, False or a Tls, not"):
        Client("localhost:1", tls=tls)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_pickle_has_it(secure, authority, kind):
    server = secure(authority.issue())
    with Client(server.target, tls=Tls(ca=authority.path)) as client:
        copy = pickle.loads(pickle.dumps(client))  # noqa: S301
    with copy:
        assert copy.codebooks()
    made = pickle.loads(pickle.dumps(kind(server.target, tls=Tls(ca=authority.path))))  # noqa: S301
    assert made._core.config.tls == Tls(ca=str(authority.path))


def test_the_environment(secure, authority, monkeypatch):
    server = secure(authority.issue(), mutual=True)
    own = server.certificate()
    # Certificate and key alone do not switch it on: a server may be meant.
    monkeypatch.setenv("VQSERVE_TLS_CERT", str(own["cert"]))
    monkeypatch.setenv("VQSERVE_TLS_KEY", str(own["key"]))
    assert Client(server.target)._core.config.tls is None
    monkeypatch.setenv("VQSERVE_TLS_CA", str(authority.path))
    with Client(server.target) as client:
        assert client.codebooks()
    assert Client(server.target, tls=False)._core.config.tls is None
    monkeypatch.setenv("VQSERVE_TLS", "off")
    assert Client(server.target)._core.config.tls is None
    monkeypatch.setenv("VQSERVE_TLS", "perhaps")
    with pytest.raises(InvalidOption, match="VQSERVE_TLS must be on or off, not 'perhaps'"):
        Client(server.target)


def test_the_command_line(secure, authority, monkeypatch, capsys, tmp_path):
    server = secure(authority.issue(), mutual=True)
    own = [f"--tls-{name}={path}" for name, path in server.certificate().items()]
    trusted = ["--target", server.target, "--tls-ca", str(authority.path)]
    bench = ["--concurrency", "1", "--grid", "2", "--warmup", "0.1", "--window", "0.1", "--max-windows", "1"]
    for command, *more in (["status"], ["codebooks"], ["bench", *bench], ["bench", "--streams", "1", *bench]):
        assert main([command, *trusted, *own, *more]) == 0
    capsys.readouterr()
    assert main(["codebooks", *trusted]) == 1
    assert (
        "does it ask for a client certificate, of an authority that it trusts? Tls(cert=..., key=...), --tls-cert"
        in capsys.readouterr().err
    )
    assert main(["codebooks", *trusted, own[0]]) == 1
    assert capsys.readouterr().err == (
        "vqserve: error: --tls needs both, the client's certificate and its key: "
        "Tls(cert=..., key=...), --tls-cert and --tls-key\n"
    )
    monkeypatch.setenv("VQSERVE_TLS_CA", str(authority.path))
    assert main(["codebooks", "--target", server.target, *own]) == 0
    assert main(["codebooks", "--target", server.target, "--no-tls"]) == 1
    assert capsys.readouterr().err.endswith("does it use TLS? then connect with --tls\n")


def test_an_error_is_one_line_without_grpc_s_own(secure, authority, tmp_path):
    server = secure(authority.issue())
    other = tmp_path / "other.crt"
    other.write_bytes(Authority().pem)
    arguments = ["codebooks", "--target", server.target, "--tls-ca", str(other)]
    ended = subprocess.run(
        [sys.executable, "-m", "vqserve", *arguments], capture_output=True, text=True, timeout=200, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"vqserve: error: cannot connect to the server: {NOT_TRUSTED}")
    assert ended.stderr.count("\n") == 1
