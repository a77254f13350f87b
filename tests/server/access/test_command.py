"""`vqserved token`: what it prints works."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vqserve_server.access import Tokens
from vqserve_server.access.token_file import Grant, hash_of
from vqserve_tools.cli import main


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        assert main(["token", *map(str, arguments)]) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def granted(path: Path, secret: str) -> Grant:
    return Tokens(str(path)).authenticate([("authorization", f"Bearer {secret}")], peer="here").check()


def test_the_entry_that_is_printed_can_be_put_into_the_file(
    command: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    out, err = command("trainer")
    assert re.fullmatch(r"vqs_[\w-]{43}\n", out)
    says, _, entry = err.partition("\n\n")
    assert says == "put this into the file of `vqserved serve --tokens FILE`:"
    path = tmp_path / "tokens.toml"
    path.write_text(entry)
    assert granted(path, out.strip()) == Grant("trainer", hash_of(out.strip()))
    assert out.strip() not in err


def test_what_a_token_may_do(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    flags = ("--codebooks", "faces", "audio-*", "--rows-per-second", "1500.5", "--max-bytes", "1000")
    more = ("--max-requests", "3", "--expires", "2131-04-01", "--file", path)
    out, err = command("a.b", *flags, *more)
    assert err == f"appended [tokens.a.b] to {path}\n"
    grant = granted(path, out.strip())
    assert grant.codebooks is not None
    assert grant.codebooks.patterns == ("faces", "audio-*")
    assert (grant.rows_per_second, grant.max_bytes, grant.max_requests) == (1500.5, 1000, 3)
    assert grant.expires is not None
    assert grant.expires.isoformat() == "2131-04-01T00:00:00+00:00"
    assert path.stat().st_mode & 0o777 == 0o600


def test_tokens_are_appended_and_what_is_there_stays(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    real, path = tmp_path / "real.toml", tmp_path / "tokens.toml"
    path.symlink_to("real.toml")
    first, _ = command("one", "--file", path)
    real.write_text("# by hand\n" + real.read_text() + "# and here")
    real.chmod(0o640)
    second, _ = command("two", "--codebooks", "*", "--file", path)
    assert path.is_symlink()
    assert real.read_text().startswith("# by hand\n")
    assert "# and here\n\n[tokens." in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o640
    assert granted(path, first.strip()).name == "one"
    assert granted(path, second.strip()) == Grant("two", hash_of(second.strip()))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["real.toml", "tokens.toml"]


def test_what_cannot_be_appended_changes_nothing(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    command("one", "--file", path)
    before = path.read_text()
    out, err = command("one", "--file", path, code=1)
    assert (out, path.read_text()) == ("", before)
    assert err == f"vqserved: error: {path} has a token one: choose another name, or remove that one first\n"
    path.write_text("[tok")
    out, err = command("two", "--file", path, code=1)
    assert (out, path.read_text()) == ("", "[tok")
    assert err.startswith(f"vqserved: error: {path}: is not valid TOML")
    out, err = command("two", "--file", tmp_path / "no" / "tokens.toml", code=1)
    assert (out, err) == ("", f"vqserved: error: there is no folder {tmp_path / 'no'}\n")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["a/b"], "the name 'a/b' must have 1 to 64 letters, digits and . _ -"),
        (["x", "--codebooks", "a/b"], "'a/b' is not a name of codebooks"),
        (["x", "--rows-per-second", "0"], "must be a number above 0, not '0'"),
        (["x", "--rows-per-second", "nan"], "must be a number above 0, not 'nan'"),
        (["x", "--max-bytes", "-1"], "must be an integer above 0, not '-1'"),
        (["x", "--max-requests", "1.5"], "must be an integer above 0, not '1.5'"),
        (["x", "--expires", "soon"], "must be a date, such as 2031-04-01, not 'soon'"),
    ],
)
def test_wrong_usage(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["token", *arguments])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert problem in captured.err
    assert captured.out == ""


def test_many_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"

    def make(number: int) -> None:
        arguments = [sys.executable, "-m", "vqserve_tools", "token", f"t{number}", "--file", str(path)]
        subprocess.run(arguments, check=True, capture_output=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(8)))
    assert sorted(tomllib.loads(path.read_text())["tokens"]) == [f"t{number}" for number in range(8)]
