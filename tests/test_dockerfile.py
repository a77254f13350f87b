"""What can be read from the Dockerfile without an engine: the promises of docs/deploy.md."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import lock
import pytest
from packaging.utils import canonicalize_name

import vqserve.__main__
import vqserve_client.cli
from vqserve_server import config
from vqserve_server.search.cuda import cubins

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def parse(text):
    """Return the (instruction, argument) pairs: comments dropped, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


INSTRUCTIONS = parse((ROOT / "Dockerfile").read_text())
STAGE_STARTS = [i for i, (word, _) in enumerate(INSTRUCTIONS) if word == "FROM"]
SHIPPED = INSTRUCTIONS[STAGE_STARTS[-1] :]
# What .dockerignore writes, as a regular expression does.
GLOB = {".": r"\.", "**/": "(.*/)?", "*": "[^/]*"}


def shipped(word):
    return [rest for name, rest in SHIPPED if name == word]


def commands():
    """Return what the shells of all stages run, one by one."""
    return [command for word, rest in INSTRUCTIONS if word == "RUN" for command in rest.split("&&")]


def kept(path):
    """Return whether .dockerignore lets a file into a build: the last pattern that matches it or its folder decides."""
    verdict = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.sub(r"[.]|\*\*/|\*", lambda m: GLOB[m[0]], line.removeprefix("!"))
        if re.fullmatch(f"{pattern}(/.*)?", path):
            verdict = line.startswith("!")
    return verdict


def test_every_stage_comes_from_the_pinned_base():
    base = next(rest for word, rest in INSTRUCTIONS[: STAGE_STARTS[0]] if word == "ARG").removeprefix("BASE=")
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", base)
    version = base.removeprefix("python:").partition("-")[0]
    assert f"Programming Language :: Python :: {version}" in PROJECT["project"]["classifiers"]
    stages = set()
    for i in STAGE_STARTS:
        image, _, stage = INSTRUCTIONS[i][1].partition(" AS ")
        assert image == "${BASE}" or image in stages
        stages.add(stage)


def test_the_image_runs_as_a_number_that_is_not_root():
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", shipped("USER")[-1])
    words = [word for word, _ in SHIPPED]
    assert "RUN" not in words[words.index("USER") :]


def test_the_image_takes_what_the_other_stages_made_and_pinned_wheels():
    assert "ADD" not in {word for word, _ in SHIPPED}
    assert shipped("COPY")
    assert all(rest.startswith("--from=") for rest in shipped("COPY"))
    runs = shipped("RUN")
    assert not any(re.search(r"\b(apt|apt-get)\b", rest) for rest in runs)
    # pip itself is mounted and does not stay.
    [install] = [rest for rest in runs if re.search(r"\bpip\b", rest)]
    assert install.startswith("--mount=type=bind,from=tools,source=/opt/pip,target=/opt/pip ")


def test_no_compiled_file_holds_a_time():
    installs = [command for command in commands() if re.search(r"\bpip\b.* install\b", command)]
    assert installs
    assert all("--no-compile" in command for command in installs)
    compiling = [command for command in commands() if "compileall" in command]
    assert len(compiling) == 2
    assert all("--invalidation-mode unchecked-hash" in command for command in compiling)


def test_labels_are_last():
    words = [word for word, _ in SHIPPED]
    assert words[-3:] == ["ARG", "ARG", "LABEL"]


def test_torch_is_the_pinned_one_and_pip_keeps_no_cache():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert any(re.fullmatch(r"torch==[\d.]+", line) for line in pins)
    installs = [command for command in commands() if re.search(r"\bpip\b.* install\b", command)]
    assert installs
    pinned = [command for command in installs if "-c constraints.txt" in command]
    assert all("--no-cache-dir" in command for command in pinned)
    assert all("--no-deps" in command for command in installs if command not in pinned)


def test_health_is_asked_by_a_command_that_the_wheel_installs(monkeypatch, capsys):
    (check,) = shipped("HEALTHCHECK")
    script, *arguments = json.loads(check.partition(" CMD ")[2])
    assert PROJECT["project"]["scripts"][script] == f"{vqserve.__main__.__name__}:main"
    assert arguments[0] == "status"
    # Nobody listens on port 1: the command must understand its arguments and say so, which is the exit code 1.
    monkeypatch.setenv("VQSERVE_TARGET", "127.0.0.1:1")
    assert vqserve_client.cli.main(arguments) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_without_arguments_the_daemon_listens_where_a_published_port_leads():
    assert json.loads(shipped("ENTRYPOINT")[0]) == ["vqserved"]
    command, *flags = json.loads(shipped("CMD")[0])
    assert command == "serve"
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    environment = dict(pair.split("=", 1) for rest in shipped("ENV") for pair in rest.split())
    rpc = config.resolve(vars(parser.parse_args(flags)), environment).rpc
    assert (rpc.host, shipped("EXPOSE")) == ("0.0.0.0", [str(rpc.port)])  # noqa: S104


def test_loopback_stays_the_default_of_a_named_command():
    environment = " ".join(shipped("ENV"))
    assert "VQSERVE_HOST" not in environment


def test_the_wheel_can_be_built_from_what_enters_the_build():
    project, hatch = PROJECT["project"], PROJECT["tool"]["hatch"]
    packages = hatch["build"]["targets"]["wheel"]["packages"]
    needed = ["pyproject.toml", "constraints.txt", project["readme"], *project["license-files"]]
    needed.append("scripts/image_requirements.py")
    hook = hatch["build"]["targets"]["wheel"]["hooks"]["custom"]["path"]
    sources = [str(path.relative_to(ROOT)) for path in (ROOT / "server").rglob("*.c")]
    assert sources
    needed += [hook, *sources]
    needed += [hatch["version"]["path"], *(f"{package}/__init__.py" for package in packages)]
    needed.append("server/vqserve_server/assets/demo.safetensors")
    assert [path for path in needed if not kept(path)] == []


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".env",
        ".venv/bin/python",
        "tests/conftest.py",
        "codebooks/mine.safetensors",
        "server.key",
        "out/demo.png",
        # Compiled here, for this machine: the image compiles its own.
        "server/vqserve_server/search/native/compiled.so",
        "server/vqserve_server/search/cuda/compiled/index.json",
        "server/vqserve_server/__pycache__/cli.cpython-311.pyc",
        "proto/stale.pyc",
    ],
)
def test_nothing_else_enters_the_build(path):
    assert not kept(path)


@pytest.fixture
def requirements(tmp_path):
    """Return the files that the stages install from, after a change of pyproject.toml and constraints.txt."""

    def write(change=str):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in ("pyproject.toml", "constraints.txt"):
            (folder / name).write_text(change((ROOT / name).read_text()))
        script = ROOT / "scripts" / "image_requirements.py"
        subprocess.run([sys.executable, script, "out"], cwd=folder, check=True)
        return {
            path.relative_to(folder / "out").as_posix(): path.read_text() for path in (folder / "out").rglob("*.txt")
        }

    return write


def test_a_tool_of_the_developers_changes_nothing_that_the_image_installs(requirements):
    def change(text):
        changed = (
            text.replace("ruff==0.", "ruff==1.").replace("pytest>=8", "pytest>=9").replace("typos==1.", "typos==2.")
        )
        assert changed != text
        return changed

    assert requirements(change) == requirements()


def test_what_the_stages_install(requirements):
    written = requirements()
    assert sorted(written) == [
        f"{part}/{name}.txt" for part in ("build", "kernels", "runtime") for name in ("constraints", "requirements")
    ]
    server = PROJECT["project"]["optional-dependencies"]["server"]
    assert written["runtime/requirements.txt"].splitlines() == [*PROJECT["project"]["dependencies"], *server]
    assert written["build/requirements.txt"].splitlines() == PROJECT["build-system"]["requires"]
    [compiler] = written["kernels/requirements.txt"].splitlines()
    assert compiler.startswith("triton>=")
    assert "\ntriton==" in written["kernels/constraints.txt"]


def test_the_stage_of_the_kernels_has_what_compiles_them_and_the_image_does_not():
    [copied] = [rest for word, rest in INSTRUCTIONS if word == "COPY" and "search/cuda" in rest]
    folder = ROOT / "server/vqserve_server/search/cuda"
    names = [Path(path).name for path in copied.split()[:-1]]
    # What decides how they are compiled, and the program: it imports no other file of ours.
    assert sorted(names) == sorted({"cubins.py", *cubins._SOURCES})
    for name in names:
        imported = re.findall(r"from (vqserve\S*) import (\w+)", (folder / name).read_text())
        modules = [f"{module}.{first}" if module.endswith(".cuda") else module for module, first in imported]
        assert {f"{module.rpartition('.')[2]}.py" for module in modules} <= set(names)
        assert all(module.startswith("vqserve_server.search.cuda.") for module in modules)
    [install] = [rest for rest in shipped("RUN") if re.search(r"\bpip\b", rest)]
    assert re.search(r"uninstall --yes .*\btriton\b", install)


def test_every_package_of_the_image_is_pinned_where_the_image_sees_it(requirements):
    written = requirements()
    installed = {canonicalize_name(one.name): one.requires or [] for one in metadata.distributions()}
    needed = lock.closure(written["runtime/requirements.txt"].splitlines(), installed)
    pins = set(re.findall(r"^([a-z0-9-]+)==", written["runtime/constraints.txt"], re.MULTILINE))
    # CUDA's torch needs Triton, which is pinned in any case, and names what it needs of NVIDIA itself.
    of_torch = {name for name in needed if name.startswith(("nvidia-", "cuda-"))}
    assert pins - {"triton"} == needed - of_torch - {"triton"}
