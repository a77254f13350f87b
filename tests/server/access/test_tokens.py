"""The file of tokens: what it may say, and what becomes of tokens when it changes."""

from __future__ import annotations

import hashlib
import logging
import resource
import threading
from pathlib import Path
from typing import Any

import pytest

from support.certificates import replace
from support.waiting import eventually
from vqserve.errors import Overloaded, PermissionDenied, StartError, Unauthenticated
from vqserve_server.access import Codebooks, Token, Tokens
from vqserve_server.access import files as files_module
from vqserve_server.access import tokens as tokens_module
from vqserve_server.access.rate import RowRate
from vqserve_server.access.token_file import Grant, entry, grants, hash_of, new_secret

SECRET = new_secret()
OTHER = new_secret()


def table(secret: str = SECRET, name: str = "trainer", *lines: str) -> str:
    return "\n".join((f"[tokens.{name}]", f'sha256 = "{hash_of(secret)}"', *lines, ""))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "tokens.toml"
    replace(made, table().encode())
    return made


def authenticate(tokens: Tokens, secret: str = SECRET) -> Token:
    return tokens.authenticate([("authorization", f"Bearer {secret}")], peer="192.0.2.1")


def test_a_secret_has_256_random_bits_and_only_its_hash_is_kept() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(secret.startswith("vqs_") and len(secret) == 4 + 43 for secret in secrets)
    assert hash_of("abc") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("header", ["Bearer {}", "bearer {}", "BEARER  {} "])
def test_the_token_of_a_call(path: Path, header: str) -> None:
    token = Tokens(str(path)).authenticate([("x", "y"), ("authorization", header.format(SECRET))], peer="here")
    assert token.name == "trainer"
    assert token.rate is None
    assert token.check() == Grant("trainer", hash_of(SECRET))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ([], "no token"),
        ([("authorization-bin", SECRET.encode())], "no token"),
        ([("authorization", SECRET)], "another scheme"),
        ([("authorization", f"Basic {SECRET}")], "another scheme"),
        ([("authorization", "Bearer")], "unknown token"),
        ([("authorization", f"Bearer {OTHER}")], "unknown token"),
        ([("authorization", f"Bearer {hash_of(SECRET)}")], "unknown token"),
        ([("authorization", f"Bearer {SECRET}"), ("authorization", f"Bearer {OTHER}")], "several tokens"),
        ([("authorization", f"Bearer {SECRET}")] * 2, "several tokens"),
    ],
)
def test_a_call_without_a_valid_token(
    path: Path, metadata: list[tuple[str, Any]], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Unauthenticated) as caught:
        Tokens(str(path)).authenticate(metadata, peer="192.0.2.1")
    # The caller is not told why, the log is.
    assert caught.value.message == "the server needs a valid access token"
    assert f'caller_refused peer=192.0.2.1 reason="{reason}' in caplog.text
    assert SECRET not in caplog.text
    assert OTHER not in caplog.text


def test_strangers_do_not_fill_the_log(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, now = Tokens(str(path)), [100.0]
    monkeypatch.setattr(tokens_module.time, "monotonic", lambda: now[0])
    for _ in range(1000):
        with pytest.raises(Unauthenticated):
            authenticate(tokens, OTHER)
    now[0] += 10
    with pytest.raises(Unauthenticated):
        authenticate(tokens, OTHER)
    assert [line.rpartition("calls=")[2] for line in caplog.messages] == ["1", "1000"]


def test_what_a_file_says(tmp_path: Path) -> None:
    lines = (
        'codebooks = ["faces", "audio-*"]',
        "rows_per_second = 1e6",
        "max_bytes = 1_000",
        "max_requests = 3",
        "expires = 2031-04-01",
        "admin = true",
    )
    content = (table(SECRET, '"a.b"', *lines) + table(OTHER, "all", 'codebooks = ["*"]')).encode()
    first, second = grants("x", content)
    assert (first.name, first.rows_per_second, first.max_bytes, first.max_requests) == ("a.b", 1e6, 1000, 3)
    assert first.codebooks is not None
    assert first.codebooks.patterns == ("faces", "audio-*")
    assert first.expires is not None
    assert first.expires.isoformat() == "2031-04-01T00:00:00+00:00"
    assert (first.admin, second.admin) == (True, False)
    assert second == Grant("all", hash_of(OTHER))
    [again] = grants("x", entry(first).encode())
    assert (again.codebooks or first.codebooks).patterns == first.codebooks.patterns
    assert vars(again) | {"codebooks": None} == vars(first) | {"codebooks": None}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "has no tokens: `vqserved token NAME` makes one"),
        ("[tokens", "is not valid TOML: "),
        (" vqs_0123456789\n", "is the token of a caller: the file of tokens has their hashes (`vqserved token NAME"),
        ("x = 1", "unknown entry 'x': each token is a table [tokens.NAME]"),
        ("tokens = 3", "has no tokens"),
        ("[tokens]\nx = 3", "token x: must be a table, [tokens.x]"),
        ('[tokens."ä"]', "the name 'ä' must have 1 to 64 letters, digits and . _ -"),
        ("[tokens.x]", "token x: has no sha256, the hash of the token"),
        ('[tokens.x]\nsha256 = "{where}"', "token x: sha256 must be 64 hexadecimal digits"),
        (table() + 'codebook = "{where}"', "token trainer: has the unknown entry 'codebook'; there are sha256, code"),
        (table() + '"{where}" = 1', "token trainer: has the unknown entry '{where}'"),
        (table() + 'codebooks = "faces"', "token trainer: codebooks must be a list of names and patterns"),
        (table() + "codebooks = []", "token trainer: codebooks must be a list"),
        (table() + 'codebooks = ["a/b"]', "token trainer: codebooks 'a/b' is not a name of codebooks"),
        (table() + "rows_per_second = 0", "token trainer: rows_per_second must be a number above 0"),
        (table() + "rows_per_second = nan", "token trainer: rows_per_second must be a number above 0"),
        (table() + "rows_per_second = true", "token trainer: rows_per_second must be a number above 0"),
        (table() + "max_bytes = 1.5", "token trainer: max_bytes must be an integer above 0"),
        (table() + "max_requests = 0", "token trainer: max_requests must be an integer above 0"),
        (table() + 'expires = "2031-04-01"', "token trainer: expires must be a date without quotes"),
        (table() + "expires = 2031-04-01T12:00:00", "token trainer: expires needs a time zone"),
        (table() + 'admin = "true"', "token trainer: admin must be true or false, without quotes"),
        (table() + "admin = 1", "token trainer: admin must be true or false, without quotes"),
        (table() + table(SECRET, "x"), "trainer and x are the same token"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(content)
    with pytest.raises(StartError) as caught:
        Tokens(str(path))
    assert str(caught.value).startswith(f"{path}: {problem}")
    assert SECRET not in str(caught.value)


def test_a_file_that_everybody_can_read_is_warned_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Tokens(str(path))
    assert not caplog.records
    path.chmod(0o604)
    Tokens(str(path))
    assert f'file_open_to_all path={path} holds="the hashes and limits of tokens" mode=0604' in caplog.text


def test_a_token_that_is_removed_is_revoked_for_whoever_holds_it(path: Path) -> None:
    tokens = Tokens(str(path))
    token = authenticate(tokens)
    replace(path, (table() + table(OTHER, "other")).encode())
    tokens.refresh()
    assert token.check().name == "trainer"
    assert authenticate(tokens) is token
    replace(path, table(OTHER, "other").encode())
    tokens.refresh()
    for check in (token.check, lambda: authenticate(tokens)):
        with pytest.raises(Unauthenticated):
            check()
    assert authenticate(tokens, OTHER).name == "other"


def test_another_secret_of_a_name_revokes_the_one_before(path: Path) -> None:
    tokens = Tokens(str(path))
    before = authenticate(tokens)
    replace(path, table(OTHER).encode())
    tokens.refresh()
    with pytest.raises(Unauthenticated):
        before.check()
    assert authenticate(tokens, OTHER) is not before


def test_whoever_holds_a_token_gets_its_new_limits(path: Path) -> None:
    tokens = Tokens(str(path))
    token = authenticate(tokens)
    replace(path, table(SECRET, "trainer", "rows_per_second = 5", 'codebooks = ["a"]').encode())
    tokens.refresh()
    assert token.check().codebooks is not None
    rate = token.rate
    assert rate is not None
    replace(path, table(SECRET, "trainer", "rows_per_second = 5").encode())
    tokens.refresh()
    # The rows that it has used stay used.
    assert token.rate is rate
    assert token.check().codebooks is None


def test_the_file_is_read_again_soon_after_it_has_changed(path: Path) -> None:
    tokens = Tokens(str(path))
    token = authenticate(tokens)
    replace(path, table(OTHER).encode())

    def is_revoked() -> bool:
        try:
            token.check()
        except Unauthenticated:
            return True
        return False

    eventually(is_revoked)


def test_a_broken_file_changes_nothing_and_is_logged_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = Tokens(str(path))
    for content in (b"", b"[tok", table().encode()[:40], b"\xff"):
        caplog.clear()
        replace(path, content)
        for _ in range(3):
            tokens.refresh()
        [record] = caplog.records
        assert record.levelno == logging.ERROR
        assert record.message.startswith('access_rejected what=tokens kept="the files before" error=')
        assert authenticate(tokens).name == "trainer"
    caplog.clear()
    caplog.set_level(logging.INFO)
    replace(path, table().encode())
    tokens.refresh()
    assert [record.message for record in caplog.records] == ["access_reloaded what=tokens"]
    path.unlink()
    tokens.refresh()
    assert authenticate(tokens).name == "trainer"


def test_a_change_that_cannot_be_read_at_first_is_read_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the first look notices the change.
    monkeypatch.setattr(files_module, "CLOCK_S", -3600.0)
    tokens = Tokens(str(path))
    replace(path, table(OTHER, "other").encode())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # No descriptor is left: callers can bring that about.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        tokens.refresh()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    tokens.refresh()
    assert authenticate(tokens, OTHER).name == "other"
    with pytest.raises(Unauthenticated):
        authenticate(tokens)


def test_a_file_system_that_does_not_answer_holds_up_no_call(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, answers = Tokens(str(path)), threading.Event()
    monkeypatch.setattr(tokens._watched, "may_have_changed", answers.wait)
    try:
        assert authenticate(tokens).name == "trainer"
    finally:
        answers.set()
    tokens._reader.join()


def test_a_token_expires(path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    replace(path, table(SECRET, "trainer", "expires = 2031-04-01").encode())
    tokens = Tokens(str(path))
    token = authenticate(tokens)
    # 2031-04-01, midnight UTC.
    monkeypatch.setattr(tokens_module.time, "time", lambda: 1_932_768_000.0 - 1)
    assert authenticate(tokens) is token
    monkeypatch.setattr(tokens_module.time, "time", lambda: 1_932_768_000.0)
    for check in (token.check, lambda: authenticate(tokens)):
        with pytest.raises(Unauthenticated, match="the server needs a valid access token"):
            check()
    assert "token trainer has expired" in caplog.text


@pytest.mark.parametrize(
    ("patterns", "allowed", "denied"),
    [
        (["faces"], ["faces", "faces@1", "faces@22"], ["face", "faces2", "Faces", "", "faces-2@1"]),
        (["faces@1"], ["faces@1"], ["faces", "faces@11", "faces@2"]),
        (["audio-*", "f?ces"], ["audio-", "audio-x@3", "faces", "fuces@1"], ["audio", "fces", "xaudio-"]),
        (["*-ok", "a.b"], ["x-ok", "x-ok@7", "a.b"], ["x-ok2", "acb"]),
    ],
)
def test_the_codebooks_of_a_token(patterns: list[str], allowed: list[str], denied: list[str]) -> None:
    codebooks = Codebooks(patterns)
    for _ in range(2):
        assert all(map(codebooks.allow, allowed))
        assert not any(map(codebooks.allow, denied))
    for name in denied:
        with pytest.raises(PermissionDenied, match=r"^the access token may not use codebook"):
            codebooks.check(name)


def test_names_without_end_are_neither_kept_nor_shown() -> None:
    codebooks = Codebooks(["a*"])
    for number in range(5000):
        assert codebooks.allow(f"a{number}")
    assert len(codebooks._verdicts) <= 1024
    with pytest.raises(PermissionDenied) as caught:
        codebooks.check("a" * 10_000)
    assert len(str(caught.value)) < 300


def test_the_rate_of_rows() -> None:
    now = [0.0]
    rate = RowRate(100, clock=lambda: now[0])
    rate.take(60)
    rate.take(100)
    # 60 rows too many were taken: 0.61 s until a row is there.
    with pytest.raises(Overloaded, match="the access token may send 100 rows per second") as caught:
        rate.take(1)
    assert caught.value.retry_after_s == pytest.approx(0.61)
    now[0] = 0.6
    with pytest.raises(Overloaded):
        rate.take(1)
    now[0] = 0.61
    rate.take(1000)
    now[0] = 10.0
    with pytest.raises(Overloaded):
        rate.take(1)
    rate.give_back(1000)
    rate.take(1)
    # Idle time is not saved up beyond one second.
    now[0] = 1000.0
    rate.take(101)
    with pytest.raises(Overloaded):
        rate.take(1)


def test_the_rate_holds_for_many_threads() -> None:
    now = [0.0]
    rate, taken = RowRate(1000, clock=lambda: now[0]), []

    def take() -> None:
        for _ in range(500):
            try:
                rate.take(1)
            except Overloaded:
                continue
            taken.append(1)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1000
