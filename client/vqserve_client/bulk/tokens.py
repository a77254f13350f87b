"""The output of an earlier job as the source of the next: its items under their own keys, checked as they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from vqserve_client.bulk.records import MANIFEST, Part, check_file, is_output, read_manifest, read_parts
from vqserve_client.provenance import read_sidecar
from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, Item, Record
from vqserve_data.readers import reader_of
from vqserve_data.readers.protocol import Selection
from vqserve_data.sources import LocalFile
from vqserve_data.stream import TokenStream

# Where the array of an item is, in the formats that have other things beside it.
_COLUMNS = {"encode": "indices", "decode": "latents"}


@dataclass(frozen=True, slots=True)
class PartFile:
    """One part of an output, as a file of a data set.

    Attributes:
        name: path of the output and number of the part.
        key: "", because items have their own keys.
        size: bytes of its files.
        version: what its files contain.
        output: the output.
        part: the part.
        number: its number.
    """

    name: str
    size: int
    version: str
    output: Output
    part: Part
    number: int
    key: str = ""
    path: Path | None = None

    def read(self, start: int = 0) -> Iterator[Item | BadItem]:
        """Yield its items from number `start` on; see Output.read."""
        return self.output.read(self, start)

    def changed(self) -> bool:
        """Return False: the files were checked before they were read."""
        return False

    def open(self) -> IO[bytes]:
        """Refuse: a part is not one file.

        Raises:
            FileError: always.
        """
        raise FileError(f"{self.name} is not one file")


class Output:
    """A complete output of a job.

    Attributes:
        folder: its folder.
        made_by: what made it: codebook and options.
    """

    def __init__(self, folder: Path) -> None:
        """Read the manifest.

        Raises:
            FileError: there is none, or the job has not come to its end.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            raise FileError(f"{folder} has no {MANIFEST}")
        if not manifest["complete"]:
            raise FileError(f"{folder} is not complete: let the job that writes it come to its end first")
        self.folder = folder
        self.made_by: dict[str, Any] = manifest["job"]

    def parts(self) -> list[PartFile]:
        """Return the parts in order.

        Raises:
            FileError: a record file cannot be read.
        """
        return [
            PartFile(
                name=f"{self.folder}, part {number}",
                size=sum(file.nbytes for file in part.files),
                version=",".join(file.sha256 for file in part.files[:1]),
                output=self,
                part=part,
                number=number,
            )
            for number, (part, _) in enumerate(read_parts(self.folder))
        ]

    def read(self, part: PartFile, start: int = 0) -> Iterator[Item | BadItem]:
        """Yield the items of a part from number `start` on, after a check of its files.

        Raises:
            FileError: a file is missing, was changed, or does not have the items of the records.
        """
        for file in part.part.files:
            check_file(self.folder, file)
        lines = [line for line in _lines(self.folder, part.number) if "reason" not in line][start:]
        items = self._items(part, start)
        for line in lines:
            item = next(items, None)
            if not isinstance(item, Item):
                raise FileError(f"{part.name} does not have item {line['key']!r}, which its records name")
            yield replace(item, key=line["key"], source=part.name)

    def _items(self, part: PartFile, start: int) -> Iterator[Record]:
        """Yield what is in the files of a part; their keys are not those of the items."""
        files = [LocalFile(self.folder / file.name, "part", file.nbytes, file.sha256) for file in part.part.files]
        if not files:
            return iter(())
        if self._format == "npy":
            return chain.from_iterable(reader_of(file).read(file, Selection()) for file in files[start:])
        if self._format == "stream":
            stream = TokenStream(files[0].path)
            return (Item("part", stream[number], part.name) for number in range(start, len(stream)))
        column = _COLUMNS[self.made_by["operation"]]
        select = {
            "parquet": Selection(column=column, key="key"),
            "tar": Selection(members=(f"{column}.npy",)),
        }.get(self._format, Selection())
        return reader_of(files[0]).read(files[0], select, start=start)

    @property
    def _format(self) -> str:
        name: str = self.made_by["format"]["name"]
        return name


def output_of(sources: Sequence[str]) -> Output | None:
    """Return the output of an earlier job, if it is the one source; None: the sources are something else.

    Raises:
        FileError: it is one of several sources, or is not complete.
    """
    outputs = [source for source in sources if (Path(source) / MANIFEST).is_file()]
    if not outputs:
        return None
    if len(sources) > 1:
        raise FileError(f"{outputs[0]} is the output of a job: name it alone")
    return Output(Path(outputs[0]))


def origins() -> Callable[[Path], dict[str, Any] | None]:
    """Return a function that says what made the tokens in a file: its sidecar, or the manifest of a folder above it.

    It reads each manifest once, and returns None where nothing says it. It raises a FileError if what says it is
    damaged, or if the file has no tokens without others.
    """
    by_folder: dict[Path, dict[str, Any] | None] = {}

    def above(folder: Path) -> dict[str, Any] | None:
        if folder not in by_folder:
            manifest = read_manifest(folder) if is_output(folder) else None
            if manifest is not None and manifest["job"]["operation"] == "encode":
                by_folder[folder] = manifest["job"]
            else:
                by_folder[folder] = None if folder.parent == folder else above(folder.parent)
        return by_folder[folder]

    def origin_of(path: Path) -> dict[str, Any] | None:
        made_by = read_sidecar(path) if path.suffix == ".npy" else None
        if made_by is None:
            made_by = above(path.absolute().parent)
            if made_by is not None and made_by["format"]["name"] == "stream":
                raise FileError(f"{path} is of a stream of tokens, which is decoded as a whole: name its folder")
        return made_by

    return origin_of


def _lines(folder: Path, number: int) -> Iterator[Mapping[str, Any]]:
    for _, lines in islice(read_parts(folder), number, None):
        yield from lines
        return
