"""Files behind the URLs that fsspec knows: s3://, gs://, hf://, https://, memory:// and so on, and chains of them."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from vqserve_data.errors import FileError, MissingLibrary
from vqserve_data.keys import one_line

# Bytes that are asked for at once; the next ones are fetched meanwhile.
_BLOCK_BYTES = 8 << 20
_MAX_BLOCKS = 4
# What stores call the tag or the time of a content, the best first.
_TAGS = (
    "ETag", "etag", "xet_hash", "blob_id", "md5Hash", "content_hash", "checksum", "Content-MD5", "Digest", "crc",
    "generation", "Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created",
)  # fmt: skip
# What describes a Zarr store that cannot be listed.
_STORE_METADATA = ("zarr.json", ".zmetadata", ".zgroup", ".zarray")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file behind a URL, or a folder that counts as one.

    Attributes:
        fs: the file system of fsspec.
        location: path in it.
        is_store: whether it is a folder.
    """

    name: str
    key: str
    size: int
    version: str
    fs: Any = field(repr=False, compare=False)
    location: str = field(repr=False)
    is_store: bool = False

    @property
    def path(self) -> Path | None:
        """None: it is remote."""
        return None

    def changed(self) -> bool:
        """Look at it again: whether it was removed, or has another version than when it was found.

        Raises:
            FileError: the store does not answer.
        """
        try:
            with _named(self.name):
                self.fs.invalidate_cache()
                if self.is_store:
                    return _stamp_of_store(self.fs, self.location)[1] != self.version
                return _stamp(self.fs.info(self.location))[1] != self.version
        except FileError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return True
            raise

    def open(self) -> IO[bytes]:
        """Open it for reading, with read-ahead. What a server cannot give in parts is copied to a temporary file first.

        Raises:
            FileError: it cannot be opened.
        """
        with _named(self.name):
            file: IO[bytes] = self.fs.open(
                self.location,
                "rb",
                block_size=_BLOCK_BYTES,
                cache_type="background",
                cache_options={"maxblocks": _MAX_BLOCKS},
            )
            # fsspec's file of no size, or of a size that the server does not say, cannot seek, but says that it can.
            if file.seekable() and self.size:
                return file
            with file:
                whole = tempfile.TemporaryFile()  # noqa: SIM115
                shutil.copyfileobj(file, whole)
            whole.seek(0)
            return whole


@dataclass(frozen=True, slots=True)
class RemotePath:
    """What a URL names, before it has a key.

    Attributes:
        name: its URL.
        relative: path below the folder or the fixed part of the pattern, or its last part.
    """

    name: str
    relative: str
    fs: Any
    location: str
    info: Mapping[str, Any] | None

    def with_key(self, key: str) -> RemoteFile:
        """Return the file.

        Raises:
            FileError: the store does not answer.
        """
        if self.info is not None:
            return RemoteFile(self.name, key, *_stamp(self.info), self.fs, self.location)
        with _named(self.name):
            return RemoteFile(self.name, key, *_stamp_of_store(self.fs, self.location), self.fs, self.location, True)


def is_url(argument: str) -> bool:
    """Return whether an argument is a URL and no path."""
    return "://" in argument and not argument.startswith("file://") and not Path(argument).exists()


def without_secrets(url: str) -> str:
    """Return a URL, or a chain of them, without passwords and signatures: it is written into records and errors."""
    links = []
    for link in url.split("::"):
        scheme, separator, rest = link.partition("://")
        if separator and scheme in {"http", "https"}:
            rest = rest.partition("#")[0].partition("?")[0]
        host, slash, path = rest.partition("/")
        links.append(f"{scheme}{separator}{host.rpartition('@')[2] if separator else host}{slash}{path}")
    return "::".join(links)


def path_of(name: str) -> str:
    """Return the path in a URL, such as that of the first file of a chain of them; a path as it is."""
    if "://" not in name:
        return name
    url = next(link for link in name.split("::") if "://" in link)
    if url.startswith(("http://", "https://")):
        url = url.partition("#")[0].partition("?")[0]
    return url.partition("://")[2]


def list_url(url: str, *, is_file: bool, store: str) -> tuple[list[RemotePath], bool]:
    """Return what a URL names: a file, a folder's files, or those that match a pattern.

    Args:
        url: URL that fsspec knows.
        is_file: whether its name is that of a file, so that it is not looked at as a folder.
        store: suffix of folders that count as one file.

    Returns:
        The paths, and whether it is one that the URL names itself.

    Raises:
        FileError: there is nothing, or the store does not answer.
        MissingLibrary: there is no fsspec.
    """
    try:
        from fsspec.core import url_to_fs  # noqa: PLC0415
    except ImportError as error:
        raise MissingLibrary(f"reading {url}", extra="url") from error
    with _named(without_secrets(url)):
        fs, location = url_to_fs(url)
        location = location.rstrip("/")
        is_http = url.startswith(("http://", "https://"))
        if any(mark in location for mark in ("*[" if is_http else "*?[")):
            found = fs.glob(location, detail=True)
            base = location[: min(location.find(mark) for mark in "*?[" if mark in location)].rpartition("/")[0]
            return list(_paths(url, fs, base, found, store)), False
        last = location.partition("?")[0].rpartition("/")[2]
        if last.endswith(store):
            return [RemotePath(without_secrets(url), last, fs, location, None)], True
        info = None if is_http and url.endswith("/") else fs.info(location)
        if info is not None and (is_file or info["type"] != "directory"):
            return [RemotePath(without_secrets(url), last, fs, location, info)], True
        return list(_paths(url, fs, location, fs.find(location, detail=True), store)), False


def _paths(url: str, fs: Any, base: str, found: Mapping[str, Mapping[str, Any]], store: str) -> Iterator[RemotePath]:
    stores = set()
    for location, info in found.items():
        relative = location.removeprefix(base).strip("/")
        parts = relative.split("/")
        if any(part.startswith(".") for part in parts[:-1]):
            continue
        depth = next((at for at, part in enumerate(parts, 1) if part.endswith(store)), None)
        if depth is not None:
            relative = "/".join(parts[:depth])
            if relative not in stores:
                stores.add(relative)
                place = f"{base}/{relative}"
                yield RemotePath(without_secrets(_url_of(url, fs, place)), relative, fs, place, None)
        elif info["type"] == "file" and not parts[-1].startswith("."):
            yield RemotePath(without_secrets(_url_of(url, fs, location)), relative, fs, location, info)


def _url_of(url: str, fs: Any, location: str) -> str:
    """Return the URL of a path in a file system that was found by a URL, maybe a chain of them."""
    link, chained, rest = url.partition("::")
    if not chained:
        return str(fs.unstrip_protocol(location))
    protocol, separator, _ = link.partition("://")
    if separator:
        return f"{protocol}://{location.lstrip('/')}::{rest}"
    return f"{link}::{rest.partition('://')[0]}://{location.lstrip('/')}"


def _stamp(info: Mapping[str, Any]) -> tuple[int, str]:
    """Return the size of a file and the text that changes with its content."""
    size = info.get("size")
    tag = next((info[name] for name in _TAGS if info.get(name) is not None), "")
    if isinstance(tag, datetime):
        # Some stores give a number in one listing and a time in another.
        tag = tag.timestamp()
    return size or 0, f"{size}-{tag}"


def _stamp_of_store(fs: Any, location: str) -> tuple[int, str]:
    """Return the same of a folder: of all its files; where they cannot be listed, no size and that of its description.

    Raises:
        FileNotFoundError: there is nothing.
    """
    try:
        found = fs.find(location, detail=True)
    except (OSError, NotImplementedError):
        found = {}
    if found:
        stamps = {path.removeprefix(location): _stamp(info) for path, info in found.items()}
        return sum(size for size, _ in stamps.values()), _hash(f"{path}:{stamps[path][1]}" for path in sorted(stamps))
    contents = {}
    for name in _STORE_METADATA:
        try:
            contents[name] = fs.cat_file(f"{location}/{name}")
        except FileNotFoundError:
            continue
    if not contents:
        raise FileNotFoundError(location)
    return 0, _hash(f"{name}:{hashlib.sha256(content).hexdigest()}" for name, content in contents.items())


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Turn what a store raises, which can be of any type, into a FileError."""
    try:
        yield
    except FileError:
        raise
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            # fsspec says so of a server that it cannot connect to, too.
            raise FileError(f"cannot read {url}: {one_line(error.__cause__)}") from error.__cause__
        raise FileError(f"{url}: there is no such file") from error
    except ImportError as error:
        raise FileError(f"{url} needs a library that is not installed: {one_line(error)}") from error
    except Exception as error:
        raise FileError(f"cannot read {url}: {one_line(error)}") from error
