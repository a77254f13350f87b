"""The sources that a user names, opened for reading, and what a user is told about items that were left out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vqserve.errors import InvalidOption, escape
from vqserve.layout import Layout
from vqserve.text import printable
from vqserve_data.readers.protocol import SourceFile
from vqserve_data.sources import Found
from vqserve_server.codebook_files import SUFFIX
from vqserve_server.codebooks.file import is_codebook_file
from vqserve_tools.latents.arguments import digest_of, find_files, one_array, title_of
from vqserve_tools.latents.dataset import DataSet, bad_text
from vqserve_tools.latents.options import SourceOptions
from vqserve_tools.latents.rows import counted


class Sources:
    """What a user names: one .npy file, which is read as a whole, or a data set.

    Attributes:
        array: the .npy file; None: it is a data set.
        paths: local files that are read. Codebook files are not: their tensors are no latents.
    """

    def __init__(self, names: Sequence[str], options: SourceOptions | None = None) -> None:
        """Find the files.

        Args:
            names: files, folders, globs and URLs.
            options: how they are read.

        Raises:
            InvalidOption: a source names nothing that can be read.
        """
        self.names = names
        self.options = options or SourceOptions()
        self.array = one_array(names, self.options)
        found = Found([], []) if self.array is not None else find_files(names)
        self._skipped = found.skipped
        self._codebooks = [file.name for file in found.files if _is_codebook(file)]
        codebooks = set(self._codebooks)
        self._files = [file for file in found.files if file.name not in codebooks]
        if self._codebooks and not self._files:
            raise InvalidOption(f"{escape(self._codebooks[0])} is a codebook: name files of latents")
        read = [file.path for file in self._files if file.path is not None]
        self.paths: list[Path] = read if self.array is None else [self.array]

    def data_set(
        self,
        layout: str | None = None,
        *,
        default: Layout | None = None,
        channels: int | None = None,
        keeps_float64: bool = False,
    ) -> DataSet:
        """Return the data set; see `DataSet`."""
        return DataSet(
            self._files,
            self.options,
            layout,
            default=default,
            channels=channels,
            keeps_float64=keeps_float64,
        )

    @property
    def title(self) -> str:
        """What is read, for people: the name of the file, or how many files of which sources."""
        if self.array is not None:
            return self.array.name
        return f"{', '.join(map(title_of, self.names))} ({counted(len(self._files), 'file')})"

    def provenance(self) -> Mapping[str, object]:
        """Return what identifies a data set: its names, without folders of this machine, and a digest."""
        files = self._files
        options = self.options
        selection = {"column": options.column, "member": list(options.member), "key": options.key}
        return {
            "sources": list(map(title_of, self.names)),
            "files": len(files),
            "bytes": sum(file.size for file in files),
            "digest": digest_of(files),
            **({"unbatched": True} if options.unbatched else {}),
            **{name: value for name, value in selection.items() if value},
        }

    def tell_of_left_out(self, data: DataSet) -> None:
        """Write to stderr which files and items of a data set that was read are left out."""
        contents = data.contents
        for what, names in (
            ("files of types that are not read", self._skipped),
            ("codebook files", self._codebooks),
        ):
            if names:
                _say(f"{what}, left out: {len(names)}, such as {names[0]}")
        if contents.bad:
            _say(f"items that cannot be used, left out: {contents.bad} of {contents.bad + contents.items}")
            for bad in contents.named:
                sys.stderr.write(f"  {bad_text(bad)}\n")
            if contents.bad > len(contents.named):
                sys.stderr.write(f"  and {contents.bad - len(contents.named)} more\n")


def _is_codebook(file: SourceFile) -> bool:
    return file.path is not None and file.path.suffix == SUFFIX and is_codebook_file(file.path)


def _say(text: str) -> None:
    sys.stderr.write(f"vqserved: {printable(text)}\n")
