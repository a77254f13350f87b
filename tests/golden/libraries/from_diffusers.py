"""Hugging Face diffusers: VQModel, of latent diffusion's VQ autoencoders and of aMUSEd."""

from __future__ import annotations

from diffusers import VQModel

from libraries.draw import Draw, by_parts
from libraries.golden import Golden
from libraries.library import fill, golden, named


def diffusers_vqmodel(draw: Draw) -> Golden:
    """Make latent diffusion's, as diffusers has it."""
    return _vqmodel(draw, codes=draw.size(256, 8192), width=draw.size(4, 3))


def amused(draw: Draw) -> Golden:
    """Make aMUSEd's: wider codes."""
    return _vqmodel(draw, codes=draw.size(96, 8192), width=draw.size(16, 64))


def _vqmodel(draw: Draw, *, codes: int, width: int) -> Golden:
    model = VQModel(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=width, num_vq_embeddings=codes, vq_embed_dim=width
    )
    quantizer = model.quantize
    quantizer.sane_index_shape = True
    codebook = draw.codes(codes, width)
    fill(model, draw, quantize__embedding__weight=codebook)
    latents = draw.images(draw.near([codebook]))
    indices = by_parts(lambda part: quantizer(part)[2][2], latents)
    batch, _, height, across = latents.shape
    decoded = quantizer.get_codebook_entry(indices.flatten(), (batch, height, across, width))
    state = named(model, only=("quantize.", "quant_conv.", "post_quant_conv.", "encoder.conv_in."))
    return golden("diffusers", state, latents, indices, decoded, suffix=".safetensors", flags=("--metric", "l2"))
