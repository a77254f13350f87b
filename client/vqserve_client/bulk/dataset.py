"""One job over a data set, from its sources to its output: what `vqserve encode` and `decode` do with a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vqserve.errors import COMMAND_LINE, InvalidArgument
from vqserve_client.bulk.job import Job
from vqserve_client.bulk.keys import Keys, Paths, check_unique
from vqserve_client.bulk.mapping import Mapping
from vqserve_client.bulk.origins import common_origin
from vqserve_client.bulk.outlook import SHOWN, Outlook
from vqserve_client.bulk.parts import Limits, Output
from vqserve_client.bulk.progress import Counts, Display
from vqserve_client.bulk.records import RESERVED, Records, begun_parts, has_results, read_manifest
from vqserve_client.bulk.tokens import PartFile, output_of
from vqserve_client.client import Client
from vqserve_client.conversion import RESULTS, Conversion, ConversionOptions
from vqserve_client.provenance import codebook_of, conversion_of, description
from vqserve_data.errors import FileError
from vqserve_data.items import Entry, Item, Record
from vqserve_data.readers import reader_of
from vqserve_data.readers.protocol import Selection, SourceFile
from vqserve_data.sources import find, local_path
from vqserve_data.writers import writer_of

# One file, folder, pattern or URL, or several.
Sources = str | PathLike[str] | Sequence[str | PathLike[str]]
Form = Literal["bar", "lines", "json", "none"]


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Options of a job, as those of the command line.

    Attributes:
        conversion: options of each call; those of the codebook's tokens are the default of decode.
        codebook: name of the codebook; None: the only one, or the one that made the tokens.
        digest: digest of the codebook; None: any.
        format: format of the output.
        select: which arrays of the sources are items.
        limits: limits of shards and errors.
        map: function between the sources and the server, as "package.module:function".
        map_processes: processes of that function; 0: this one.
        force: whether an output of another job is removed, and tokens may meet another codebook.
        progress: how it is shown: "bar" on a terminal, "lines" on stderr, "json" on stdout, or "none".
    """

    conversion: ConversionOptions = field(default_factory=ConversionOptions)
    codebook: str | None = None
    digest: str | None = None
    format: str = "npy"
    select: Selection = field(default_factory=Selection)
    limits: Limits = field(default_factory=Limits)
    map: str | None = None
    map_processes: int = 0
    force: bool = False
    progress: Form = "none"


@dataclass(frozen=True)
class Summary:
    """What a job did.

    Attributes:
        folder: folder of the output.
        items: items with a result, those of earlier runs included.
        bad: items without one; errors.jsonl in the folder says why.
        tokens: tokens of the items.
        counts: counts of this run.
    """

    folder: Path
    items: int
    bad: int
    tokens: int
    counts: Counts


class DataSet:
    """The sources of a job, their items and its codebook: all that is known before the first array is read.

    Attributes:
        conversion: what is done to each array.
        files: the sources in order.
        skipped: files in folders that no reader knows.
    """

    def __init__(
        self, client: Client, operation: str, sources: Sequence[str], folder: Path, options: JobOptions
    ) -> None:
        """Find the sources and the codebook.

        Raises:
            FileError: a source cannot be used.
            VqserveError: the servers do not have the codebook.
        """
        self._client = client
        self._folder = folder
        self._options = options
        self._writer = writer_of(options.format)
        if RESULTS[operation] not in self._writer.kinds:
            raise FileError(f"--format {options.format} cannot hold {RESULTS[operation]}")
        self._map = None if options.map is None else Mapping(options.map, options.map_processes)
        self._select = replace(options.select, fields=self._writer.keeps_fields, raw=self._map is not None)
        self._output = output_of(sources) if operation == "decode" else None
        self.files: Sequence[SourceFile]
        self.skipped: Sequence[str] = ()
        if self._output is not None:
            self._check_whole_output(self._output.folder)
            self.files = self._output.parts()
        else:
            found = find(sources, any_suffix=self._map is not None)
            self.files, self.skipped = found.files, found.skipped
        self._check_apart(sources)
        before = read_manifest(folder) if has_results(folder) and not options.force else None
        self._continued: dict[str, Any] | None = None if before is None else before["job"]
        self.conversion = self._conversion(operation)
        self._counts = Counts(total_bytes=sum(file.size for file in self.files))

    @property
    def job(self) -> dict[str, Any]:
        """What the job is, as the manifest says it: the same job is needed to go on."""
        options = self._options
        made = description(self.conversion.operation, self.conversion.info, self.conversion.options)
        if self._continued is not None and self._continued["codebook"]["digest"] == self.conversion.info.digest:
            # The codebook may have got another version number since.
            made["codebook"] = self._continued["codebook"]
        limits = options.limits
        return {
            **made,
            "select": {
                "column": options.select.column,
                "members": list(options.select.members),
                "key": options.select.key,
                "map": options.map,
            },
            "format": {
                "name": options.format,
                "shard_items": limits.shard_items,
                "shard_bytes": limits.shard_bytes,
            },
        }

    def run(self) -> Summary:
        """Convert what is left of the data set.

        Raises:
            FileError: the output cannot be written, is that of another job, or a source was changed.
            VqserveError: the servers cannot go on.
        """
        records = Records(self._folder)
        counts = self._counts
        with Display(counts, self._options.progress):
            try:
                records.open(self.job, self.files, restart=self._options.force)
                records.check()
                counts.total_items = self._count_keys()
                counts.begun_items = sum(part.items + part.bad for part in records.parts)
                counts.read_bytes = sum(file.size for file in self.files[: records.end.file])
                self._run(records)
            finally:
                records.close()
                if self._map is not None:
                    self._map.close()
        items, bad, tokens = (sum(getattr(part, name) for part in records.parts) for name in ("items", "bad", "tokens"))
        return Summary(self._folder, items, bad, tokens, counts)

    def outlook(self) -> Outlook:
        """Return what would be read and written, without doing it.

        Raises:
            FileError: a source cannot be read, or the folder has the output of another job.
        """
        items = tokens = nbytes = unknown = 0
        keys: list[str] = []
        bad: list[str] = []
        for file, entry in self._entries():
            items += 1
            if len(keys) < SHOWN:
                keys.append(entry.key)
            if entry.shape is None or entry.dtype is None or self._map is not None:
                unknown += 1
                continue
            try:
                outline = self.conversion.outline(entry.shape, entry.dtype)
            except InvalidArgument as error:
                bad.append(f"{entry.key} in {file.name}: {error.statement(COMMAND_LINE)}")
                continue
            tokens += outline.tokens
            nbytes += math.prod(outline.shape) * self.conversion.dtype.itemsize
        begun = () if self._options.force else begun_parts(self._folder, self.job, self.files)
        info = self.conversion.info
        return Outlook(
            codebook=info.name,
            size=str(info.size),
            digest=info.digest,
            files=len(self.files),
            source_bytes=self._counts.total_bytes,
            items=items,
            first_keys=keys,
            begun_items=sum(part.items + part.bad for part in begun),
            out=str(self._folder),
            format=self._options.format,
            tokens=tokens,
            dtype=str(self.conversion.dtype),
            result_bytes=nbytes,
            unknown_items=unknown,
            skipped=self.skipped,
            bad=bad,
        )

    def _conversion(self, operation: str) -> Conversion:
        options = self._options
        made_by = self._continued
        if operation == "decode":
            made_by = self._origin()
        info = codebook_of(
            made_by,
            self._client.codebooks(),
            name=options.codebook,
            digest=options.digest,
            target=self._client.target,
            force=options.force,
        )
        return conversion_of(operation, info, options.conversion, made_by)

    def _check_whole_output(self, folder: Path) -> None:
        """Check that no option chooses arrays of the output of a job, which has one for each item.

        Raises:
            FileError: an option does.
        """
        select = self._options.select
        if select.column is not None or select.members or select.key is not None:
            raise FileError(
                f"{folder} is the output of a job, and is decoded as a whole, without --member, --column and --key: to "
                "decode a part of it, name files in it"
            )

    def _check_apart(self, sources: Sequence[str]) -> None:
        """Check that what is written is not among what is read: the next run would read it, too.

        Raises:
            FileError: the output is in a source, or a source in the output.
        """
        out = self._folder.resolve()
        inside = next((source for source in sources if out.is_relative_to(local_path(source).resolve())), None)
        if inside is not None:
            raise FileError(f"{self._folder} is in {inside}, which is read: name a folder that is apart from it")
        for folder in {file.path.parent for file in self.files if file.path is not None}:
            if folder.resolve().is_relative_to(out):
                raise FileError(f"{folder} is read, and in {self._folder}, which is written: name another folder")

    def _origin(self) -> dict[str, Any] | None:
        """Return what made the tokens; None: nothing says it."""
        if self._output is not None:
            return self._output.made_by
        return common_origin(file.path for file in self.files if file.path is not None)

    def _run(self, records: Records) -> None:
        output = Output(
            self.conversion,
            writer=self._writer,
            metadata={"vqserve": json.dumps(self.job, separators=(",", ":"))},
            records=records,
            limits=self._options.limits,
            counts=self._counts,
        )
        job = Job(
            self._client,
            self.conversion,
            files=self.files,
            start=records.end,
            read=self._read,
            function=self._map,
            output=output,
            counts=self._counts,
        )
        try:
            job.run()
        except BaseException:
            records.write_errors(output.open_errors)
            raise
        records.finish(self.job)

    def _read(self, file: SourceFile, start: int) -> Iterator[Record]:
        if isinstance(file, PartFile):
            return file.read(start)
        return reader_of(file).read(file, self._select, start=start)

    def _count_keys(self) -> int:
        """Check that the keys are unique, and can be the names of files; return the number of items."""
        keys = Keys()
        paths = Paths(self._writer.file_of, RESERVED) if self._writer.names(0) is None else None
        for file, key in self._keys():
            keys.add(key)
            if paths is not None:
                paths.add(file, key)
        check_unique(keys, self._keys())
        if paths is not None:
            paths.check(self._keys())
        return len(keys)

    def _keys(self) -> Iterator[tuple[SourceFile, str]]:
        if self._output is None:
            yield from ((file, entry.key) for file, entry in self._entries())
        else:
            yield from ((part, key) for part in self._output.parts() for key in part.item_keys())

    def _entries(self) -> Iterator[tuple[SourceFile, Entry]]:
        for file in self.files:
            if isinstance(file, PartFile):
                for item in file.read():
                    if isinstance(item, Item):
                        yield file, Entry(item.key, tuple(item.array.shape), np.dtype(item.array.dtype))
                continue
            try:
                for entry in reader_of(file).entries(file, self._select):
                    yield file, entry
            except FileError:
                # It is one item without a result when it is read.
                yield file, Entry(file.key)


def encode(client: Client, sources: Sources, folder: str | PathLike[str], options: JobOptions | None = None) -> Summary:
    """Write the indices of a data set of latents into a folder; see `vqserve encode`.

    Raises:
        FileError: a source or the output cannot be used.
        VqserveError: see errors.py.
    """
    return DataSet(client, "encode", _names(sources), Path(folder), options or JobOptions()).run()


def decode(client: Client, sources: Sources, folder: str | PathLike[str], options: JobOptions | None = None) -> Summary:
    """Write the latents of a data set of indices, or of the output of `encode`; see `vqserve decode`.

    Raises:
        FileError: a source or the output cannot be used.
        VqserveError: see errors.py.
    """
    return DataSet(client, "decode", _names(sources), Path(folder), options or JobOptions()).run()


def _names(sources: Sources) -> list[str]:
    return [fspath(each) for each in ([sources] if isinstance(sources, str | PathLike) else sources)]
