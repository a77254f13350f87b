"""What a client may know about a codebook."""

from __future__ import annotations

from dataclasses import dataclass

from vqserve.layout import Layout

# What comes between a codebook's name and the number of one of its versions: "book@3".
VERSION_MARK = "@"


@dataclass(frozen=True, kw_only=True)
class CodebookInfo:
    """One codebook as it is served.

    Attributes:
        name: the name that requests use: of a version "book@3", and "book" of the latest.
        digest: lower-case hexadecimal SHA-256 over all that encode and decode read.
        kind: of the quantizer, as "vq" or "fsq": a new server may have kinds that this package does not know.
        num_codes: K, rows of the codebook (of each stage, if there are several).
        vocab_size: indices lie in [0, vocab_size).
        input_dim: channels that encode takes.
        code_dim: D, width of a code row.
        output_dim: channels that decode returns.
        num_quantizers: indices per token, 1 but for residual quantizers.
        layout: layout of latents where a call does not say; None: channels first for 4 and 5 axes, last for 2 and 3.
    """

    name: str
    digest: str
    kind: str
    num_codes: int
    vocab_size: int
    input_dim: int
    code_dim: int
    output_dim: int
    num_quantizers: int = 1
    layout: Layout | None = None

    @property
    def size(self) -> str:
        """How many codes of which width: "1024 x 256", of a residual codebook "8 stages of 1024 x 128"."""
        return f"{self.staged(self.num_codes)} x {self.code_dim}"

    def staged(self, count: object) -> str:
        """Return what each stage has so much of: "8 stages of 1024", and without stages "1024"."""
        return of_stages(self.num_quantizers, count) if self.has_stages else str(count)

    @property
    def is_version(self) -> bool:
        """Whether the name is that of a given version."""
        return VERSION_MARK in self.name

    @property
    def has_stages(self) -> bool:
        """Whether indices have an axis more, of a token's `num_quantizers` indices, in the place of the channels."""
        # A residual codebook of one stage has the axis, too, and no message says so: its kind does.
        return self.num_quantizers > 1 or self.kind == "rvq"


def of_stages(num_quantizers: int, count: object) -> str:
    """Return "8 stages of 1024"."""
    return f"{num_quantizers} stage{'s' if num_quantizers > 1 else ''} of {count}"
