"""How well a codebook serves latents, over all of their rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vqserve_server.quantizers import AbstractQuantizer
from vqserve_tools.latent_file import LatentRows
from vqserve_tools.progress import progress_of

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Figures over all rows.

    Attributes:
        mean_squared_error: mean of (decoded - latent)^2 over all elements.
        perplexity: exp of the entropy of the codes' shares: K if all are used alike, 1 if one takes all.
        used_codes: codes that at least one row has.
    """

    mean_squared_error: float
    perplexity: float
    used_codes: int


@torch.no_grad()
def measure_quality(
    quantizer: AbstractQuantizer, rows: LatentRows, *, device: torch.device, progress: bool = False
) -> Quality:
    """Encode and decode all rows.

    Args:
        quantizer: on `device`.
        rows: finite latents, at least one.
        device: where to compute.
        progress: tell on stderr how far it is.
    """
    counts = np.zeros(quantizer.num_codes, np.int64)
    squares = 0.0
    with progress_of("measuring", len(rows), "row", shown=progress) as told:
        for chunk in rows.chunks(_ROWS_AT_ONCE):
            latents = torch.from_numpy(chunk).to(device)
            ids = quantizer.encode(latents)
            squares += float((quantizer.decode(ids) - latents).double().square().sum())
            counts += np.bincount(ids.cpu().numpy(), minlength=quantizer.num_codes)
            told.update(len(chunk))
    shares = counts[counts > 0] / len(rows)
    return Quality(
        mean_squared_error=squares / (len(rows) * rows.dim),
        perplexity=float(np.exp(-(shares * np.log(shares)).sum())),
        used_codes=int((counts > 0).sum()),
    )
