"""Which codebook made the tokens in files: as a sidecar says it, or the manifest of the output that they are in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vqserve_client.bulk.records import MANIFEST, read_manifest
from vqserve_client.provenance import read_sidecar
from vqserve_data.errors import FileError


def common_origin(paths: Iterable[Path]) -> dict[str, Any] | None:
    """Return what made the tokens in these files; None: nothing says it.

    Raises:
        FileError: two codebooks made them, a sidecar is damaged, or a file has no tokens without others.
    """
    first: tuple[Path, dict[str, Any]] | None = None
    outputs: dict[Path, dict[str, Any] | None] = {}
    for path in paths:
        made_by = read_sidecar(path)
        if made_by is None:
            if path.parent not in outputs:
                outputs[path.parent] = _of_output(path.parent)
            made_by = outputs[path.parent]
            if made_by is not None and made_by["format"]["name"] == "stream":
                raise FileError(f"{path} is of a stream of tokens, which is decoded as a whole: name its folder")
        if made_by is None:
            continue
        if first is None:
            first = path, made_by
        elif any(first[1][part] != made_by[part] for part in ("codebook", "options")):
            raise FileError(f"{first[0]} and {path} were made by other codebooks or options: decode them apart")
    return None if first is None else first[1]


def _of_output(folder: Path) -> dict[str, Any] | None:
    """Return what made the output that a folder is in; None: it is in none."""
    place = folder.resolve()
    for above in (place, *place.parents):
        if not (above / MANIFEST).is_file():
            continue
        try:
            manifest = read_manifest(above)
        except FileError:
            # Other programs have manifests, too.
            continue
        if manifest is not None and manifest["job"]["operation"] == "encode":
            job: dict[str, Any] = manifest["job"]
            return job
    return None
