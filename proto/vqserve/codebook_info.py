"""The public description of a codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from vqserve.layout import Layout

# Separates a codebook's name from a version number or a label: "book@3", "book@stable".
VERSION_MARK = "@"
# A text lists at most so many runs of equal stages.
_MOST_RUNS = 4
# Kinds of residual codebooks.
_RESIDUAL = frozenset({"rvq", "residual_fsq"})


@dataclass(frozen=True, kw_only=True)
class CodebookInfo:
    """Description of one served codebook.

    Attributes:
        name: name in requests: "book@3" for a version, "book@stable" for a label of one, "book" for the latest.
        digest: lower-case hexadecimal SHA-256 of everything that affects encode and decode.
        kind: kind of the quantizer, such as "vq" or "fsq"; a newer server may have kinds that are unknown here.
        num_codes: K, number of codes (of each stage, if there are several; of the largest, where they differ).
        vocab_size: exclusive upper bound of the indices.
        input_dim: number of channels that encode takes.
        code_dim: D, width of a code.
        output_dim: number of channels that decode returns.
        num_quantizers: number of indices of a token; 1 except for residual quantizers.
        stage_vocab_sizes: exclusive upper bound of each stage's indices, in the order of a token's indices, if the
            stages of a residual codebook differ; empty: `vocab_size` is the bound of all indices.
        layout: default layout of latents; None: channels first for 4 and 5 axes, last for 2 and 3.
        version: the version that the name means; None: the codebook has no versions, or an older server does not say.
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
    stage_vocab_sizes: tuple[int, ...] = ()
    layout: Layout | None = None
    version: int | None = None

    @property
    def size(self) -> str:
        """Number and width of the codes: "1024 x 256", or for a residual codebook "8 stages of 1024 x 128"."""
        return f"{self.codes} x {self.code_dim}"

    @property
    def codes(self) -> str:
        """Number of codes: "1024"; for a residual codebook "8 stages of 1024", or "1 stage of 4096 and 9 of 1024"."""
        if not self.has_stages:
            return str(self.num_codes)
        return of_stages(self.num_quantizers, self.num_codes, self.stage_vocab_sizes)

    @property
    def is_version(self) -> bool:
        """Whether the name includes a version number or a label."""
        return VERSION_MARK in self.name

    @property
    def has_stages(self) -> bool:
        """Whether indices have an axis of `num_quantizers` indices for each token, in place of the channels."""
        # A residual codebook of one stage has that axis too; only its kind shows this.
        return self.num_quantizers > 1 or self.kind in _RESIDUAL


def of_stages(num_quantizers: int, count: int, sizes: Sequence[int] = ()) -> str:
    """Return "8 stages of 1024", or where the stages differ "1 stage of 4096 and 9 of 1024".

    Args:
        num_quantizers: number of stages.
        count: what each of them has.
        sizes: what each stage has, if they differ.
    """
    runs = [(len(list(run)), size) for size, run in groupby(sizes)]
    if len(runs) > _MOST_RUNS:
        return f"{_stages(num_quantizers)} of {min(sizes)} to {max(sizes)}"
    (number, size), *others = runs or [(num_quantizers, count)]
    first = f"{_stages(number)} of {size}"
    if not others:
        return first
    *middle, last = (f"{number} of {size}" for number, size in others)
    return f"{', '.join([first, *middle])} and {last}"


def _stages(number: int) -> str:
    return f"{number} stage{'s' if number > 1 else ''}"
