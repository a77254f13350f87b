"""Every kind behind a server and in process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kinds import CASES, with_every_kind
from vqserve_server.quantizers import CosineQuantizer, DotQuantizer, FiniteScalarQuantizer, LookupFreeQuantizer
from vqserve_server.tokenizer import Tokenizer

KINDS = with_every_kind(
    {
        "cosine": lambda: CosineQuantizer(300, 6, decode_normalized=True),
        "dot": lambda: DotQuantizer(300, 4, input_dim=6, output_dim=5),
        "fsq": lambda: FiniteScalarQuantizer([8, 8, 8, 5, 5, 5]),
        "lfq": lambda: LookupFreeQuantizer(32, "big", input_dim=6, output_dim=6),
        **{name: CASES[name] for name in ("rvq", "rvq_sizes", "rvq_fish", "rvq_unitok", "rvq_normalized_residuals")},
    }
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(9,), (2, 5), (2, 3, 4), (1, 2, 3, 2)])
def test_remote_is_local(serving, connect, latents, kind, grid):
    torch.manual_seed(0)
    quantizer = KINDS[kind]()
    # (b, C, s), as audio has it.
    quantizer.layout = "channels_first"
    tokenizer = Tokenizer(quantizer, name=kind, device="cpu")
    client = connect(serving(tokenizer).target)
    assert client.codebooks() == [tokenizer.info]
    channels = tokenizer.info.input_dim
    array = latents(*((grid[0], channels, *grid[1:]) if len(grid) > 1 else (*grid, channels)))
    indices = client.encode(array)
    assert indices.dtype == np.min_scalar_type(tokenizer.info.vocab_size - 1)
    np.testing.assert_array_equal(indices, tokenizer.encode(array))
    for output in ("latents",) if tokenizer.info.has_stages else ("latents", "code_rows"):
        np.testing.assert_array_equal(client.decode(indices, output=output), tokenizer.decode(indices, output=output))
