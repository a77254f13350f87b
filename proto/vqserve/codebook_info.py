"""The public description of a codebook."""

from __future__ import annotations

from dataclasses import dataclass

from vqserve.layout import Layout

# Separates a codebook's name from a version number: "book@3".
VERSION_MARK = "@"
# Kinds of residual codebooks.
_RESIDUAL = frozenset({"rvq", "residual_fsq"})


@dataclass(frozen=True, kw_only=True)
class CodebookInfo:
    """Description of one served codebook.

    Attributes:
        name: name in requests: "book@3" for a version, "book" for the latest.
        digest: lower-case hexadecimal SHA-256 of everything that affects encode and decode.
        kind: kind of the quantizer, such as "vq" or "fsq"; a newer server may have kinds that are unknown here.
        num_codes: K, number of codes (of each stage, if there are several).
        vocab_size: exclusive upper bound of the indices.
        input_dim: number of channels that encode takes.
        code_dim: D, width of a code.
        output_dim: number of channels that decode returns.
        num_quantizers: number of indices of a token; 1 except for residual quantizers.
        layout: default layout of latents; None: channels first for 4 and 5 axes, last for 2 and 3.
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
        """Number and width of the codes: "1024 x 256", or for a residual codebook "8 stages of 1024 x 128"."""
        return f"{self.staged(self.num_codes)} x {self.code_dim}"

    def staged(self, count: object) -> str:
        """Return a count with the number of stages that each have it: "8 stages of 1024"; without stages "1024"."""
        return of_stages(self.num_quantizers, count) if self.has_stages else str(count)

    @property
    def is_version(self) -> bool:
        """Whether the name includes a version number."""
        return VERSION_MARK in self.name

    @property
    def has_stages(self) -> bool:
        """Whether indices have an axis of `num_quantizers` indices for each token, in place of the channels."""
        # A residual codebook of one stage has that axis too; only its kind shows this.
        return self.num_quantizers > 1 or self.kind in _RESIDUAL


def of_stages(num_quantizers: int, count: object) -> str:
    """Return "8 stages of 1024"."""
    return f"{num_quantizers} stage{'s' if num_quantizers > 1 else ''} of {count}"
