"""The reader of a file, by its suffix; whatever a reader raises becomes one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vqserve.errors import ForeignCheckpointError
from vqserve_server.codebooks.safetensors_file import ContainerError
from vqserve_tools.importing.files.foreign_array import LONG_NAME, MAX_NAME_CHARACTERS, ForeignArray
from vqserve_tools.importing.files.numpy_files import open_npy, open_npz
from vqserve_tools.importing.files.safetensors_files import open_safetensors
from vqserve_tools.importing.files.torch_files import TORCH_SUFFIXES, open_torch


@contextmanager
def open_foreign(path: Path) -> Iterator[Mapping[str, ForeignArray]]:
    """Open a file and yield its arrays by name; they are valid inside the `with`.

    Nested dictionaries give dotted names; values that are not arrays are left out. A `state_dict` or `model` around the
    whole model is removed from the names.

    Raises:
        ForeignCheckpointError: the file cannot be read, or not without trusting it; the error says why in one line.
    """
    suffix = path.suffix.lower()
    readers = {".npy": open_npy, ".npz": open_npz, ".safetensors": open_safetensors}
    reader = open_torch if suffix in TORCH_SUFFIXES else readers.get(suffix)
    if reader is None:
        known = ", ".join([*readers, *sorted(TORCH_SUFFIXES)])
        raise ForeignCheckpointError(f"{path.name}: files of type {suffix!r} are not read, only {known}")
    try:
        if not path.is_file():
            what = "it is no regular file" if path.exists() else "there is no such file"
            raise ForeignCheckpointError(f"{path.name}: {what}")
        with reader(path) as arrays:
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
