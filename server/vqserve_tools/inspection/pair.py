"""Two codebooks side by side: what is equal, what differs, and which fits the latents better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve.codebook_info import of_stages
from vqserve_server.codebooks import Codebook
from vqserve_server.codebooks.kinds import KINDS
from vqserve_tools.inspection.codes import stored_codes
from vqserve_tools.inspection.inspection import Report
from vqserve_tools.latents.rows import LatentRows

# Rows that are encoded by both to count equal tokens.
_MAX_ROWS = 1 << 16
# Codes whose median relative distance is below this are the same codes, rounded or trained on.
_NEAR = 0.05


@dataclass(frozen=True)
class Side:
    """One of two codebooks.

    Attributes:
        name: how the verdict calls it.
        codebook: codebook from a file.
        report: its figures.
    """

    name: str
    codebook: Codebook
    report: Report


def verdict(a: Side, b: Side, latents: LatentRows | None = None) -> str:
    """Return one line: whether the two give the same tokens, and if not, what differs.

    Args:
        a: first codebook.
        b: second codebook.
        latents: latents that both reports are about; None: none.
    """
    if a.report.digest == b.report.digest:
        return "the same codebook: equal tokens and latents"
    return "; ".join([_difference(a.codebook, b.codebook), *_better(a, b, latents)])


def _difference(a: Codebook, b: Codebook) -> str:
    ours, theirs = ([stage.rows for stage in stored_codes(one)] for one in (a, b))
    if not ours or not theirs:
        return f"different codebooks: {_changed_arguments(a, b)}"
    if [rows.shape for rows in ours] == [rows.shape for rows in theirs]:
        return _of_same_shape(ours, theirs, a, b)
    if len(ours) == len(theirs) and all(
        rows.T.shape == other.shape and np.array_equal(rows.T, other) for rows, other in zip(ours, theirs, strict=True)
    ):
        return "the codes of one are the columns of the other: one of them was imported with the wrong orientation"
    shorter, longer = sorted((ours, theirs), key=len)
    if len(shorter) < len(longer) and all(map(np.array_equal, shorter, longer)):
        return f"the same first {len(shorter)} stages, of {len(ours)} and of {len(theirs)}"
    return f"different codebooks: {_sizes(ours)} and {_sizes(theirs)}"


def _of_same_shape(ours: list[npt.NDArray[Any]], theirs: list[npt.NDArray[Any]], a: Codebook, b: Codebook) -> str:
    if all(map(np.array_equal, ours, theirs)):
        return f"the same codes, used in another way: {_changed_arguments(a, b)}"
    if all(rows.shape[0] == rows.shape[1] and np.array_equal(rows.T, other) for rows, other in _pairs(ours, theirs)):
        return "the codes of one are the columns of the other: one of them was imported with the wrong orientation"
    order = [next((place for place, other in enumerate(theirs) if np.array_equal(rows, other)), -1) for rows in ours]
    if sorted(order) == list(range(len(theirs))):
        return f"the same stages in another order: {', '.join(str(place + 1) for place in order)}"
    if all(np.array_equal(_sorted(rows), _sorted(other)) for rows, other in _pairs(ours, theirs)):
        return "the same codes in another order: each index of one is another index of the other"
    distance = float(np.median(np.concatenate([_relative(rows, other) for rows, other in _pairs(ours, theirs)])))
    if distance < _NEAR:
        return f"nearly the same codes ({100 * distance:.2g} % apart in the median): rounded, or trained further"
    return f"different codes, {100 * distance:.3g} % apart in the median"


def _pairs(
    ours: list[npt.NDArray[Any]], theirs: list[npt.NDArray[Any]]
) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    return list(zip(ours, theirs, strict=True))


def _relative(rows: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    wide = rows.astype(np.float64)
    lengths = np.maximum(np.linalg.norm(wide, axis=1), np.finfo(np.float64).tiny)
    return np.asarray(np.linalg.norm(wide - other, axis=1) / lengths)


def _sorted(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return rows[np.lexsort(rows.T[::-1])]


def _sizes(stages: list[npt.NDArray[Any]]) -> str:
    sizes = [len(rows) for rows in stages]
    of_codes = str(sizes[0]) if len(stages) == 1 else of_stages(len(stages), sizes[0], sizes)
    return f"{of_codes} x {stages[0].shape[1]}"


def _changed_arguments(a: Codebook, b: Codebook) -> str:
    if a.kind != b.kind:
        return f"kind {a.kind} and kind {b.kind}"
    served = [name for name, argument in KINDS[a.kind].arguments.items() if argument.served]
    ours, theirs = a.arguments, b.arguments
    changes = [f"{name} {ours[name]} and {theirs[name]}" for name in served if ours[name] != theirs[name]]
    return ", ".join(changes) or "their projections or remaps differ"


def _better(a: Side, b: Side, latents: LatentRows | None) -> list[str]:
    if latents is None:
        return []
    parts = []
    if a.report.num_quantizers == b.report.num_quantizers:
        import torch  # noqa: PLC0415

        rows = next(iter(latents.chunks(_MAX_ROWS)))
        found = [
            np.asarray(side.codebook.quantizer.encode(torch.from_numpy(rows))).reshape(len(rows), -1) for side in (a, b)
        ]
        equal = int((found[0] == found[1]).all(axis=1).sum())
        parts.append(f"{100 * equal / len(rows):.3g} % of {len(rows)} tokens are equal")
    errors = [None if side.report.fit is None else side.report.fit.error for side in (a, b)]
    if errors[0] is not None and errors[1] is not None and errors[0].compared == errors[1].compared:
        snr = [error.snr_db for error in errors if error is not None]
        if snr[0] is not None and snr[1] is not None:
            better = a.name if snr[0] >= snr[1] else b.name
            parts.append(f"{better} fits better: SNR {snr[0]:.2f} and {snr[1]:.2f} dB")
    return parts
