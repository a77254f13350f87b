"""The sources that a user names, opened for reading, and what a user is told about items that were left out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vqserve.layout import Layout
from vqserve.text import printable
from vqserve_data.sources import Found
from vqserve_tools.latents.arguments import SourceOptions, digest_of, find_files, one_array, title_of
from vqserve_tools.latents.array import ArrayRows
from vqserve_tools.latents.dataset import DataSet, bad_text


class Sources:
    """What a user names: one .npy file, which is read as a whole, or a data set.

    Attributes:
        array: the .npy file; None: it is a data set.
        paths: local files that are read.
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
        self._found = Found([], []) if self.array is not None else find_files(names)
        found = [file.path for file in self._found.files if file.path is not None]
        self.paths: list[Path] = found if self.array is None else [self.array]

    def read_array(
        self, layout: str | None = None, *, default: Layout | None = None, keeps_float64: bool = False
    ) -> ArrayRows:
        """Open the .npy file; see `ArrayRows.open`."""
        if self.array is None:
            raise AssertionError("a data set is no array")
        return ArrayRows.open(self.array, layout, default=default, keeps_float64=keeps_float64)

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
            self._found.files,
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
        count = len(self._found.files)
        return f"{', '.join(map(title_of, self.names))} ({count} {'file' if count == 1 else 'files'})"

    def provenance(self) -> Mapping[str, object]:
        """Return what identifies a data set: its names, without folders of this machine, and a digest."""
        files = self._found.files
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
        skipped, contents = self._found.skipped, data.contents
        if skipped:
            _say(f"files of types that are not read, left out: {len(skipped)}, such as {skipped[0]}")
        if contents.bad:
            _say(f"items that cannot be used, left out: {contents.bad} of {contents.bad + contents.items}")
            for bad in contents.named:
                sys.stderr.write(f"  {bad_text(bad)}\n")
            if contents.bad > len(contents.named):
                sys.stderr.write(f"  and {contents.bad - len(contents.named)} more\n")


def _say(text: str) -> None:
    sys.stderr.write(f"vqserved: {printable(text)}\n")
