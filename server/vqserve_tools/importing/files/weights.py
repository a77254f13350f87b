"""Which files are one checkpoint: a file, the parts that an index lists, or the weights in a folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vqserve.errors import ForeignCheckpointError
from vqserve_data.foreign.torch_files import TORCH_SUFFIXES
from vqserve_tools.importing.files.json_files import read_json

_SUFFIXES = frozenset({".npy", ".npz", ".safetensors", *TORCH_SUFFIXES})
# As many files are open at the same time; a process may have 1024. The largest models have some 200 parts.
_MAX_FILES = 512
# Entries of a folder that are looked at.
_MAX_ENTRIES = 10_000
_MAX_INDEX_BYTES = 16 << 20
_MAX_FILE_CHARACTERS = 200
_INDEX = re.compile(r".+\.index(\.[\w-]+)?\.json")
_PART = re.compile(r"(?P<before>.*?)[-_.]?(?P<number>\d+)[-_.]of[-_.](?P<count>\d+)(?P<after>.*)", re.IGNORECASE)
# What trainers write beside the weights.
_NO_MODEL = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state(_\d+)?)\.(pt|pth|bin)")
# Names of one model's weights in two formats; as in transformers and diffusers, the first that exists is read.
_SAME = (
    ("model.safetensors", "pytorch_model.bin"),
    ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
)
# What a folder without weights is, by a name in it.
_FOLDERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"zero_to_fp32\.py"),
        "it is a DeepSpeed checkpoint: run its zero_to_fp32.py, and import the file that it writes",
    ),
    (
        re.compile(r".*\.distcp"),
        "it is a folder of torch.distributed.checkpoint: run python -m torch.distributed.checkpoint.format_utils "
        "dcp_to_torch FOLDER weights.pt, and import weights.pt",
    ),
    (
        re.compile(r".*\.data-\d+-of-\d+|saved_model\.pb"),
        "it is a TensorFlow checkpoint: read it with tf.train.load_checkpoint, save the codebook's array with "
        "numpy.save, and import that",
    ),
    (
        re.compile(r"_METADATA|_CHECKPOINT_METADATA|manifest\.ocdbt|.*\.msgpack"),
        "it is a checkpoint of JAX (Flax, Orbax): restore it where it was made, save the codebook's array with "
        "numpy.save, and import that",
    ),
    (re.compile(r".*\.(incomplete|part|crdownload)"), "a download into it is not complete: download again"),
)


@dataclass(frozen=True)
class Weights:
    """The files of one checkpoint.

    Attributes:
        name: name of the checkpoint, for messages.
        files: the files with arrays, by the name that messages have; all of them exist.
        places: the file of each array as an index has it; empty without an index.
        index: the index, or None.
    """

    name: str
    files: Mapping[str, Path]
    places: Mapping[str, str] = field(default_factory=dict)
    index: Path | None = None

    def provenance(self) -> dict[str, object]:
        """Return the name and the SHA-256 of what was read, as a codebook file records them.

        The SHA-256 of several files is that of the text that `sha256sum` prints for them, sorted by name: a line of
        digest, two spaces and name for each. `source_files` has the digests themselves.

        Raises:
            OSError: a file cannot be read.
        """
        digests = {name: _sha256(path) for name, path in sorted(self.files.items())}
        if len(digests) == 1 and self.index is None:
            [digest] = digests.values()
            return {"source": self.name, "source_sha256": digest}
        if self.index is not None:
            digests = dict(sorted({**digests, self.index.name: _sha256(self.index)}.items()))
        text = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
        whole = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
        return {"source": self.name, "source_sha256": whole, "source_files": digests}


def weights_of(source: Path) -> Weights:
    """Return the files of the checkpoint that a file, an index or a folder stands for.

    Raises:
        ForeignCheckpointError: a folder has no weights, or those of several models; an index is damaged, or files that
            it lists are missing.
    """
    if source.is_dir():
        return _of_folder(source)
    if _INDEX.fullmatch(source.name) and source.is_file():
        return _checked(_read_index(source, source.name))
    return Weights(source.name, {source.name: source})


def check_whole(source: Path) -> None:
    """Check that a file is not one of several parts of a checkpoint, by its name.

    Raises:
        ForeignCheckpointError: it is a part; the error says how to import the checkpoint.
    """
    match = _part(source.name)
    if source.is_dir() or match is None:
        return
    what = f"{source.name}: it is part {int(match['number'])} of {int(match['count'])} of a checkpoint"
    beside = _names(source.parent)
    indices = [name for name in beside if _INDEX.fullmatch(name)]
    if len(indices) == 1:
        raise ForeignCheckpointError(f"{what}: import all parts, by their index {indices[0]} or by their folder")
    if _missing_parts(match, beside):
        raise ForeignCheckpointError(
            f"{what}, and the other parts may have more of the quantizer: put them beside it and import the folder "
            "(--key with one name imports one array of this part)"
        )
    raise ForeignCheckpointError(f"{what}: import all parts, by their folder")


def has_one_model(source: Path) -> bool:
    """Return whether a file or an index is of the model of its folder, and not one of several there."""
    if any(source.name == name or source.name.startswith(f"{name}.index.") for names in _SAME for name in names):
        return True
    try:
        weights = weights_of(source.parent)
    except ForeignCheckpointError:
        return False
    return source.name in weights.files or (weights.index is not None and source.name == weights.index.name)


def _of_folder(folder: Path) -> Weights:
    name = folder.absolute().name
    beside = _names(folder)
    candidates = {index: _read_index(folder / index, f"{name}/{index}") for index in beside if _INDEX.fullmatch(index)}
    indexed = {file for weights in candidates.values() for file in weights.files}
    for file in beside:
        suffix = PurePosixPath(file).suffix.lower()
        if file not in indexed and suffix in _SUFFIXES and not _NO_MODEL.fullmatch(file):
            part = _part(file)
            label = f"{part['before']}-*-of-{part['count']}{part['after']}" if part else file
            files = candidates[label].files if label in candidates else {}
            candidates[label] = Weights(f"{name}/{label}", {**files, file: folder / file})
    for label in _second_formats(candidates):
        del candidates[label]
    if len(candidates) > 1:
        # Downloads of one format have the index of the other format too.
        candidates = {
            label: weights for label, weights in candidates.items() if any(map(Path.is_file, weights.files.values()))
        } or candidates
    if not candidates:
        raise ForeignCheckpointError(f"{name}: {_no_weights(folder, beside)}")
    if len(candidates) > 1:
        raise ForeignCheckpointError(
            f"{name}: it has weights of several models: name one of {_listed(sorted(candidates))}"
        )
    [weights] = candidates.values()
    part = _part(next(iter(weights.files)))
    missing = _missing_parts(part, weights.files) if part and weights.index is None else []
    if missing:
        raise ForeignCheckpointError(
            f"{weights.name}: {_listed(missing)} is missing, which may have more of a quantizer"
        )
    return _checked(weights)


def _second_formats(labels: Iterable[str]) -> list[str]:
    """Return the labels of weights that the folder has in a preferred format too."""
    found = []
    for stems in _SAME:
        formats = [
            label for stem in stems for label in sorted(labels) if label == stem or label.startswith(f"{stem}.index.")
        ]
        found += formats[1:]
    return found


def _read_index(path: Path, name: str) -> Weights:
    """Return the files of an index of transformers or diffusers: JSON with the file of each array in `weight_map`.

    Raises:
        ForeignCheckpointError: it is no index, or a file would be outside its folder.
    """
    places = read_json(path, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ForeignCheckpointError(f"{name}: it has no weight_map with the file of each array: it is no index")
    files = sorted(set(places.values()))
    for file in files:
        parts = file.replace("\\", "/").split("/")
        is_name = file.isprintable() and len(file) <= _MAX_FILE_CHARACTERS
        if not is_name or file.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", file):
            raise ForeignCheckpointError(f"{name}: its file {file[:200]!r} is not in the folder of the index")
    return Weights(name, {file: path.parent / file for file in files}, places, path)


def _checked(weights: Weights) -> Weights:
    """Return the weights, whose files are all there.

    Raises:
        ForeignCheckpointError: a file is missing, or there are too many.
    """
    if len(weights.files) > _MAX_FILES:
        raise ForeignCheckpointError(f"{weights.name}: it has {len(weights.files)} files, more than {_MAX_FILES}")
    # A link to a regular file, as the caches of hubs have them, is one.
    missing = [file for file, path in weights.files.items() if not path.is_file()]
    if missing:
        raise ForeignCheckpointError(
            f"{weights.name}: of its {len(weights.files)} files {_listed(missing)} is missing, which may have more of "
            "a quantizer"
        )
    return weights


def _part(name: str) -> re.Match[str] | None:
    """Return the name of a file with its number and the count of the parts, if there are several."""
    match = _PART.fullmatch(name)
    return None if match is None or int(match["count"]) < 2 else match


def _missing_parts(part: re.Match[str], beside: Iterable[str]) -> list[str]:
    """Return the names of the missing parts of a checkpoint, of which `part` is one."""
    count = int(part["count"])
    if count > _MAX_FILES:
        return [f"part 1 to {count}"]
    there = {
        int(match["number"])
        for match in map(_part, beside)
        if match and all(match[group] == part[group] for group in ("before", "count", "after"))
    }
    # Some writers count from 0.
    first = 0 if 0 in there else 1
    return [f"part {number} of {count}" for number in range(first, first + count) if number not in there]


def _no_weights(folder: Path, beside: Iterable[str]) -> str:
    """Return what a folder is that has no weights."""
    links = sorted(path.name for path in folder.iterdir() if path.is_symlink() and not path.exists())
    if any(map(_is_weights, links)):
        return f"{_listed(filter(_is_weights, links))} is a link to a file that is not there: download it again"
    for pattern, what in _FOLDERS:
        if any(pattern.fullmatch(name) for name in beside):
            return what
    folders = [f"{inner.name}/{deeper}" for inner in [folder / "snapshots"] for deeper in _folders(inner)]
    folders = folders or [name for name in _folders(folder) if any(_is_weights(file) for file in _names(folder / name))]
    if folders:
        return f"it has no weights itself: name a folder in it, {_listed(folders)}"
    return f"it has no weights ({', '.join(sorted(_SUFFIXES))}, or an index)"


def _is_weights(name: str) -> bool:
    return bool(_INDEX.fullmatch(name)) or PurePosixPath(name).suffix.lower() in _SUFFIXES


def _names(folder: Path) -> list[str]:
    """Return the names of the regular files in a folder, and of links to them, sorted."""
    return _entries(folder, want_folders=False)


def _folders(folder: Path) -> list[str]:
    return _entries(folder, want_folders=True)


def _entries(folder: Path, *, want_folders: bool) -> list[str]:
    names = []
    try:
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number == _MAX_ENTRIES:
                    raise ForeignCheckpointError(
                        f"{folder.name}: it has more than {_MAX_ENTRIES} files, too many to look at"
                    )
                if entry.is_dir() if want_folders else entry.is_file():
                    names.append(entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ForeignCheckpointError(f"{folder.name}: it cannot be listed: {error.strerror}") from None
    return sorted(names)


def _listed(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
