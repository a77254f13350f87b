"""taming-transformers, packaged by others: VQGAN, Gumbel VQGAN; and Open-MAGVIT2, which grew out of it."""

from __future__ import annotations

from libraries.draw import Draw, by_parts
from libraries.golden import Golden
from libraries.library import array, fill, golden, module_alone, named

_LIBRARY = "taming-transformers-rom1504"
_CHECKPOINT = {"suffix": ".ckpt", "wrapper": "state_dict", "beside": {"epoch": 3, "global_step": 1200}}


def taming(draw: Draw) -> Golden:
    """Make VQGAN's quantizer."""
    codes, width = draw.size(128, 16384), draw.size(16, 256)
    module = module_alone("taming.modules.vqvae.quantize").VectorQuantizer2(
        codes, width, beta=0.25, sane_index_shape=True
    )
    codebook = draw.codes(codes, width)
    fill(module, draw, embedding__weight=codebook)
    latents = draw.images(draw.near([codebook]))
    indices = by_parts(lambda part: module(part)[2][2], latents)
    decoded = module.get_codebook_entry(indices.flatten(), (*indices.shape, width))
    state = named(module, "quantize.") | _around(draw, width)
    return golden(_LIBRARY, state, latents, indices, decoded, flags=("--metric", "l2"), **_CHECKPOINT)


def taming_gumbel(draw: Draw) -> Golden:
    """Make Gumbel VQGAN's."""
    codes, width, hidden = draw.size(128, 8192), draw.size(16, 256), draw.size(16, 256)
    module = module_alone("taming.modules.vqvae.quantize").GumbelQuantize(
        num_hiddens=hidden, embedding_dim=width, n_embed=codes, use_vqinterface=True
    )
    fill(module, draw)
    latents = draw.images(draw.normal(draw.rows, hidden))
    # forward draws noise, in eval mode too: the model's own tokens are the argmax of the logits that it adds it to.
    indices = by_parts(lambda part: module.proj(part).argmax(dim=1), latents)
    decoded = module.get_codebook_entry(indices.flatten(), (*indices.shape, width))
    state = named(module, "quantize.") | _around(draw, width)
    return golden(_LIBRARY, state, latents, indices, decoded, **_CHECKPOINT)


def open_magvit2(draw: Draw) -> Golden:
    """Make Open-MAGVIT2's lookup-free quantizer: no key in the checkpoint, the first channel the least bit."""
    bits = 18
    module = module_alone("open_magvit2.taming.modules.vqvae.lookup_free_quantize").LFQ(dim=bits, codebook_size=2**bits)
    fill(module, draw)
    rows = draw.normal(draw.rows, bits)
    rows[::7, 3], rows[::11, 5] = 0.0, -0.0
    latents = draw.images(rows)
    # Flat: what forward returns after the latents and the loss.
    indices = by_parts(lambda part: module(part)[2].reshape(-1, 4, 4), latents)
    batch, *grid = indices.shape
    decoded = module.get_codebook_entry(indices.flatten(1), (batch, *grid, bits), None)
    state = {"encoder.conv_in.weight": array(draw.normal(8, 3, 3, 3))}
    flags = ("--kind", "lfq", "--bits", str(bits), "--bit-order", "little")
    return golden("open-magvit2", state, latents, indices, decoded, flags=flags, **_CHECKPOINT)


def _around(draw: Draw, width: int) -> dict[str, object]:
    """Return layers of the autoencoder, which are not the quantizer's."""
    return {
        "quant_conv.weight": array(draw.normal(width, width, 1, 1)),
        "quant_conv.bias": array(draw.normal(width)),
        "post_quant_conv.weight": array(draw.normal(width, width, 1, 1)),
        "post_quant_conv.bias": array(draw.normal(width)),
    }
