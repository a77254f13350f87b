"""The output of an earlier job as the source of the next: its items under their own keys, checked as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

from vqserve_client.bulk.records import (
    MANIFEST,
    Part,
    check_file,
    file_below,
    read_manifest,
    read_parts,
    read_records,
)
from vqserve_client.conversion import RESULTS
from vqserve_data.errors import FileError
from vqserve_data.items import BadItem, Item, Record
from vqserve_data.readers import reader_of
from vqserve_data.readers.protocol import Selection
from vqserve_data.sources import LocalFile
from vqserve_data.stream import TokenStream


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

    def item_keys(self) -> Iterator[str]:
        """Yield the keys of its items, as the records say them."""
        return (line["key"] for line in self.output.records(self))

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
        self._num_parts: object = manifest.get("parts")

    def parts(self) -> list[PartFile]:
        """Return the parts in order.

        Raises:
            FileError: a record file is missing or cannot be read.
        """
        parts = [part for part, _ in read_parts(self.folder)]
        if len(parts) != self._num_parts:
            raise FileError(f"{self.folder} has records of {len(parts)} parts of {self._num_parts}: it is damaged")
        return [
            PartFile(
                name=f"{self.folder}, part {number}",
                size=sum(file.nbytes for file in part.files),
                version=hashlib.sha256("".join(file.sha256 for file in part.files).encode()).hexdigest(),
                output=self,
                part=part,
                number=number,
            )
            for number, part in enumerate(parts)
        ]

    def read(self, part: PartFile, start: int = 0) -> Iterator[Item | BadItem]:
        """Yield the items of a part from number `start` on, after a check of its files.

        Raises:
            FileError: a file is missing, was changed, or does not have the items of the records.
        """
        for file in part.part.files:
            check_file(self.folder, file)
        lines = list(self.records(part))[start:]
        items = self._items(part, start)
        for line in lines:
            item = next(items, None)
            if not isinstance(item, Item):
                raise FileError(f"{part.name} does not have item {line['key']!r}, which its records name")
            yield replace(item, key=line["key"], source=part.name)

    def records(self, part: PartFile) -> Iterator[dict[str, Any]]:
        """Yield the records of the items of a part.

        Raises:
            FileError: its record file cannot be read.
        """
        return (line for line in read_records(self.folder, part.number) if "reason" not in line)

    def _items(self, part: PartFile, start: int) -> Iterator[Record]:
        """Yield what is in the files of a part; their keys are not those of the items."""
        files = [
            LocalFile(file_below(self.folder, file.name), "part", file.nbytes, file.sha256) for file in part.part.files
        ]
        if not files:
            return iter(())
        if self._format == "npy":
            return chain.from_iterable(reader_of(file).read(file, Selection()) for file in files[start:])
        if self._format == "stream":
            stream = TokenStream(files[0].path)
            return (Item("part", stream[number], part.name) for number in range(start, len(stream)))
        # Where the array of an item is, in the formats that have other things beside it.
        column = RESULTS[self.made_by["operation"]]
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
