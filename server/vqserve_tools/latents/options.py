"""How a user wants sources of latents to be read. Importing it imports no reader: a parser of flags needs it only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vqserve.errors import InvalidOption
from vqserve_tools.flags import option

if TYPE_CHECKING:
    from vqserve_data.readers.protocol import Selection


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How sources are read.

    Attributes:
        unbatched: whether the arrays have no batch axis.
        column: column of tables with the latents; None: the only one that can be.
        member: patterns of the names of members of archives and tars; none: all arrays.
        key: column of tables with the keys; None: the number of the row.
        sample_rows: number of rows to sample; None: up to the tool.
        max_errors: number of bad items up to which the tool goes on without them.
    """

    unbatched: bool = option(False, "arrays have no batch axis: (C, h, w), (s, C)", action="store_true")
    column: str | None = option(None, "column of tables with the latents (default: the only one)", metavar="NAME")
    member: tuple[str, ...] = option(
        (),
        "members of archives, such as 'latents*' (default: all); may be given again",
        action="append",
        metavar="GLOB",
    )
    key: str | None = option(
        None, "column of tables with the keys, for messages (default: the number of the row)", metavar="NAME"
    )
    sample_rows: int | None = option(
        None,
        "rows to sample, uniformly from all (default: train takes as many as fit 1 GiB, inspect takes all)",
        type=int,
        metavar="N",
    )
    max_errors: int = option(
        100, "stop if more items than this cannot be used (default: %(default)s)", type=int, metavar="N"
    )

    def __post_init__(self) -> None:
        for name, least in (("sample_rows", 1), ("max_errors", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidOption(f"{{option}} must be at least {least}, not {value}", option=name)

    @property
    def selection(self) -> Selection:
        """Which arrays of a file are items."""
        from vqserve_data.readers.protocol import Selection  # noqa: PLC0415

        return Selection(column=self.column, members=self.member, key=self.key, fields=False)
