"""Positions in errors: a server counts them in the request that it got, whoever reads them in the whole array."""

from __future__ import annotations

import re

from vqserve_client.arrays import Cut

_POSITION = re.compile(r"\b(latents|indices|token )\[(\d+(?:, \d+)*)\]")


def in_whole(text: str, *, array: Cut, grid: Cut) -> str | None:
    """Return an error's text with its position counted in the whole of what was cut; None if it names none.

    Args:
        text: about a part of an array: "latents[0, 3] is nan", "the projection of token [0] leaves ...".
        array: the part, as a cut of the whole array.
        grid: the part, as a cut of the whole array's tokens.
    """
    found = _POSITION.search(text)
    if found is None:
        return None
    cut = grid if found[1] == "token " else array
    position = [int(number) for number in found[2].split(", ")]
    if len(position) != len(cut):
        return None
    whole = [(run.start or 0) + number for run, number in zip(cut, position, strict=True)]
    return f"{text[: found.start(2)]}{', '.join(map(str, whole))}{text[found.end(2) :]}"
