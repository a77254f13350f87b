"""The documentation: its links lead somewhere, and its examples run."""

from __future__ import annotations

import base64
import json
import re
import shutil
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from google.protobuf import json_format
from safetensors.torch import save_file

from support.certificates import Authority, Folder, free_port, replace
from support.foreign import CASES
from support.pages import COMMANDS, ROOT, commands, examples, follow, prose, run
from support.waiting import eventually
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from vqserve_server.access.token_file import hash_of, new_secret
from vqserve_server.codebook_files import DEMO_PATH, find_codebooks
from vqserve_server.codebooks import load_codebook
from vqserve_server.tokenizer import Tokenizer

PAGES = sorted(
    page for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "server/**/*.md") for page in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(([^()\s]+)\)")


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
            path = link.partition("#")[0]
            target = (page.parent / path).resolve() if path else page
            todo += [target / "README.md"] if target.is_dir() else [target] if target.suffix == ".md" else []
    assert [
        page.relative_to(ROOT) for page in PAGES if page.is_relative_to(ROOT / "docs") and page not in reached
    ] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT / "docs"], ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    # `search/native/scan.c`, wherever the page's reader would look for it.
    named = set(re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|c|proto|toml|md))`", prose(page)))
    homes = [ROOT / home for home in ("", "server", "server/vqserve_server", "server/vqserve_server/search")]
    assert [name for name in sorted(named) if not any((home / name).exists() for home in homes)] == []


@pytest.fixture(scope="module")
def demo():
    return Tokenizer.load(DEMO_PATH, device="cpu")


@pytest.fixture
def target(demo, serving):
    return serving(demo).target


def test_the_readme_s_example(target, demo):
    [source] = examples("README.md", "python")
    names = run(source, target)
    assert names["indices"].shape == (8, 32, 32)
    assert (names["indices"] == demo.encode(names["latents"])).all()
    assert names["decoded"].shape == (8, demo.info.output_dim, 32, 32)


def test_the_client_s_example(target, demo):
    source, _ = examples("docs/client.md", "python")
    names = run(source, target)
    assert (names["indices"] == demo.encode(names["latents"])).all()


def test_the_client_s_example_with_tls(serving, demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    authority, files, secret = Authority(), Folder(tmp_path), new_secret()
    files.put(authority.issue("vq.example", "127.0.0.1"))
    Path("ca.pem").write_bytes(authority.pem)
    Path("token").write_text(secret)
    replace(tmp_path / "tokens.toml", f'[tokens.me]\nsha256 = "{hash_of(secret)}"\n'.encode())
    server = serving(demo, tokens=tmp_path / "tokens.toml", **files.settings())
    _, source = examples("docs/client.md", "python")
    run(source.replace("vq.example:50051", server.target))
    assert "name='demo'" in capsys.readouterr().out


def test_the_client_s_example_in_process(demo, monkeypatch):
    source, _ = examples("docs/client.md", "python")
    [line] = re.findall(r"`(with Tokenizer\.load\(.*\) as client:)`", prose(ROOT / "docs/client.md"))
    monkeypatch.chdir(ROOT)
    names = run("from vqserve_server import Tokenizer\n" + re.sub(r"with Client\(.*", line, source))
    assert (names["indices"] == demo.encode(names["latents"])).all()


def test_the_client_s_commands(target, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VQSERVE_TARGET", target)
    latents = np.random.default_rng(0).standard_normal((2, demo.info.input_dim, 8, 8)).astype(np.float32)
    np.save("latents.npy", latents)
    for line in commands("docs/client.md"):
        assert COMMANDS[line[0]](line[1:]) == 0
    assert (np.load("indices.npy") == demo.encode(latents)).all()
    assert (np.load("decoded.npy") == demo.decode(demo.encode(latents), dtype="float16")).all()


def test_the_benchmarks_commands(vqserved, tmp_path, monkeypatch):
    # In a process of its own: gRPC's asyncio cannot be server and client of one.
    target = vqserved("--device", "cpu").target
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VQSERVE_TARGET", target)
    for line in commands("docs/benchmarks.md"):
        assert COMMANDS[line[0]]([*line[1:], "--warmup=0.1", "--window=0.1", "--max-windows=3"]) == 0
    assert len(json.loads(Path("run.json").read_text())["loads"]) == 3
    assert Path("run.png").exists()
    [source] = examples("docs/benchmarks.md", "python")
    assert run(source, target)["measured"].requests > 0


def test_the_readme_s_commands(vqserved, tmp_path):
    follow("README.md", vqserved, tmp_path, lambda source, target: None)
    # `git status` stays clean.
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    mine = tmp_path / "out/mine"
    books = find_codebooks([str(mine / "books")]).files
    assert set(books) == {"mine", "trained"}
    latents = np.load(mine / "latents.npy")
    assert (np.load(mine / "tokens.npy") == Tokenizer.load(books["mine"], device="cpu").encode(latents)).all()
    assert np.load(mine / "decoded.npy").shape == latents.shape


def test_the_first_steps(vqserved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = {}
    follow("docs/first-steps.md", vqserved, tmp_path, lambda source, target: results.update(run(source, target)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    tour = tmp_path / "out/tour"
    assert (np.load(tour / "tokens.npy") == results["indices"]).all()
    mine = Tokenizer.load(tour / "books/mine.safetensors", device="cpu")
    assert (np.load(tour / "mine.npy") == mine.encode(np.load(tour / "latents.npy"))).all()


def test_git_ignores_what_the_first_pages_write():
    assert {"/out/", "/env/", ".venv/"} <= set((ROOT / ".gitignore").read_text().split())


def save_data_set(rows):
    """Write rows as the folder and the archive of the pages about training and inspection."""
    first, *parts = np.array_split(rows, 10)
    for folder in ("latents", "more"):
        Path(folder).mkdir()
    np.save("latents/first.npy", first)
    np.savez("more/parts.npz", *parts)


@pytest.mark.parametrize("page", ["docs/codebooks.md", "docs/training.md"])
def test_the_commands_that_make_codebooks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((9, 4), dtype=np.float32)
    np.save("codes.npy", codes)
    np.savez("vqvae.npz", codebook=codes)
    np.save("latents.npy", rng.standard_normal((10_000, 4), dtype=np.float32))
    save_data_set(np.load("latents.npy"))
    for name, prefix in (("last", "model.regularization."), ("vqgan", "quantize.")):
        torch.save({"state_dict": {f"{prefix}embedding.weight": torch.from_numpy(codes)}}, f"{name}.ckpt")
    Path("encodec").mkdir()
    places = {}
    for i in range(2):
        name, file = f"quantizer.layers.{i}.codebook.embed", f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: torch.from_numpy(codes)}, f"encodec/{file}")
        places[name] = file
    Path("encodec/model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for line in commands(page):
        if line[1] == "serve":
            assert find_codebooks(line[2:]).files
        else:
            quick = ["--steps=1", "--init=sample"] if line[1] == "train" else []
            assert COMMANDS[line[0]]([*line[1:], *quick]) == 0
            Tokenizer.load(line[line.index("-o") + 1], device="cpu")


def sources_of_the_recipes():
    """Return small checkpoints with their families' keys, by file name."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    def linear(name, inputs, outputs):
        return {f"{name}.weight": normal(outputs, inputs), f"{name}.bias": normal(outputs)}

    def normed(name, inputs, outputs):
        shapes = {"weight_g": (outputs, 1, 1), "weight_v": (outputs, inputs, 1), "bias": (outputs,)}
        return {f"{name}.{part}": normal(*shape) for part, shape in shapes.items()}

    def stages(pattern, *shape):
        return {pattern.format(i): normal(*shape) for i in range(3)}

    def mimi(parts, layers, sums, usage):
        state = {}
        for part in parts:
            state |= {f"{part}.input_proj.weight": normal(4, 6, 1), f"{part}.output_proj.weight": normal(6, 4, 1)}
            state |= {f"{part}.{layers}.0.{sums}": normal(9, 4), f"{part}.{layers}.0.{usage}": normal(9).abs() + 1}
        return {f"quantizer.{name}": tensor for name, tensor in state.items()}

    taming = {"quantize.embedding.weight": normal(9, 4), "quant_conv.weight": normal(4, 4, 1, 1)}
    gumbel = {"embed.weight": normal(9, 4), "proj.weight": normal(9, 4, 1, 1), "proj.bias": normal(9)}
    encodec = stages("quantizer.vq.layers.{}._codebook.embed", 9, 4)
    dac, dac_plain = {}, {}
    for i in range(2):
        at = f"quantizer.quantizers.{i}"
        codes = {f"{at}.codebook.weight": normal(9, 2)}
        dac |= codes | normed(f"{at}.in_proj", 6, 2) | normed(f"{at}.out_proj", 2, 6)
        dac_plain |= codes | linear(f"{at}.in_proj", 6, 2) | linear(f"{at}.out_proj", 2, 6)
    parts = ("semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer")
    return {
        "vqgan.ckpt": {"state_dict": taming},
        "ldm-f8.ckpt": {"state_dict": {**taming, "model_ema.quantizeembeddingweight": normal(9, 4)}},
        "amused/vqvae.safetensors": taming,
        "chameleon_vqvae.safetensors": taming,
        "gumbel-f8.ckpt": {"state_dict": {f"quantize.{name}": tensor for name, tensor in gumbel.items()}},
        "sgm.ckpt": {"state_dict": {"regularization.embedding.weight": normal(9, 4)}},
        "vq_ds16_c2i.pt": {"model": {**taming, "quantize.codebook_used": normal(9)}},
        "titok-l32.bin": {**taming, "latent_tokens": normal(3, 2)},
        "titok-s128-64.bin": {**taming, "latent_tokens": normal(3, 2)},
        "ibq.ckpt": {"state_dict": taming},
        "emu3_vt.safetensors": {
            "quantize.embedding.weight": normal(9, 4),
            "quant_conv.conv.weight": normal(4, 4, 3, 1, 1),
        },
        "encodec_24khz.th": encodec,
        "encodec_hf.safetensors": stages("quantizer.layers.{}.codebook.embed", 9, 4),
        "SpeechTokenizer.pt": encodec,
        "wavtokenizer.ckpt": {
            "state_dict": {f"feature_extractor.encodec.{name}": codes for name, codes in encodec.items()}
        },
        "dac_24khz.pth": {"state_dict": dac},
        "dac_hf.safetensors": dac_plain,
        "mimi.safetensors": mimi(
            ("rvq_first", "rvq_rest"), "vq.layers", "_codebook.embedding_sum", "_codebook.cluster_usage"
        ),
        "mimi_hf.safetensors": mimi(parts, "layers", "codebook.embed_sum", "codebook.cluster_usage"),
        "vq.pt": {"_codebook.embed": normal(1, 9, 4)},
        "rvq.pt": stages("layers.{}._codebook.embed", 1, 9, 4),
        "simvq.pt": {"frozen_codebook": normal(9, 5), "code_transform.weight": normal(4, 5)},
        "lfq.pt": {"mask": torch.tensor([8, 4, 2, 1]), **linear("project_in", 6, 4), **linear("project_out", 4, 6)},
        "fsq.pt": {**linear("project_in", 6, 4), **linear("project_out", 4, 6)},
        "codes.npy": normal(9, 4),
        "vqvae.npz": {"codebook": normal(9, 4)},
        "mine.pt": {"vq_layer.embedding.weight": normal(9, 4)},
        "vector.pt": {"embedding.weight": normal(9, 4)},
        "cosine.pt": {"embedding.weight": normal(9, 4)},
        "soundstream.npz": {"codebooks": normal(3, 9, 4)},
        "cepstra.npz": {f"stage{i}": normal(9, 4) for i in (1, 2, 3)},
    }


# Of the recipes that have their checkpoints in `support.foreign`.
FOREIGN = {
    "emu35_vision_tokenizer.safetensors": "emu3_5",
    "unitok_tokenizer.pth": "unitok",
    "bsqvit_18bit.pt": "bsq",
    "xcodec.safetensors": "xcodec",
    "higgs_audio_v2_tokenizer.safetensors": "higgs_audio_v2",
    "maskgct_semantic_codec.safetensors": "repcodec",
    "moss_audio_tokenizer.safetensors": "moss_audio_tokenizer",
    "xy_tokenizer.ckpt": "xy_tokenizer",
    "qwen3_tts_12hz.safetensors": "qwen_12hz",
    "qwen3_tts_25hz.safetensors": "qwen_25hz",
    "glm_4_voice_tokenizer.safetensors": "whisper_vq",
    "speech_tokenizer_v2.pt": "s3_tokenizer",
    "rqvae.pth": "semantic_ids",
    "vqvae.pt": "vqvae",
    "vqvae_ema.pt": "vqvae_with_averages",
    "vqvae2.pt": "vqvae_2",
    "own_vq_layer.pt": "vq_layer",
    "own_codebook.pt": "codebook",
    "openaudio_codec.pth": "fish_speech",
    "xcodec2.safetensors": "xcodec_2",
    "residual_fsq.pt": "residual_fsq_1_17_8",
    "grid.ckpt": "grid",
}


def test_the_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = sources_of_the_recipes()
    for name, family in FOREIGN.items():
        sources[name] = {name: torch.from_numpy(np.array(array)) for name, array in CASES[family]().arrays.items()}
    for name, content in sources.items():
        Path(name).parent.mkdir(exist_ok=True)
        match Path(name).suffix:
            case ".npy":
                np.save(name, content)
            case ".npz":
                np.savez(name, **content)
            case ".safetensors":
                save_file(content, name)
            case _:
                torch.save(content, name)
    latents = np.random.default_rng(1).standard_normal((2, 4, 3, 3), dtype=np.float32)
    codes = sources["vqgan.ckpt"]["state_dict"]["quantize.embedding.weight"].numpy()
    np.save("latents.npy", latents)
    np.save("indices.npy", ((latents[:, None] - codes[:, :, None, None]) ** 2).sum(axis=2).argmin(axis=1))
    used = set()
    for line in commands("docs/recipes.md"):
        assert COMMANDS[line[0]](line[1:]) == 0
        used.add(line[2])
        tokenizer = Tokenizer.load(line[line.index("-o") + 1], device="cpu")
        z = np.ones((3, tokenizer.info.input_dim), np.float32)
        assert tokenizer.decode(tokenizer.encode(z)).shape == (3, tokenizer.info.output_dim)
    assert set(sources) <= used


def test_the_inspecting_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("book", "old", "new"):
        shutil.copy(DEMO_PATH, f"{name}.safetensors")
    np.save("latents.npy", np.random.default_rng(0).standard_normal((1000, 16), dtype=np.float32))
    save_data_set(np.load("latents.npy"))
    for line in commands("docs/inspecting.md"):
        assert COMMANDS[line[0]](line[1:]) == 0
    assert Path("book.png").exists()
    # The example has the lines that the command writes.
    [example] = examples("docs/inspecting.md", "text")
    shown, written = ([line[:13] for line in text.splitlines()] for text in (example, capsys.readouterr().out))
    assert [name for name in shown if name.strip() and name not in written] == []


def test_the_health_example(vqserved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw, send = examples("docs/codebook-health.md", "python")
    inspect, train, serve = commands("docs/codebook-health.md")
    usual, louder, _ = examples("docs/codebook-health.md", "text")
    run(draw)
    assert COMMANDS[train[0]](train[1:]) == 0
    port = free_port()
    target = vqserved(*serve[2:], "--metrics-port", port).target

    def samples():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            lines = [line.rsplit(" ", 1) for line in response.read().decode().splitlines()]
        return {name: float(value) for name, value in lines if name.startswith("vqserve_codebook_")}

    def sent(source, is_shown):
        """Run it, and return the samples when the figures, which are made now and then, have come so far."""
        run(f"{draw}\n{source}", target)
        return eventually(lambda: (shown := samples()) and is_shown(shown) and shown)

    drift = 'vqserve_codebook_drift_bits{codebook="book",stage="0"}'
    named = {line.split()[0] for line in (*usual.splitlines(), *louder.splitlines())}
    shown = sent(send.replace("40", "10"), lambda shown: named <= shown.keys())
    assert shown[drift] < 0.01
    sent(send.replace("40", "30").replace("50_000", "50_000, scale=1.5"), lambda shown: shown[drift] > 0.05)
    assert COMMANDS[inspect[0]](inspect[1:]) == 0


def test_the_codebooks_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_and_load, write = examples("docs/codebooks.md", "python")
    names = run(save_and_load)
    assert names["codebook"].digest == names["digest"]
    assert names["codebook"].provenance == {"run": "2031-04-01"}
    names = run(write)
    codebook = load_codebook(tmp_path / "codes.safetensors")
    assert codebook.digest == names["digest"]
    assert (codebook.quantizer.code_rows().numpy() == names["codes"]).all()


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
