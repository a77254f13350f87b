"""What is public, exactly: a name that leaks or vanishes fails here."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

import vqserve
import vqserve_client

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
    "ProtocolError",
    "ServerError",
    "TokenBeyondRange",
    "Unavailable",
    "VqserveClientError",
    "VqserveError",
    "__version__",
]
PUBLIC = {
    "vqserve": CLIENT,
    "vqserve_client": CLIENT,
    "vqserve_server": ["Tokenizer", "__version__"],
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
# What the modules need for themselves.
_OWN = {"TYPE_CHECKING", "annotations", "import_module"}
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
