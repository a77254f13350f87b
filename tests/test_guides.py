"""The guides: each is followed as printed, against a server of its own."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import http.client
import inspect
import runpy
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch

from support.certificates import free_port
from support.pages import examples, follow
from support.waiting import eventually
from vqserve_client import Client
from vqserve_data.items import RawItem
from vqserve_data.stream import TokenStream
from vqserve_server.codebook_files import DEMO_PATH
from vqserve_server.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def demo():
    return Tokenizer.load(DEMO_PATH, device="cpu")


@pytest.fixture
def target(vqserved):
    return vqserved("--device", "cpu").target


@pytest.fixture
def guide(vqserved, target, tmp_path, monkeypatch, capfd):
    """Follow a guide in an empty folder, and return what its commands print: guide("jupyter")."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path.parent / "hf"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def save(source, target):
        name = source.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(source.replace("localhost:50051", target))

    def run(name):
        capfd.readouterr()
        follow(f"docs/guides/{name}.md", vqserved, tmp_path, save, target)
        return capfd.readouterr().out

    return run


def images(count):
    return [np.random.default_rng(i).standard_normal((16, 8, 8), dtype=np.float32) for i in range(count)]


def test_data_set(guide, demo, tmp_path):
    assert guide("data-set").endswith("300 0 19200\n")
    latents = np.stack(images(300))
    indices = demo.encode(latents)
    for i, (tokens, decoded) in enumerate(zip(indices, demo.decode(indices), strict=True)):
        assert (np.load(tmp_path / f"tokens/{i:03}.npy") == tokens).all()
        assert (np.load(tmp_path / f"decoded/{i:03}.npy") == decoded).all()
    assert demo.info.digest in (tmp_path / "tokens/manifest.json").read_text()
    assert (np.load(tmp_path / "some/004.npy") == np.load(tmp_path / "decoded/004.npy")).all()
    with np.load(tmp_path / "tokens-npz/shard-00000.npz") as shard:
        assert (np.stack([shard[f"{i:03}"] for i in range(300)]) == indices).all()
    pictures = runpy.run_path(str(tmp_path / "encoders.py"))["latents"]
    for i in range(8):
        content = (tmp_path / f"pictures/{i}.png").read_bytes()
        expected = demo.encode(pictures(RawItem(f"{i}", "", {"png": content})))
        assert (np.load(tmp_path / f"picture-tokens/{i}.npy") == expected).all()


def test_training(guide, demo, tmp_path):
    loss, shapes = guide("train-from-tokens").splitlines()
    assert 5 < float(loss) < 10
    assert shapes == "torch.Size([20, 8, 8]) torch.Size([20])"
    stream = TokenStream(tmp_path / "stream")
    assert stream.keys == [f"{i:03}" for i in range(300)]
    assert (np.stack(stream[:]) == demo.encode(np.stack(images(300)))).all()


def test_dataloader(guide, target, demo, tmp_path):
    # The last batch of 1000 items.
    assert guide("dataloader") == "torch.Size([8, 8, 8]) torch.int64\n" * 2
    with Client(target) as client:
        tokens = runpy.run_path(str(tmp_path / "loader.py"))["Tokens"](client)
        latents = torch.stack([tokens.latents(i) for i in range(5)])
        assert (torch.stack(tokens.__getitems__(range(5))) == demo.encode(latents)).all()


def test_datasets(guide, demo, tmp_path):
    datasets = pytest.importorskip("datasets")
    assert "(8, 8)" in guide("datasets")
    rows = datasets.load_from_disk(tmp_path / "tokens")
    latents = np.random.default_rng(0).standard_normal((1000, 16, 8, 8), dtype=np.float32)
    assert (np.array(rows["tokens"]) == demo.encode(latents)).all()
    assert list(rows["label"]) == list(range(1000))


def test_the_cache_of_datasets_tells_digests_apart():
    fingerprint = pytest.importorskip("datasets.fingerprint")

    def hash_of(digest):
        client = Client("localhost:1", codebook="demo", digest=digest)
        return fingerprint.Hasher.hash(lambda batch: client.encode(batch["latents"]))

    assert hash_of("ab" * 32) == hash_of("ab" * 32)
    assert hash_of("ab" * 32) != hash_of("cd" * 32)


def test_webdataset(guide, demo, tmp_path):
    assert guide("webdataset") == "(8, 8) uint16 7\n"
    with tarfile.open(tmp_path / "latents.tar") as tar:
        assert len(tar.getmembers()) == 200


def test_jupyter(target, demo):
    async def notebook():
        names = {"__name__": "__main__"}
        for cell in examples("docs/guides/jupyter.md", "python"):
            source = cell.replace("localhost:50051", target)
            code = compile(source, "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, names)  # noqa: S307
            if inspect.isawaitable(result):
                await result
        await names["client"].close()
        return names

    names = asyncio.run(notebook())
    assert (names["indices"] == demo.encode(names["latents"])).all()
    assert len(names["tokens"]) == 1000
    assert all((each == names["indices"][i % 4]).all() for i, each in enumerate(names["tokens"]))


def post(port, path, body):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request("POST", path, body)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_fastapi(target, demo, tmp_path):
    pytest.importorskip("fastapi")
    [source] = examples("docs/guides/fastapi.md", "python")
    command, _ = examples("docs/guides/fastapi.md", "sh")
    (tmp_path / "app.py").write_text(source.replace("localhost:50051", target))
    port = free_port()
    words = command.replace("8000", str(port)).split()
    process = subprocess.Popen([sys.executable, "-m", *words], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:

        def answers():
            with contextlib.suppress(ConnectionError):
                return post(port, "/tokens", b"")

        assert eventually(answers)[0] == 422
        [latents] = images(1)
        status, text = post(port, "/tokens", latents.tobytes())
        assert (status, ast.literal_eval(text)) == (200, demo.encode(latents[None])[0].tolist())
        latents[1, 2, 3] = np.nan
        status, text = post(port, "/tokens", latents.tobytes())
        assert status == 422
        assert "latents[1, 2, 3] is nan" in text
    finally:
        process.terminate()
        process.wait()


def test_one_job_on_many_servers(vqserved, tmp_path, monkeypatch, demo):
    """Its commands for the nodes, with two servers here in place of theirs."""
    hosts = ("127.0.0.1", "127.0.0.2")
    servers = [vqserved(f"book={DEMO_PATH}", "--device", "cpu", "--host", host) for host in hosts]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latents").mkdir()
    for number, image in enumerate(images(9)):
        np.save(f"latents/{number}.npy", image)
    block = next(one for one in examples("docs/guides/many-servers.md", "sh") if "export" in one)
    setting, *lines = block.splitlines()
    assert setting.startswith("export VQSERVE_TARGET=gpu-1:50051,gpu-1:50052,")
    monkeypatch.setenv("VQSERVE_TARGET", ",".join(server.target for server in servers))
    for line in lines:
        subprocess.run([sys.executable, "-m", "vqserve_client", *line.split()[1:]], check=True)
    for number, image in enumerate(images(9)):
        assert (np.load(f"tokens/{number}.npy") == demo.encode(image, batched=False)).all()
