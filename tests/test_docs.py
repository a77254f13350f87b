"""The documentation: its links lead somewhere, and its examples run."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import json_format

from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from vqserve_server.app import DEMO_PATH
from vqserve_server.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "server/**/*.md") for page in ROOT.glob(pattern)
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def prose(page):
    return FENCED.sub("", page.read_text())


def examples(page, language):
    return [body for tag, body in FENCED.findall((ROOT / page).read_text()) if tag == language]


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page):
    lost = []
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_every_page_can_be_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in LINK.findall(prose(page)):
            target = (page.parent / link.partition("#")[0]).resolve()
            todo += [target / "README.md"] if target.is_dir() else [target] if target.suffix == ".md" else []
    assert [
        page.relative_to(ROOT) for page in PAGES if page.is_relative_to(ROOT / "docs") and page not in reached
    ] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT / "docs"], ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    # `search/native/scan.c`, wherever the page's reader would look for it.
    named = set(re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|c|proto|toml|md))`", prose(page)))
    homes = [ROOT / home for home in ("", "server/vqserve_server", "server/vqserve_server/search")]
    assert [name for name in sorted(named) if not any((home / name).exists() for home in homes)] == []


@pytest.fixture(scope="module")
def demo():
    return Tokenizer.load(DEMO_PATH, device="cpu")


@pytest.fixture
def target(demo, serving):
    return serving(demo).target


def run(source, target=""):
    """Run an example against a server and return its names."""
    names = {"__name__": "example"}
    exec(source.replace("localhost:50051", target), names)  # noqa: S102
    return names


def test_the_readme_s_example(target, demo):
    [source] = examples("README.md", "python")
    names = run(source, target)
    assert names["indices"].shape == (8, 32, 32)
    assert (names["indices"] == demo.encode(names["latents"])).all()
    assert names["decoded"].shape == (8, demo.info.output_dim, 32, 32)


def test_the_client_s_example(target, demo):
    source = examples("docs/client.md", "python")[0]
    names = run(source.replace('codebook="vqgan-f16"', f'codebook="{demo.name}"'), target)
    assert (names["indices"] == demo.encode(names["latents"])).all()


def test_the_wire_s_example(target, demo):
    [source] = examples("docs/wire.md", "python")
    names = run(source, target)
    latents = np.random.default_rng(0).standard_normal((2, demo.info.input_dim, 8, 8)).astype(np.float32)
    assert (names["indices"] == demo.encode(latents)).all()
    assert (names["output"] == demo.decode(names["indices"])).all()
    # What the example's comments say.
    assert f"# {', '.join(names['failure'])}\n" in source
    assert f"# {names['request_id']}\n" in source


def test_the_wire_s_grpcurl_calls(target, demo):
    [source] = examples("docs/wire.md", "sh")
    zeros = re.compile(r"'\$\(head -c (\d+) /dev/zero \| base64 -w0\)'")
    source = zeros.sub(lambda match: base64.b64encode(bytes(int(match[1]))).decode(), source)
    bodies = [json.loads(body) for body in re.findall(r"-d '(\{.*?\})'", source)]
    encode, decode = (
        json_format.ParseDict(body, kind())
        for body, kind in zip(bodies, (pb.EncodeRequest, pb.DecodeRequest), strict=True)
    )
    assert set(re.findall(r"vqserve\.v1\.TokenizerService/(\w+)", source)) == {"ListCodebooks", "Encode", "Decode"}
    with grpc.insecure_channel(target) as channel:
        stub = TokenizerServiceStub(channel)
        indices = np.frombuffer(stub.Encode(encode).indices, "<u2")
        latents = np.frombuffer(stub.Decode(decode).latents, "<f4").reshape(2, -1)
    assert (indices == demo.encode(np.zeros((2, demo.info.input_dim), np.float32))).all()
    assert (latents == demo.decode(np.array([0, 4095]))).all()


def test_the_quantizers_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [source] = examples("docs/quantizers.md", "python")
    names = run(source)
    tokenizer = Tokenizer.load(tmp_path / "trained.safetensors", device="cpu")
    assert (tokenizer.encode(names["latents"].detach()) == names["indices"]).all()
    assert (tokenizer.decode(names["indices"]) == names["decoded"]).all()
