"""examples/deploy/vqserve.service: its settings are the server's, and systemd finds little that it could do."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vqserve_server
from vqserve_server.config import ServeConfig

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
UNIT = DEPLOY / "vqserve.service"
# PR_SET_MDWE and PR_MDWE_REFUSE_EXEC_GAIN: the kernel's form of MemoryDenyWriteExecute=.
CONFINED = """
import ctypes, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    sys.exit("this kernel cannot")
import numpy as np
from vqserve_server import Tokenizer
from vqserve_server.search import available
for search in available("cpu"):
    tokenizer = Tokenizer.load(sys.argv[1], device="cpu", search=search)
    tokens = tokenizer.encode(np.ones((1, 16, 64, 64), np.float32))
    for dtype in ("float32", "float16", "bfloat16"):
        tokenizer.decode(tokens, dtype=dtype)
    print(search, tokens.shape)
"""
# Of 10, by systemd's own measure.
MOST_EXPOSED = 3.0


class Unit(dict):
    """The settings of a unit's sections; those that are there several times are lists."""

    def __init__(self, path):
        parser = configparser.RawConfigParser(strict=False, dict_type=dict, delimiters=("=",), comment_prefixes=("#",))
        parser.optionxform = str
        parser.read(path)
        super().__init__({section: dict(parser[section]) for section in parser.sections()})


@pytest.mark.parametrize("drop_in", [False, True])
def test_the_server_understands_its_settings(drop_in, settings):
    unit = Unit(UNIT)
    assert list(unit) == ["Unit", "Service", "Install"]
    command, *words = shlex.split(unit["Service"]["ExecStart"])
    assert command.endswith("/bin/vqserved")
    service = unit["Service"] | (Unit(DEPLOY / "vqserve-gpu.conf")["Service"] if drop_in else {})
    name, _, value = service["Environment"].partition("=")
    sources, config = settings(words, {name: value})
    assert sources == ["/srv/codebooks"]
    assert config.device == ("cuda" if drop_in else "cpu")
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert int(service["TimeoutStopSec"]) > ServeConfig.drain_seconds


@pytest.mark.parametrize("drop_in", [False, True])
def test_systemd_finds_it_hardened(drop_in, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text())
    if drop_in:
        # A later line of a unit counts like a drop-in's.
        before, install = unit.read_text().split("\n[Install]")
        added = (DEPLOY / "vqserve-gpu.conf").read_text().partition("[Service]\n")[2]
        unit.write_text(f"{before}\n{added}\n[Install]{install}")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr or "Unknown command" in done.stderr:
        pytest.skip("this systemd-analyze cannot judge a file")
    level = re.search(r"Overall exposure level for vqserve.service: ([\d.]+)", done.stdout)
    assert level is not None, done.stdout + done.stderr
    assert float(level[1]) < MOST_EXPOSED


def test_systemd_knows_every_setting(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT.name
    # A program that is there, since a missing one is an error, too.
    unit.write_text(UNIT.read_text().replace("/opt/vqserve/bin/vqserved", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert "vqserve.service" not in done.stderr + done.stdout


def test_the_search_needs_no_memory_that_is_both_written_and_run():
    assert Unit(UNIT)["Service"]["MemoryDenyWriteExecute"] == "yes"
    demo = Path(vqserve_server.__file__).parent / "assets" / "demo.safetensors"
    done = subprocess.run([sys.executable, "-c", CONFINED, demo], capture_output=True, text=True, check=False)
    if "this kernel cannot" in done.stderr:
        pytest.skip("the kernel is older than 6.3")
    assert done.returncode == 0, done.stderr
    assert "native (1, 64, 64)" in done.stdout
