"""The families of foreign checkpoints (docs/codebooks.md lists them).

Each family has one module. It defines the keys by which the family is recognised, and how its arrays are read.
"""

from vqserve_tools.importing.families import (
    bsq,
    dac,
    encodec,
    fsq,
    gumbel,
    lfq,
    llamagen,
    lucidrains,
    mimi,
    named,
    qwen,
    residual_fsq,
    s3_tokenizer,
    semantic_ids,
    simvq,
    taming,
    unitok,
    unsupported,
    vqvae,
    whisper_vq,
    xy_tokenizer,
)
from vqserve_tools.importing.families.family import Family

# A checkpoint is compared with the families in this order: distinctive keys first, ambiguous keys last.
_BY_KEYS: tuple[Family, ...] = (
    unsupported.MULTI_SCALE,
    unsupported.RESIDUAL_LFQ,
    mimi.FAMILY,
    dac.FISH,
    dac.FAMILY,
    dac.AMPHION,
    xy_tokenizer.FAMILY,
    lucidrains.FAMILY,
    encodec.FAMILY,
    qwen.FAMILY,
    unitok.FAMILY,
    semantic_ids.FAMILY,
    simvq.FAMILY,
    gumbel.FAMILY,
    llamagen.FAMILY,
    s3_tokenizer.FAMILY,
    bsq.FAMILY,
    lfq.FAMILY,
    fsq.FAMILY,
    residual_fsq.FAMILY,
    residual_fsq.XCODEC,
    whisper_vq.FAMILY,
    vqvae.FAMILY,
    vqvae.COLUMNS,
    taming.FAMILY,
)
FAMILIES: tuple[Family, ...] = (*_BY_KEYS, named.last_resort(_BY_KEYS))

__all__ = ["FAMILIES", "Family"]
