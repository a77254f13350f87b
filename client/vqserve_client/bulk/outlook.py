"""What a job would read and write: what `--dry-run` says, as text or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vqserve_client.bulk.progress import counted, short

# Items and reasons that the text shows.
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What is known of a job before the first array is read.

    Attributes:
        codebook: name of the codebook.
        size: its size, for people.
        digest: its digest.
        files: number of sources.
        source_bytes: bytes of them.
        items: number of items, those without a result included.
        first_keys: keys of the first ones.
        begun_items: items that an earlier run has done.
        out: folder of the output.
        format: format of the output.
        tokens: tokens of the items whose shape is known.
        dtype: element type of the results.
        result_bytes: bytes of their results.
        unknown_items: items whose shape is not known before they are read.
        skipped: files of types that are not read.
        bad: items that can have no result, each with its file and the reason.
    """

    codebook: str
    size: str
    digest: str
    files: int
    source_bytes: int
    items: int
    first_keys: Sequence[str]
    begun_items: int
    out: str
    format: str
    tokens: int
    dtype: str
    result_bytes: int
    unknown_items: int
    skipped: Sequence[str]
    bad: Sequence[str]

    def text(self) -> str:
        """Return it as lines."""
        keys = ", ".join(self.first_keys[:SHOWN]) + (", ..." if self.items > SHOWN else "")
        unknown = f", and {counted(self.unknown_items, 'item')} of unknown size" if self.unknown_items else ""
        files, items = counted(self.files, "file"), counted(self.items, "item")
        lines = [
            f"codebook: {self.codebook}, {self.size}, digest {self.digest}",
            f"sources: {files}, {short(self.source_bytes)}B, {items} ({keys})",
            f"output: {self.out}, format {self.format}, {short(self.tokens)}tokens, {self.dtype}, "
            f"{short(self.result_bytes)}B{unknown}",
        ]
        if self.begun_items:
            lines.append(f"done before: {counted(self.begun_items, 'item')}")
        if self.skipped:
            lines.append(f"left out: {counted(len(self.skipped), 'file')} of other types, such as {self.skipped[0]}")
        lines += [f"no result: {text}" for text in self.bad[:SHOWN]]
        if len(self.bad) > SHOWN:
            lines.append(f"no result: {len(self.bad) - SHOWN:,} more")
        return "\n".join(lines)

    def json(self) -> str:
        """Return it as a line of JSON."""
        return json.dumps({"event": "outlook", **asdict(self)})
