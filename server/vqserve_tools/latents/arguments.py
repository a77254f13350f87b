"""The files that a user names as sources of latents."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from vqserve.errors import InvalidOption, escape
from vqserve_data.errors import FileError
from vqserve_data.readers import suffix_of
from vqserve_data.readers.protocol import SourceFile
from vqserve_data.sources import Found, find
from vqserve_tools.latents.options import SourceOptions


def one_array(sources: Sequence[str], options: SourceOptions) -> Path | None:
    """Return the one .npy file that the sources are, which is read as a whole; None: they are a data set."""
    if len(sources) != 1 or options != SourceOptions(max_errors=options.max_errors):
        return None
    [source] = sources
    path = Path(source)
    if "://" in source or path.is_dir() or (glob.has_magic(source) and not path.exists()):
        return None
    is_npy = path.suffix.lower() == ".npy"
    # A file of an unknown suffix may be one, too: its content decides.
    return path if is_npy or (path.exists() and suffix_of(source) is None) else None


def find_files(sources: Sequence[str]) -> Found:
    """Return the files of a data set.

    Raises:
        InvalidOption: a source names nothing that can be read.
    """
    try:
        return find(sources)
    except FileError as error:
        raise InvalidOption(escape(str(error))) from None


def digest_of(files: Sequence[SourceFile]) -> str:
    """Return the SHA-256 of the keys, sizes and versions of files, in lower-case hexadecimal."""
    sha256 = hashlib.sha256()
    for file in files:
        sha256.update(f"{file.key}\0{file.size}\0{file.version}\n".encode("utf-8", "surrogateescape"))
    return sha256.hexdigest()


def title_of(source: str) -> str:
    """Return a source for a text that leaves the machine: the last part of a path, a URL without secrets."""
    if "://" not in source:
        path = Path(source)
        return path.name or path.resolve().name
    # Links of a chain, such as zip://a.npy::s3://bucket/b.zip.
    return "::".join(_title_of_link(link) if "://" in link else link for link in source.split("::"))


def _title_of_link(link: str) -> str:
    url = urlsplit(link)
    if url.scheme in {"file", "local"}:
        return Path(url.path).name
    return f"{url.scheme}://{url.hostname or ''}{url.path}"
