"""The codes that a training starts from: distinct rows of the latents."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from vqserve_server.errors import InvalidShape
from vqserve_tools.latent_file import LatentRows
from vqserve_tools.progress import progress_of
from vqserve_tools.training.kmeans_plus_plus import draw_spread
from vqserve_tools.training.sampling import choose_weighted

# So many rows for each code are looked at: more cost time and hardly change where the codes lie.
_SAMPLES_PER_CODE = 16
_LEAST_SAMPLES = 1 << 15


def initial_codes(
    rows: LatentRows, num_codes: int, method: str, *, rng: np.random.Generator, device: torch.device, progress: bool
) -> npt.NDArray[np.float32]:
    """Return `num_codes` distinct rows, (K, D) float32.

    Args:
        rows: the latents, finite.
        num_codes: K.
        method: "sample" (uniform over the rows) or "kmeans++" (each next row in proportion to its squared distance
            from the nearest one chosen so far).
        rng: fixes the choice.
        device: computes the distances.
        progress: tell on stderr how far it is.

    Raises:
        InvalidShape: fewer rows, or fewer distinct rows, than codes.
    """
    if len(rows) < num_codes:
        raise InvalidShape(f"{len(rows)} rows are too few for {num_codes} codes", array="latents")
    samples = min(len(rows), max(_SAMPLES_PER_CODE * num_codes, _LEAST_SAMPLES))
    drawn = rows.take(np.sort(rng.choice(len(rows), samples, replace=False, shuffle=False)))
    candidates, counts = np.unique(drawn, axis=0, return_counts=True)
    if len(candidates) < num_codes:
        raise InvalidShape(
            f"{samples} rows with {len(candidates)} distinct among them are too few for {num_codes} codes",
            array="latents",
        )
    weights = counts.astype(np.float64)
    if method == "sample":
        return candidates[choose_weighted(weights, num_codes, rng)]
    with progress_of("k-means++", num_codes, "code", shown=progress) as told:
        points = torch.from_numpy(candidates).to(device)
        return candidates[draw_spread(points, weights, num_codes, rng=rng, on_round=told.update)]
