"""The server's certificates: what is good, what is refused with a line that names the file, and how they change."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from support.certificates import Authority, Folder, replace
from vqserve.errors import StartError
from vqserve_server.access import ServerCertificates
from vqserve_server.access import certificates as certificates_module
from vqserve_server.access import files as files_module
from vqserve_server.config import AccessConfig


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def folder(tmp_path: Path, authority: Authority) -> Folder:
    made = Folder(tmp_path)
    made.put(authority.issue())
    replace(made.client_ca, authority.pem)
    return made


def load(folder: Folder, *, mutual: bool = True) -> ServerCertificates:
    client_ca = str(folder.client_ca) if mutual else ""
    return ServerCertificates(AccessConfig(tls_cert=str(folder.cert), tls_key=str(folder.key), tls_client_ca=client_ca))


def refused(folder: Folder) -> str:
    with pytest.raises(StartError) as caught:
        load(folder)
    return str(caught.value)


def test_good_files(folder: Folder, authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    pair = authority.issue(days=90)
    folder.put(pair)
    with caplog.at_level(logging.INFO):
        found = load(folder).value
    assert (found.chain.split(), found.key.split()) == (pair.chain.split(), pair.key.split())
    assert found.client_ca is not None
    assert found.client_ca.split() == authority.pem.split()
    assert abs(found.expires - datetime.now(UTC) - timedelta(days=90)) < timedelta(hours=1)
    assert "certificate_expires" in caplog.text
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert load(folder, mutual=False).value.client_ca is None


def test_text_around_the_certificates_and_key_is_left_out(folder: Folder, authority: Authority) -> None:
    pair = authority.issue()
    folder.cert.write_bytes("Bag Attributes: é\n".encode() + pair.key + pair.chain + b"end\n")
    replace(folder.key, b"\xff\n" + pair.chain + pair.key)
    found = load(folder).value
    assert (found.chain.split(), found.key.split()) == (pair.chain.split(), pair.key.split())


def test_a_key_of_another_certificate(folder: Folder, authority: Authority) -> None:
    replace(folder.key, authority.issue().key)
    assert refused(folder) == f"{folder.key}: is not the key of the certificate {folder.cert}"


def test_a_certificate_that_has_expired(folder: Folder, authority: Authority) -> None:
    folder.put(authority.issue(days=-1))
    day = datetime.now(UTC) - timedelta(days=1)
    assert refused(folder) == f"{folder.cert}: the certificate expired on {day:%Y-%m-%d}: renew it"


def test_a_certificate_that_expires_soon(
    folder: Folder, authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put(authority.issue(days=13.5))
    found = load(folder)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"certificate_expires path={folder.cert} expires=")
    assert record.message.endswith(" days=13")
    caplog.clear()
    found.refresh()
    assert not caplog.records
    monkeypatch.setattr(certificates_module.time, "monotonic", lambda: float("inf"))
    found.refresh()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def test_an_encrypted_key(folder: Folder) -> None:
    openssl("pkcs8", "-topk8", "-in", str(folder.key), "-out", f"{folder.key}.new", "-passout", "pass:x")
    replace(folder.key, Path(f"{folder.key}.new").read_bytes())
    assert "the private key is encrypted" in refused(folder)


@pytest.mark.parametrize("kind", [("rsa:2048",), ("ec", "-pkeyopt", "ec_paramgen_curve:P-256")])
@pytest.mark.parametrize("days", ["30", "20000"])
def test_certificates_of_openssl(folder: Folder, kind: tuple[str, ...], days: str) -> None:
    # The year of the second has four digits.
    out = ("-keyout", str(folder.key), "-out", str(folder.cert), "-subj", "/CN=localhost", "-days", days)
    openssl("req", "-x509", "-nodes", "-newkey", *kind, *out)
    expires = load(folder).value.expires
    assert abs(expires - datetime.now(UTC) - timedelta(days=int(days))) < timedelta(hours=1)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("server.crt", b"", "has no certificate in PEM form"),
        ("server.key", b"", "has no private key in PEM form"),
        ("clients.crt", b"", "has no certificate in PEM form"),
        (
            "server.crt",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "cannot be used for TLS: ",
        ),
        (
            "server.key",
            b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
            "cannot be used for TLS: ",
        ),
        (
            "clients.crt",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "has a certificate that cannot be used",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(folder: Folder, name: str, content: bytes, problem: str) -> None:
    (folder.path / name).write_bytes(content)
    said = refused(folder)
    assert str(folder.path / name) in said
    assert problem in said


def test_a_file_that_cannot_be_read_is_named(folder: Folder) -> None:
    folder.key.unlink()
    assert refused(folder) == f"{folder.key}: there is no such file"
    folder.key.mkdir()
    assert refused(folder) == f"{folder.key}: there is no such file"
    folder.key.rmdir()
    folder.key.write_bytes(b"x" * (4 << 20) + b"x")
    assert "has more than 4194304 bytes" in refused(folder)


def test_a_key_that_everybody_can_read_is_warned_of(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.key.chmod(0o644)
    load(folder)
    assert f'file_open_to_all path={folder.key} holds="the private key" mode=0644' in caplog.text


BROKEN: dict[str, Callable[[Folder, Authority], object]] = {
    "another key": lambda folder, authority: replace(folder.key, authority.issue().key),
    "half of the certificate": lambda folder, authority: folder.cert.write_bytes(authority.issue().chain[:200]),
    "no certificate": lambda folder, _: folder.cert.unlink(),
    "an empty key": lambda folder, _: replace(folder.key, b""),
    "an expired one": lambda folder, authority: folder.put(authority.issue(days=-3)),
    "no authority": lambda folder, _: replace(folder.client_ca, b""),
}


@pytest.mark.parametrize("way", BROKEN)
def test_what_is_broken_later_changes_nothing_and_is_logged_once(
    folder: Folder, authority: Authority, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    found = load(folder)
    before = found.value
    caplog.clear()
    BROKEN[way](folder, authority)
    for _ in range(3):
        assert found.refresh() is before
    assert [record.message.split()[0] for record in caplog.records] == ["access_rejected"]
    assert caplog.records[0].levelname == "ERROR"
    pair = authority.issue()
    folder.put(pair)
    replace(folder.client_ca, authority.pem)
    assert found.refresh().chain.split() == pair.chain.split()


def test_the_exchange_of_a_link_is_noticed(tmp_path: Path, authority: Authority) -> None:
    # As Kubernetes changes a mounted Secret: ..data leads to another folder from one moment to the next.
    pairs = [authority.issue(), authority.issue()]
    for number, pair in enumerate(pairs):
        one = Folder(tmp_path / f"..{number}")
        one.path.mkdir()
        one.put(pair)
    data = tmp_path / "..data"
    data.symlink_to("..0")
    for name in ("server.crt", "server.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    found = load(Folder(tmp_path), mutual=False)
    (tmp_path / "..new").symlink_to("..1")
    os.replace(tmp_path / "..new", data)  # noqa: PTH105
    assert found.refresh().chain.split() == pairs[1].chain.split()


def test_a_change_within_the_clock_s_resolution_is_noticed(folder: Folder, authority: Authority) -> None:
    found = load(folder)
    status = folder.client_ca.stat()
    other = Authority().pem
    folder.client_ca.write_bytes(authority.pem.rstrip() + b"\n" * (len(other) - len(authority.pem.rstrip())))
    found.refresh()
    folder.client_ca.write_bytes(other)
    os.utime(folder.client_ca, ns=(status.st_mtime_ns, status.st_mtime_ns))
    changed = found.refresh().client_ca
    assert changed is not None
    assert changed.split() == other.split()


def test_files_that_did_not_change_are_not_read_again(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(folder)
    monkeypatch.setattr(files_module.time, "time", lambda: datetime.now(UTC).timestamp() + 10)
    monkeypatch.setattr(files_module, "_content", lambda path: pytest.fail(f"{path} was read"))
    assert found.refresh() is found.value


def test_a_change_between_two_reads_is_read_again(
    folder: Folder, authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = load(folder)
    pair, read = authority.issue(), files_module._content
    replace(folder.cert, pair.chain)

    def content(path: Path) -> bytes:
        before = read(path)
        # The old key is read, then somebody replaces it.
        if path == folder.key and before != pair.key:
            replace(folder.key, pair.key)
        return before

    monkeypatch.setattr(files_module, "_content", content)
    caplog.clear()
    assert found.refresh().key.split() == pair.key.split()
    assert "access_rejected" not in caplog.text
