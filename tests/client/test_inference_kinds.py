"""The kinds that only infer, and have one index for a token, behind a server and in process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vqserve_server.quantizers import CosineQuantizer, DotQuantizer, FiniteScalarQuantizer, LookupFreeQuantizer
from vqserve_server.tokenizer import Tokenizer

KINDS = {
    "cosine": lambda: CosineQuantizer(300, 6, decode_normalized=True),
    "dot": lambda: DotQuantizer(300, 4, input_dim=6, output_dim=5),
    "fsq": lambda: FiniteScalarQuantizer([8, 8, 8, 5, 5, 5]),
    "lfq": lambda: LookupFreeQuantizer(32, "big", input_dim=6, output_dim=6),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(9, 6), (2, 6, 5), (2, 6, 3, 4), (1, 6, 2, 3, 2)])
def test_remote_is_local(serving, connect, latents, kind, shape):
    torch.manual_seed(0)
    quantizer = KINDS[kind]()
    # (b, C, s), as audio has it.
    quantizer.layout = "channels_first"
    tokenizer = Tokenizer(quantizer, name=kind, device="cpu")
    client = connect(serving(tokenizer).target)
    assert client.codebooks() == [tokenizer.info]
    array = latents(*shape)
    indices = client.encode(array)
    assert indices.dtype == (np.uint32 if kind == "lfq" else np.uint16)
    np.testing.assert_array_equal(indices, tokenizer.encode(array))
    for output in ("latents", "code_rows"):
        np.testing.assert_array_equal(client.decode(indices, output=output), tokenizer.decode(indices, output=output))
