"""The vqserve server: codebooks, exact search, batching, gRPC.

`Tokenizer` is imported on first use, so that the command line can say what to install where the extra is missing.
"""

from typing import TYPE_CHECKING

from vqserve import __version__
from vqserve_server import extra
from vqserve_server.extra import missing_package

if TYPE_CHECKING:
    from vqserve_server.tokenizer import Tokenizer

__all__ = ["Tokenizer", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Tokenizer":
        try:
            extra.check_server_extra()
            from vqserve_server.tokenizer import Tokenizer  # noqa: PLC0415
        except ModuleNotFoundError as error:
            text = missing_package(error)
            if text is None:
                raise
            raise ImportError(f"Tokenizer cannot be imported: {text}", name=error.name) from error
        return Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
