"""The command line, end to end against a tiny server."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from support.waiting import eventually
from vqserve_client import Client, __version__
from vqserve_client.cli import main


@pytest.fixture
def vqserve(tiny, monkeypatch, capsys):
    """Run a command in this process: vqserve("encode", ...) -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("VQSERVE_TARGET", tiny.target)
    monkeypatch.delenv("VQSERVE_CODEBOOK", raising=False)

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def files(tmp_path, latents):
    """A file of latents, and where the indices and the latents made of them shall go."""
    np.save(tmp_path / "in.npy", latents(20, 4, 32, 32))
    return tmp_path / "in.npy", tmp_path / "indices.npy", tmp_path / "out.npy"


@pytest.mark.usefixtures("apart")
def test_there_and_back(vqserve, tiny, files, monkeypatch):
    # Pieces of 4096 bytes, so that this small file is cut inside its items.
    monkeypatch.setattr("vqserve_client.conversion.PIECE_BYTES", 4096)
    source, middle, target = files
    said = f"20x32x32 uint16, codebook small, digest {tiny.codes['small'].info.digest}"
    assert vqserve("encode", source, "-o", middle) == (0, "", f"wrote {middle}: {said}\n")
    with Client(tiny.target) as client:
        indices = client.encode(np.load(source))
        assert np.load(middle).dtype == np.uint16
        assert (np.load(middle) == indices).all()
        assert len(tiny.requests) > 20
        for arguments, options in (
            ([], {}),
            (["--dtype", "float16"], {"dtype": "float16"}),
            (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
            (["--output", "code_rows"], {"output": "code_rows"}),
            (["--layout", "channels_last"], {"layout": "channels_last"}),
        ):
            assert vqserve("decode", middle, "-o", target, "--force", "--quiet", *arguments) == (0, "", "")
            decoded = np.load(target)
            expected = client.decode(indices, **options)
            assert decoded.dtype == expected.dtype
            assert (decoded == expected).all()
    assert sorted(path.name for path in source.parent.iterdir()) == [
        "in.npy",
        "indices.npy",
        "indices.npy.json",
        "out.npy",
    ]


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3, 3), (2, 4, 0, 3)])
def test_files_without_a_token(vqserve, tmp_path, shape):
    np.save(tmp_path / "in.npy", np.empty(shape, np.float32))
    assert vqserve("encode", tmp_path / "in.npy", "-o", tmp_path / "i.npy")[0] == 0
    assert vqserve("decode", tmp_path / "i.npy", "-o", tmp_path / "out.npy")[0] == 0
    assert np.load(tmp_path / "out.npy").size == 0


def test_fortran_and_big_endian_files(vqserve, tiny, tmp_path, latents):
    array = latents(5, 4, 3, 3)
    np.save(tmp_path / "in.npy", np.asfortranarray(array.astype(">f4")))
    assert vqserve("encode", tmp_path / "in.npy", "-o", tmp_path / "i.npy")[0] == 0
    with Client(tiny.target) as client:
        assert (np.load(tmp_path / "i.npy") == client.encode(array)).all()


def test_what_is_no_file_is_kept(vqserve, tiny, files, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code, out, err = vqserve("encode", files[0], "-o", pipe, "--force")
    assert (code, out) == (1, "")
    assert one_line(err)
    assert "is a device or a pipe" in err
    (tmp_path / "text.txt").write_text("kept")
    code, _, err = vqserve("encode", files[0], "-o", tmp_path / "text.txt", "--force")
    assert code == 1
    assert "is a file: name a folder, or NAME.npy" in err
    assert (tmp_path / "text.txt").read_text() == "kept"
    assert pipe.is_fifo()
    assert tiny.requests == []


def test_an_existing_file_is_kept(vqserve, tiny, files):
    source, middle, _ = files
    middle.write_text("precious")
    code, out, err = vqserve("encode", source, "-o", middle)
    assert (code, out) == (1, "")
    assert "exists: --force replaces it" in err
    assert middle.read_text() == "precious"
    assert tiny.requests == []
    assert vqserve("encode", source, "-o", middle, "--force")[0] == 0


def test_a_file_is_not_written_over_itself(vqserve, tiny, files):
    source, middle, _ = files
    before = source.read_bytes()
    middle.symlink_to(source)
    for target in (source, source.parent / "." / source.name, middle):
        for command in ("encode", "decode"):
            code, _, err = vqserve(command, source, "-o", target, "--force")
            assert code == 1
            assert f"{target} is what is read" in err
    assert source.read_bytes() == before
    assert tiny.requests == []


def test_errors_name_flags_where_the_sdk_names_options(vqserve, tiny, serve_tiny, codes, files, failing, monkeypatch):
    source, middle, _ = files
    two = serve_tiny(codes("a"), codes("b"))
    _, _, err = vqserve("encode", source, "-o", middle, "--target", two.target)
    assert "2 codebooks are served, choose one with --codebook: a, b (server" in err
    assert "lists what is served" not in err
    tiny.script.append(failing("RESOURCE_EXHAUSTED", "Received message larger than max (9 vs. 4)"))
    assert "set a larger --max-message-bytes on both" in vqserve("encode", source, "-o", middle)[2]
    assert "pin that digest with --digest" in vqserve("encode", source, "-o", middle, "--digest", "0" * 64)[2]
    np.save(source, np.zeros((2, 3, 3, 4), np.float32))
    assert "should it be --layout channels_last?" in vqserve("encode", source, "-o", middle)[2]
    assert "`vqserve codebooks --json` has them" in vqserve("encode", source, "-o", middle, "--digest", "12ab")[2]
    monkeypatch.setenv("VQSERVE_TARGET", "foo")
    assert "argument --target: VQSERVE_TARGET: target must be HOST:PORT" in vqserve("status")[2]


def test_a_server_that_takes_small_messages_only(vqserve, tiny, serve_tiny, codes, files):
    source, middle, _ = files
    small = serve_tiny(codes("small"), **{"grpc.max_receive_message_length": 20_000})
    status, _, err = vqserve("encode", source, "-o", middle, "--target", small.target)
    assert status == 1
    assert "larger than the server's limit of 20000 bytes" in err
    assert "set --max-message-bytes 20000 in the client, or start the server" in err
    assert vqserve("encode", source, "-o", middle, "--target", small.target, "--max-message-bytes", 20_000)[0] == 0
    with Client(tiny.target) as client:
        assert (np.load(middle) == client.encode(np.load(source))).all()


def test_one_image_that_would_pass_for_sequences(vqserve, files, latents):
    source, middle, _ = files
    np.save(source, latents(4, 9, 4))
    for more, said in (((), 1), (("--layout", "channels_last"), 0)):
        _, _, err = vqserve("encode", source, "-o", middle, "--force", *more)
        warning = "vqserve: warning: latents of shape (4, 9, 4) are read as (b, s, C); if they are one image"
        assert err.count(warning) == err.count("pass --layout channels_last") == said
    np.save(source, latents(4, 9, 5))
    assert "is the batch axis missing? pass --unbatched" in vqserve("encode", source, "-o", middle, "--force")[2]


def test_a_server_that_is_back_in_a_while(vqserve, tiny, files, failing):
    source, middle, _ = files
    tiny.script += [failing("UNAVAILABLE", "gone")] * 5
    assert vqserve("encode", source, "-o", middle, "--retries", 0)[0] == 1
    assert vqserve("encode", source, "-o", middle, "--retries", 9)[0] == 0


def one_line(err):
    return err.startswith("vqserve: error: ") and err.count("\n") == 1 and err.endswith("\n")


def test_errors_are_one_line_and_leave_nothing_behind(vqserve, tiny, failing, files, tmp_path, latents):
    source, middle, _ = files
    (tmp_path / "text.npy").write_text("text")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "wide.npy", latents(2, 5))
    np.save(tmp_path / "scalar.npy", np.float32(1))
    np.savez(tmp_path / "many.npz", a=latents(2, 4))
    (tmp_path / "short.npy").write_bytes(source.read_bytes()[:-10])
    before = {path.name for path in tmp_path.iterdir()}
    for wrong, text in (
        ("missing.npy", "missing.npy: there is no such file"),
        ("text.npy", "not a .npy file"),
        ("objects.npy", "not a .npy file of numbers"),
        ("many.npz", "not a .npy file"),
        ("short.npy", "not a .npy file of numbers"),
        ("wide.npy", "5 channels"),
        ("scalar.npy", "2 to 5 axes"),
    ):
        code, out, err = vqserve("encode", tmp_path / wrong, "-o", middle)
        assert (code, out) == (1, ""), wrong
        assert one_line(err), err
        assert text in err
    assert "int64" in vqserve("encode", save(tmp_path, np.arange(4)), "-o", middle)[2]
    assert "float32" in vqserve("decode", source, "-o", middle)[2]
    assert "no folder" in vqserve("encode", source, "-o", tmp_path / "nowhere" / "x.npy")[2]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "is not empty" in vqserve("encode", source, "-o", tmp_path / "full")[2]
    assert "no codebook 'x' is served" in vqserve("encode", source, "-o", middle, "--codebook", "x")[2]
    assert "codebook 'small' has digest" in vqserve("encode", source, "-o", middle, "--digest", "0" * 64)[2]
    tiny.script.append(failing("INTERNAL", "line\nline\x1b[31m"))
    code, _, err = vqserve("encode", source, "-o", middle)
    assert code == 1
    assert one_line(err)
    assert "array 0" not in err
    assert "line" in err
    assert "\x1b" not in err
    assert {path.name for path in tmp_path.iterdir()} == before | {"saved.npy", "full"}


def save(folder, array):
    np.save(folder / "saved.npy", array)
    return folder / "saved.npy"


def test_a_server_that_is_not_there(vqserve, files):
    code, out, err = vqserve("codebooks", "--target", "127.0.0.1:1")
    assert (code, out) == (1, "")
    assert one_line(err)
    assert "is the server running" in err


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["encode"],
        ["encode", "in.npy"],
        ["encode", "in.npy", "-o", "x", "--timeout", "0"],
        ["encode", "in.npy", "-o", "x", "--digest", "abc"],
        ["decode", "in.npy", "-o", "x", "--dtype", "int8"],
        ["codebooks", "--target", "http://host:1"],
        ["status", "--wait", "-1"],
        ["nonsense"],
    ],
)
def test_wrong_usage(vqserve, wrong):
    code, out, err = vqserve(*wrong)
    assert (code, out) == (2, "")
    assert err.startswith("vqserve")
    assert err.endswith("--help` lists the options\n")
    assert err.count("\n") == 1


def test_version(vqserve):
    assert vqserve("--version") == (0, f"vqserve {__version__}\n", "")


def test_codebooks(vqserve, tiny):
    code, out, _ = vqserve("codebooks")
    info = tiny.codes["small"].info
    assert code == 0
    head, row = out.splitlines()
    assert head.split()[:2] == ["name", "kind"]
    assert row.split() == ["small", "vq", "300", "300", "4", "4", "8", "default", info.digest[:12]]
    code, out, _ = vqserve("codebooks", "--json")
    assert json.loads(out)[0]["digest"] == info.digest
    tiny.replace("small", kind="rvq", num_quantizers=8)
    assert "8 stages of 300 " in vqserve("codebooks")[1]
    tiny.replace("small", name="evil\x1b[2J")
    assert "\x1b" not in vqserve("codebooks")[1]


def test_the_codebook_of_the_environment(vqserve, monkeypatch, files):
    monkeypatch.setenv("VQSERVE_CODEBOOK", "other")
    assert "'other'" in vqserve("encode", files[0], "-o", files[1])[2]
    assert vqserve("encode", files[0], "-o", files[1], "--codebook", "small")[0] == 0


def test_progress_is_shown_when_asked_for(vqserve, files):
    code, out, err = vqserve("encode", files[0], "-o", files[1], "--progress")
    assert (code, out) == (0, "")
    assert "20.5k/20.5k" in err
    assert "token" in err


@pytest.fixture
def healthy():
    """A server with the health service only: (target, servicer)."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    servicer = health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(4))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None).wait()


def test_a_status_without_a_name(vqserve, healthy):
    target, servicer = healthy
    servicer.set("", 77)
    assert vqserve("status", "--target", target) == (1, "status 77\n", "")


def test_status(vqserve, healthy):
    target, servicer = healthy
    statuses = health_pb2.HealthCheckResponse
    servicer.set("", statuses.SERVING)
    assert vqserve("status", "--target", target) == (0, "SERVING\n", "")
    assert vqserve("status", "--target", target, "--wait", "9") == (0, "SERVING\n", "")
    servicer.set("", statuses.NOT_SERVING)
    assert vqserve("status", "--target", target) == (1, "NOT_SERVING\n", "")
    assert vqserve("status", "--target", target, "--wait", "2") == (1, "NOT_SERVING\n", "")
    code, out, err = vqserve("status", "--target", "127.0.0.1:1")
    assert (code, out) == (1, "")
    assert one_line(err)
    code, out, err = vqserve("status", "--target", "127.0.0.1:1", "--wait", "0.2")
    assert (code, out) == (1, "UNREACHABLE\n")
    assert "is the server running" in err
    code, out, err = vqserve("status", "--target", "127.0.0.1:1", "--wait", "0")
    assert (code, out) == (1, "")
    assert "cannot connect to the server: " in err
    assert "is the server running" in err
    servicer.set("", statuses.SERVING)
    assert vqserve("status", "--target", target, "--wait", "0") == (0, "SERVING\n", "")


def test_status_of_what_does_not_answer(vqserve):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code, out, err = vqserve("status", "--target", f"127.0.0.1:{silent.getsockname()[1]}", "--timeout", "0.2")
    assert (code, out) == (1, "")
    assert "allow more time with --timeout, or look into the server's log" in err
    assert "vqserve status" not in err


def test_status_waits_until_it_serves(healthy):
    target, servicer = healthy
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    timer = threading.Timer(0.2, servicer.set, ("", health_pb2.HealthCheckResponse.SERVING))
    timer.start()
    assert main(["status", "--target", target, "--wait", "60"]) == 0
    timer.join()


def test_status_of_a_server_without_health(vqserve, tiny):
    code, out, err = vqserve("status")
    assert (code, out) == (1, "")
    assert one_line(err)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tiny, files, number, code):
    source, middle, _ = files
    tiny.gate.clear()
    process = subprocess.Popen(
        [sys.executable, "-m", "vqserve_client", "encode", source, "-o", middle, "--target", tiny.target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    tiny.arrived.acquire()
    # The file is there in the making.
    assert [path for path in source.parent.iterdir() if path.name.endswith(".part")]
    process.send_signal(number)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out, err) == (code, "", "")
    assert [path.name for path in source.parent.iterdir()] == ["in.npy"]


def test_a_source_that_is_truncated_meanwhile(vqserved, tmp_path):
    """A mapped file would end the process by SIGBUS, without a word."""
    source, target = tmp_path / "in.npy", tmp_path / "out.npy"
    # So much that it takes longer than to truncate it.
    with source.open("wb") as file:
        shape = (512, 16, 256, 256)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + math.prod(shape) * 4)
    process = subprocess.Popen(
        [sys.executable, "-m", "vqserve_client", "encode", source, "-o", target, "--target", vqserved().target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # It has begun to read.
    eventually(lambda: [path for path in tmp_path.iterdir() if path.name.endswith(".part")])
    os.truncate(source, 1 << 20)
    out, err = process.communicate(timeout=200)
    error = f"vqserve: error: {source} was truncated while it was read\n"
    assert (process.returncode, out, err) == (1, "", error)
    assert [path.name for path in tmp_path.iterdir()] == ["in.npy"]


def test_a_reader_that_has_enough(tiny):
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-m", "vqserve_client", "codebooks", "--target", tiny.target],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=200,
        check=False,
    )
    os.close(write)
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 1
