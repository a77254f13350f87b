"""What is public, exactly: a name that leaks or vanishes fails here."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import vqserve
import vqserve_client

ROOT = Path(__file__).parents[1]
# The pages for users: docs/extending.md is for contributors, who use internal modules.
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").glob("**/*.md")} - {ROOT / "docs/extending.md"})]
CLIENT = [
    "AccessDenied",
    "AsyncClient",
    "Cancelled",
    "Client",
    "Closed",
    "CodebookInfo",
    "CodebookNotFound",
    "DeadlineExceeded",
    "DeviceBroken",
    "DigestChanged",
    "DigestMismatch",
    "Draining",
    "IndexOutOfRange",
    "InvalidArgument",
    "InvalidDtype",
    "InvalidOption",
    "InvalidShape",
    "Layout",
    "MessageTooLarge",
    "NonFiniteLatents",
    "NotAnArray",
    "Overloaded",
    "PermissionDenied",
    "ProtocolError",
    "ServerError",
    "ServerInfo",
    "Tls",
    "TokenBeyondRange",
    "Unauthenticated",
    "Unavailable",
    "VqserveError",
    "__version__",
]
PUBLIC = {
    "vqserve": CLIENT,
    "vqserve_client": CLIENT,
    "vqserve_client.admin": [
        "AdminClient",
        "LiveCodebook",
        "LogLevel",
        "WorkerDrain",
        "WorkerLogLevel",
        "WorkerReload",
        "WorkerStatus",
    ],
    "vqserve_bench": [
        "ClosedLoop",
        "Latency",
        "Measurement",
        "OpenLoop",
        "Request",
        "Schedule",
        "Server",
        "decode_stats",
        "encode_stats",
        "measure",
    ],
    "vqserve_client.bulk": [
        "BadItem",
        "ConversionOptions",
        "Entry",
        "FileError",
        "Item",
        "JobOptions",
        "Limits",
        "MissingLibrary",
        "RawItem",
        "Reader",
        "Selection",
        "Shard",
        "SourceFile",
        "Summary",
        "TooManyErrors",
        "Writer",
        "Written",
        "add_reader",
        "add_writer",
        "decode",
        "encode",
    ],
    "vqserve_data.stream": ["TokenStream"],
    "vqserve_server": ["Tokenizer", "__version__"],
    "vqserve_server.codebooks": ["Codebook", "codebook_digest", "load_codebook", "save_codebook"],
    "vqserve_server.quantizers": [
        "AbstractQuantizer",
        "CosineQuantizer",
        "DotQuantizer",
        "EMAVectorQuantizer",
        "EmbeddingEMA",
        "FiniteScalarQuantizer",
        "FrozenQuantizer",
        "GumbelQuantizer",
        "LookupFreeQuantizer",
        "Quantizer",
        "ResidualFiniteScalarQuantizer",
        "ResidualQuantizer",
        "VectorQuantizer",
        "VectorQuantizerWithInputProjection",
        "freeze",
        "legacy_weight_norm_names",
        "measure_perplexity",
    ],
}
# Public modules without a list of names: docs/errors.md, the types of options, and the generated code.
UNLISTED = {"vqserve.errors", "vqserve.types", "vqserve.v1"}
# What the modules need for themselves.
_OWN = {"TYPE_CHECKING", "annotations", "import_module", "missing_package", "renamed", "warn_renamed"}
LIGHT = """
import sys
import vqserve
assert not {name.partition(".")[0] for name in sys.modules} & {"grpc", "google", "numpy", "torch", "vqserve_client"}
dir(vqserve)
assert "vqserve_client" not in sys.modules
from vqserve import CodebookInfo, InvalidArgument
assert not {name.partition(".")[0] for name in sys.modules} & {"grpc", "google", "numpy", "torch", "vqserve_client"}
from vqserve import Client
import vqserve_client
assert Client is vqserve_client.Client
assert "torch" not in sys.modules and "vqserve_server" not in sys.modules
"""


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_names_are_these(name):
    module = importlib.import_module(name)
    assert module.__all__ == PUBLIC[name]
    assert all(hasattr(module, public) for public in module.__all__)
    plain = {
        found
        for found in dir(module)
        if not found.startswith("_") and not isinstance(getattr(module, found), ModuleType)
    }
    assert plain - _OWN == set(PUBLIC[name]) - {"__version__"}


def test_the_documentation_lists_the_public_modules():
    section = (ROOT / "docs/client.md").read_text().partition("| Module | Public names |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| ")]
    assert {name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)} == set(PUBLIC) | UNLISTED


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_import_public_names_only(page):
    imports = re.findall(r"\bfrom (vqserve[\w.]*) import ([\w, ]+|\.\.\.)", page.read_text())
    for module, names in imports:
        if module.startswith("vqserve.v1"):
            continue
        assert module in {*PUBLIC, *UNLISTED}
        for name in re.findall(r"(\w+)(?: as \w+)?,?", names):
            assert name in PUBLIC.get(module, [name])


def test_importing_vqserve_is_light_and_its_names_come_when_they_are_used():
    ended = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_name_is_the_same_in_both_packages():
    assert all(getattr(vqserve, name) is getattr(vqserve_client, name) for name in CLIENT)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'vqserve' has no attribute 'Klient'"):
        vqserve.Klient  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Klient' from 'vqserve'"):
        exec("from vqserve import Klient")  # noqa: S102


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("vqserve", "VqserveClientError", "VqserveError"),
        ("vqserve_client", "VqserveClientError", "VqserveError"),
        ("vqserve_client.errors", "VqserveClientError", "VqserveError"),
        ("vqserve_bench", "Closed", "ClosedLoop"),
        ("vqserve_bench", "Open", "OpenLoop"),
        ("vqserve_server.errors", "InvalidRequest", "InvalidArgument"),
        ("vqserve_server.errors", "UnknownCodebook", "CodebookNotFound"),
        ("vqserve_server.errors", "DeadlineExpired", "DeadlineExceeded"),
    ],
)
def test_an_old_name_works_and_every_use_warns(module: str, old: str, new: str) -> None:
    home = "vqserve_bench.load" if module == "vqserve_bench" else "vqserve.errors"
    kind = getattr(importlib.import_module(home), new)
    says = rf"^{module}\.{old} is {home}\.{new} now; the old name goes with the next release$"
    for _ in range(2):
        with pytest.warns(DeprecationWarning, match=says) as caught:
            assert getattr(importlib.import_module(module), old) is kind
        assert [warning.filename for warning in caught] == [__file__]
    names: dict[str, type[Exception]] = {}
    with pytest.warns(DeprecationWarning, match=says):
        exec(f"from {module} import {old}", names)  # noqa: S102
    assert names[old] is kind
    if issubclass(kind, Exception):
        with pytest.raises(names[old]):
            raise kind("x")
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'Nothing'"):
        _ = importlib.import_module(module).Nothing


@pytest.mark.parametrize(
    "module", ["vqserve", "vqserve_client", "vqserve_client.errors", "vqserve_server.errors", "vqserve_bench"]
)
def test_no_old_name_is_used_here(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(f"from {module} import *", {})  # noqa: S102
