"""Fixtures of quantizers of every kind (tests/kinds.py), and of imports of strangers' files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kinds import TRAINED, make
from support.hostile import LIMIT, memory
from vqserve_server.quantizers import Quantizer
from vqserve_tools import cli


@pytest.fixture(params=TRAINED)
def trained_quantizer(request: pytest.FixtureRequest) -> Quantizer:
    """A quantizer of each of the four classes that are recognized by their state dicts."""
    return make(request.param)


@pytest.fixture
def make_quantizer() -> Callable[..., Quantizer]:
    return make


@pytest.fixture
def imported(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, int]]:
    """Import a file; return exit status, stderr, and by how many bytes memory grew at its peak."""

    def run(source: Path, *flags: str) -> tuple[int, str, int]:
        out = source.with_name("out.safetensors")
        # Forgets the peak so far.
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        status = cli.main(["import", str(source), "-o", str(out), "--metric", "l2", *flags])
        grown = memory("VmHWM") - before
        assert out.exists() == (status == 0)
        return status, capsys.readouterr()[1], grown

    return run


@pytest.fixture
def refused(imported: Callable[..., tuple[int, str, int]]) -> Callable[..., None]:
    """Import a file that must be refused in one line, which `match` is part of, with no memory to speak of."""

    def run(source: Path, match: str, *flags: str) -> None:
        status, err, grown = imported(source, *flags)
        assert (status, err.count("\n")) == (1, 1), err
        assert match in err
        assert grown < LIMIT

    return run
