"""Training from a latents file to a codebook file: the work of `vqserved train`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import vqserve
from vqserve.errors import of_file
from vqserve_server.codebooks import save_codebook
from vqserve_tools.latents.array import ArrayRows
from vqserve_tools.output import check_output
from vqserve_tools.training.options import TrainingOptions
from vqserve_tools.training.trainer import Trained, train


@dataclass(frozen=True, kw_only=True)
class TrainedFile:
    """Result of `train_file`: the trained codebook and the digest of its file."""

    trained: Trained
    digest: str


def train_file(
    latents: Path,
    out: Path,
    options: TrainingOptions,
    *,
    layout: str | None = None,
    force: bool = False,
    progress: bool = False,
    notes: Mapping[str, object] | None = None,
) -> TrainedFile:
    """Train a codebook on a .npy file and write it.

    On the CPU of one machine the same latents, options and notes give the same bytes.

    Args:
        latents: .npy file, float16, float32 or float64, 2 to 5 axes; of any size.
        out: codebook file to write.
        options: options of the training.
        layout: layout of the latents; None: channels first for 4 and 5 axes, last for 2 and 3.
        force: whether to replace an existing `out`.
        progress: whether to show progress on stderr, and, without `layout`, the layout in which the latents were read.
        notes: further entries for the provenance of the codebook, about the origin of the latents.

    Raises:
        InvalidArgument: the latents or options cannot be used; nothing was written.
        OSError: a file cannot be read or written.
    """
    check_output(out, force=force, sources=[latents])
    rows = ArrayRows.open(latents, layout)
    if progress and layout is None and rows.array.ndim > 2:
        # Shown before the training, so that a user who sees a wrong number of channels need not wait for the end.
        sys.stderr.write(f"latents {rows.array.shape} read {rows.layout.replace('_', ' ')}: {rows.dim} channels\n")
    with of_file(latents):
        trained = train(rows, options, progress=progress)
    with latents.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = {
        "made_by": f"vqserved train {vqserve.__version__}",
        "latents": {
            "file": latents.name,
            "sha256": content,
            "shape": list(rows.array.shape),
            "dtype": str(rows.array.dtype),
            "layout": str(rows.layout),
        },
        "options": asdict(options) | asdict(trained.plan),
        "quality": asdict(trained.quality),
        **(notes or {}),
    }
    digest = save_codebook(trained.quantizer, out, provenance=provenance, statistics=trained.statistics)
    return TrainedFile(trained=trained, digest=digest)
