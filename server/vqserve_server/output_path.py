"""What may not be written over."""

from __future__ import annotations

from pathlib import Path

from vqserve_server.errors import InvalidOption


def check_not_read(output: Path, *sources: Path | None) -> None:
    """Refuse to write a file that is read as well, whatever it is called there.

    Args:
        output: the file to write.
        sources: files that are read.

    Raises:
        InvalidOption: it is one of them.
    """
    for source in sources:
        if source is not None and source.exists() and output.exists() and output.samefile(source):
            raise InvalidOption(f"{output.name} is what is read: name another file to write")
