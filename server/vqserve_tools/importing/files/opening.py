"""Opening a checkpoint of one or several files; whatever the reader of a file raises becomes one line."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from vqserve.errors import ForeignCheckpointError
from vqserve.safetensors_file import ContainerError
from vqserve_data.foreign.foreign_array import LONG_NAME, MAX_NAME_CHARACTERS, ForeignArray
from vqserve_data.foreign.torch_files import TORCH_SUFFIXES, open_torch
from vqserve_tools.importing.files.numpy_files import open_npy, open_npz
from vqserve_tools.importing.files.recognition import NO_ARRAYS, Format, format_of
from vqserve_tools.importing.files.safetensors_files import open_safetensors
from vqserve_tools.importing.files.weights import Weights, weights_of

_READERS: Mapping[Format, Callable[[Path], AbstractContextManager[Mapping[str, ForeignArray]]]] = {
    Format.NPY: open_npy,
    Format.NPZ: open_npz,
    Format.SAFETENSORS: open_safetensors,
    Format.TORCH: open_torch,
}
_SUFFIXES: Mapping[str, Format] = {
    ".npy": Format.NPY,
    ".npz": Format.NPZ,
    ".safetensors": Format.SAFETENSORS,
    **dict.fromkeys(sorted(TORCH_SUFFIXES), Format.TORCH),
}


@contextmanager
def open_foreign(source: Path) -> Iterator[Mapping[str, ForeignArray]]:
    """Open a checkpoint and yield its arrays by name; they are valid inside the `with`.

    The content of a file determines its format, or the suffix if the content does not. Nested dictionaries give dotted
    names; values that are not arrays are left out. A `state_dict` or `model` around the whole model is removed from the
    names.

    Args:
        source: a file, an index of several files, or a folder with the weights of one model.

    Raises:
        ForeignCheckpointError: a file cannot be read, or not without trusting it, or arrays are missing; the error says
            why in one line.
    """
    weights = weights_of(source)
    with ExitStack() as stack:
        files = {name: stack.enter_context(_open_file(path)) for name, path in weights.files.items()}
        if len(files) == 1 and not weights.places:
            [arrays] = files.values()
            yield arrays
            return
        yield _merged(weights, files)


def _merged(weights: Weights, files: Mapping[str, Mapping[str, ForeignArray]]) -> dict[str, ForeignArray]:
    """Return the arrays of all files.

    Raises:
        ForeignCheckpointError: two files have an array, or a file lacks an array that the index has there.
    """
    merged: dict[str, ForeignArray] = {}
    places: dict[str, str] = {}
    for file, arrays in files.items():
        for name, array in arrays.items():
            if name in merged:
                raise ForeignCheckpointError(f"{weights.name}: {places[name]} and {file} both have {name!r}")
            merged[name], places[name] = array, file
    for name, file in weights.places.items():
        if places.get(name) != file:
            where = f"which is in {places[name]}" if name in places else "which it has not"
            raise ForeignCheckpointError(f"{weights.name}: the index has {name[:200]!r} in {file}, {where}")
    return merged


@contextmanager
def _open_file(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    try:
        if not path.is_file():
            what = "it is no regular file" if path.exists() else "there is no such file"
            raise ForeignCheckpointError(f"{path.name}: {what}")
        with _READERS[_format(path)](path) as arrays:
            if max(map(len, arrays), default=0) > MAX_NAME_CHARACTERS:
                raise ForeignCheckpointError(f"{path.name}: {LONG_NAME}")
            yield arrays
    except ForeignCheckpointError:
        raise
    except ContainerError as error:
        raise ForeignCheckpointError(f"{path.name}: it {error}") from None
    except MemoryError:
        raise ForeignCheckpointError(f"{path.name}: it claims more memory than this machine has") from None
    # On a damaged file the parsers of numpy, zipfile and torch raise exceptions of many types.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ForeignCheckpointError(f"{path.name}: it cannot be read: {reason}") from error


def _format(path: Path) -> Format:
    suffix = path.suffix.lower()
    found = format_of(path) or _SUFFIXES.get(suffix)
    if found is None:
        what = f"files of type {suffix!r} are not read, only {', '.join(_SUFFIXES)}"
        raise ForeignCheckpointError(f"{path.name}: {NO_ARRAYS if zipfile.is_zipfile(path) else what}")
    return found
