"""`vqserved serve --check` and `--print-config`: what would be served, and what keeps it from being served."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.certificates import Authority, Folder, replace
from vqserve_server.access.token_file import hash_of, new_secret


def test_what_would_be_served(run_vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path) -> None:
    flat, one = put(tmp_path / "books" / "flat.safetensors"), put(tmp_path / "books" / "book" / "1.safetensors", seed=1)
    (tmp_path / "vqserve.toml").write_text('codebooks = ["books"]\nhost = "127.0.0.1"\ndrain_seconds = 5\n')
    with socket.socket() as taken:
        # A server may be running there: the check listens nowhere.
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = tmp_path / "vqserve.toml"
        done = run_vqserved("serve", "--check", "--config", path, "--port", port, VQSERVE_DEVICE="cpu")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines == [
        "settings (the others have their defaults):",
        f"host 127.0.0.1 from {path}",
        f"port {port} from --port",
        # Of the environment of all tests.
        "metrics_port 0 from VQSERVE_METRICS_PORT",
        "device cpu from VQSERVE_DEVICE",
        f"drain_seconds 5.0 from {path}",
        f"codebooks {tmp_path / 'books'} from {path}",
        "codebooks:",
        f"book@1 vq 40 x 4 {one.digest[:12]} {one.search} on cpu {tmp_path / 'books' / 'book' / '1.safetensors'}",
        f"flat vq 40 x 4 {flat.digest[:12]} {flat.search} on cpu {tmp_path / 'books' / 'flat.safetensors'}",
        f"would serve 2 codebooks on 127.0.0.1:{port}",
    ]


def test_every_problem_is_reported(run_vqserved: Callable[..., Any], put: Callable[..., Any], tmp_path: Path) -> None:
    put(tmp_path / "books" / "good.safetensors")
    for name in ("bad", "worse"):
        (tmp_path / "books" / f"{name}.safetensors").write_bytes(b"half")
    words = ("--tls-cert", tmp_path / "no.crt", "--tls-key", tmp_path / "no.key")
    done = run_vqserved(
        "serve", "--check", *words, "--unix-socket", "/nowhere/s", tmp_path / "books", tmp_path / "lost"
    )
    assert done.returncode == 1
    assert done.stdout.endswith("would not start: 5 problems\n")
    assert "  good  vq" in done.stdout
    socket_file, certificate, source, *files = done.stderr.splitlines()
    assert socket_file == "vqserved: error: cannot listen on /nowhere/s: there is no folder /nowhere"
    assert certificate == f"vqserved: error: {tmp_path / 'no.crt'}: there is no such file"
    assert source == f"vqserved: error: no such file or folder: {tmp_path / 'lost'}"
    for name, line in zip(("bad", "worse"), files, strict=True):
        assert line.startswith(f"vqserved: error: {tmp_path / 'books' / name}.safetensors: the codebook cannot be used")


def test_what_the_network_would_reach(run_vqserved: Callable[..., Any]) -> None:
    done = run_vqserved("serve", "--check", "--host", "0.0.0.0")  # noqa: S104
    assert done.returncode == 1
    assert "vqserved: error: 0.0.0.0 can be reached by other machines" in done.stderr


def test_certificates_and_tokens(run_vqserved: Callable[..., Any], tmp_path: Path) -> None:
    files = Folder(tmp_path)
    files.put(Authority().issue("vq.example"))
    secret = new_secret()
    old = f'[tokens.old]\nsha256 = "{hash_of(new_secret())}"\nexpires = 2021-04-01\n'
    replace(tmp_path / "tokens.toml", f'[tokens.me]\nsha256 = "{hash_of(secret)}"\n{old}'.encode())
    environ = {f"VQSERVE_{name.upper()}": str(value) for name, value in files.settings().items()}
    done = run_vqserved("serve", "--check", "--tokens", tmp_path / "tokens.toml", **environ)
    assert done.returncode == 0
    assert "certificate: expires 20" in done.stdout
    assert "access tokens: me, old (expired)\n" in done.stdout
    assert secret not in done.stdout + done.stderr


def test_a_printed_file_can_be_used(run_vqserved: Callable[..., Any], tmp_path: Path) -> None:
    done = run_vqserved("serve", "--print-config", "--port", 0, "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "vqserve.toml").write_text(done.stdout)
    check = run_vqserved("serve", "--check", "--config", tmp_path / "vqserve.toml")
    assert check.returncode == 0
    lines = [line.split() for line in check.stdout.splitlines()]
    assert ["port", "0", "from", str(tmp_path / "vqserve.toml")] in lines


def test_traces_need_their_packages(run_vqserved: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "opentelemetry.py").write_text("raise ModuleNotFoundError(name='opentelemetry')\n")
    words = ("serve", "--check", "--device", "cpu", "--trace-endpoint", "http://127.0.0.1:9")
    done = run_vqserved(*words, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout[-27:]) == (1, "would not start: 1 problem\n")
    assert done.stderr == "vqserved: error: opentelemetry is not installed: pip install 'vqserve[trace]'\n"
