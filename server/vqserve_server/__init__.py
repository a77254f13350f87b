"""The vqserve server: codebooks, exact search, batching, gRPC.

`Tokenizer` is imported on first use, so that the command line can say what to install where torch is missing.
"""

from typing import TYPE_CHECKING

from vqserve import __version__

if TYPE_CHECKING:
    from vqserve_server.tokenizer import Tokenizer

__all__ = ["Tokenizer", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Tokenizer":
        from vqserve_server.tokenizer import Tokenizer  # noqa: PLC0415

        return Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
