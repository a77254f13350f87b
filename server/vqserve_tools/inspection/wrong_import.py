"""Signs that a codebook was not imported as its model has it, or was taken from the wrong arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vqserve_tools.inspection.codes import Codes, StoredCodes

if TYPE_CHECKING:
    from vqserve_tools.inspection.fit import Fit

# Lengths of rows that a model normalised in float32 or bfloat16 differ from 1 by no more than this.
_ONE_WITHIN = 1e-2
# A stage is collapsed if most of its codes are duplicates, or if its codes are this much closer together than those of
# the stages before it: trained stages shrink by less than half from one to the next.
_COLLAPSED = 1e-4
_MOST = 0.5
# Of many numbers drawn from a range, one comes this near to its end.
_FILLED = 0.98


def signs_of_wrong_import(
    books: Sequence[StoredCodes], codes: Sequence[Codes], *, dead_looking: int | None, fit: Fit | None
) -> tuple[str, ...]:
    """Return a sentence for each sign; none of them is a proof.

    Args:
        books: codes of each stage; empty if codes are computed.
        codes: measurements of the codebook of each stage; empty if codes are computed.
        dead_looking: number of codes that training seems never to have used; None: unknown.
        fit: fit to latents; None: not measured.
    """
    return tuple(
        sign
        for signs in (
            _never_trained(books, dead_looking),
            _normalised(books, codes),
            _orientation(books),
            _equal_stages(books),
            _collapsed(codes),
            _fits_worse_than_the_mean(fit),
        )
        for sign in signs
    )


def _never_trained(books: Sequence[StoredCodes], dead_looking: int | None) -> Iterator[str]:
    if (dead_looking is not None and dead_looking == len(books[0].rows)) or any(map(_is_initial, books)):
        which = [f"stage {number}" for number, book in enumerate(books, 1) if _is_initial(book) and len(books) > 1]
        yield (
            f"{' and '.join(which) or 'the codebook'} looks untrained, in every code: is this the array of the trained "
            "codes, or an initial state?"
        )


def _is_initial(book: StoredCodes) -> bool:
    """Return whether the codes fill the range that they are drawn from, and none is outside."""
    bound = book.initial_bound
    return bound is not None and _FILLED * bound <= float(np.abs(book.rows).max()) <= bound * (1 + 1e-6)


def _normalised(books: Sequence[StoredCodes], codes: Sequence[Codes]) -> Iterator[str]:
    if not codes or any(book.metric != "l2" for book in books):
        return
    if all(one.norms.size > 1 and np.abs(one.norms - 1).max() <= _ONE_WITHIN for one in codes):
        yield (
            "all codes have length one, but are searched by l2: if the model scales latents to length one before its "
            "search, import it with --metric cosine"
        )


def _orientation(books: Sequence[StoredCodes]) -> Iterator[str]:
    for book in books[:1]:
        count, width = book.rows.shape
        if width > count > 1:
            yield (
                f"{count} codes of width {width}: a codebook rarely has more columns than codes; if the model has "
                f"{width} codes of width {count}, import it with --transpose"
            )


def _equal_stages(books: Sequence[StoredCodes]) -> Iterator[str]:
    first: dict[bytes, int] = {}
    for number, book in enumerate(books, 1):
        earlier = first.setdefault(f"{book.rows.shape}".encode() + book.rows.tobytes(), number)
        if earlier != number:
            yield f"stages {earlier} and {number} have equal codes: does the model share one codebook between them?"


def _collapsed(codes: Sequence[Codes]) -> Iterator[str]:
    widest = 0.0
    for number, one in enumerate(codes, 1):
        if one.norms.size < 2:
            continue
        finite = one.neighbours[np.isfinite(one.neighbours)]
        distance = float(np.median(finite)) if finite.size else 0.0
        of_stage = f"stage {number}" if len(codes) > 1 else "the codebook"
        if one.duplicates >= _MOST * one.norms.size:
            yield f"{of_stage} is collapsed: {one.duplicates} of its {one.norms.size} codes equal an earlier code"
        elif distance < _COLLAPSED * widest:
            yield (
                f"{of_stage} is collapsed: its codes are {distance:.3g} apart, those of an earlier stage {widest:.3g}: "
                "was it trained?"
            )
        widest = max(widest, distance)


def _fits_worse_than_the_mean(fit: Fit | None) -> Iterator[str]:
    if fit is not None and fit.error is not None and fit.error.relative is not None and fit.error.relative > 1:
        yield (
            "the error is greater than the variance of the latents: one constant would be better than this codebook; "
            "are these the latents that the model quantizes, in the right layout and scale?"
        )
