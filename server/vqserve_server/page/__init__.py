"""The console: a read-only page about a running server, as plain files that a browser reads without a build.

It reads only /metrics and /codebooks.json, so all that it shows is also there for other programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_FOLDER = Path(__file__).parent
_INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing but the page's own files is loaded or run, no text becomes HTML or a script, and no other page may frame it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
# Of every file, beside those of all answers of the metrics port.
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": _POLICY,
        "Cross-Origin-Opener-Policy": "same-origin",
        # After an upgrade the page is the new server's.
        "Cache-Control": "no-cache",
    }
)


@dataclass(frozen=True)
class PageFile:
    """A file as HTTP sends it."""

    content_type: str
    body: bytes


def page_files() -> Mapping[str, PageFile]:
    """Read the page's files; return them by the path of their URL: "/" and "/page/NAME"."""
    files = {
        f"/page/{path.name}": PageFile(_TYPES[path.suffix], path.read_bytes())
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in _TYPES
    }
    return {"/": files.pop(f"/page/{_INDEX}"), **files}
