"""Gumbel quantizers of taming-transformers and sgm: the greatest logit of a 1x1 convolution wins."""

from __future__ import annotations

from collections.abc import Mapping

from vqserve_server.quantizers.declared import USED
from vqserve_tools.importing.families.checkpoint import Checkpoint, places_of
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.files import ForeignArray

_CODES, _PROJECTION, _BIAS = "embed.weight", "proj.weight", "proj.bias"


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    return {place for place in places_of(arrays, _CODES) if _fits(arrays, place)}


def _fits(arrays: Mapping[str, ForeignArray], place: str) -> bool:
    # The names alone are not enough: patch embeddings have them too.
    codes, projection = arrays[f"{place}{_CODES}"], arrays.get(f"{place}{_PROJECTION}")
    return (
        projection is not None
        and len(codes.shape) == 2
        and len(projection.shape) == 4
        and (projection.shape[0], *projection.shape[2:]) == (codes.shape[0], 1, 1)
    )


def _read(checkpoint: Checkpoint, _: Options) -> Reading:
    checkpoint.check_known([_CODES, _PROJECTION, _BIAS, USED])
    tensors = {name: checkpoint.floats(name) for name in (_CODES, _PROJECTION, _BIAS)}
    remap = {USED: checkpoint.integers(USED, "a remap")} if USED in checkpoint else {}
    (codes, width), hidden = tensors[_CODES].shape, tensors[_PROJECTION].shape[1]
    arguments = {"num_hiddens": hidden, "embedding_dim": width, "n_embed": codes}
    return Reading("a Gumbel quantizer of taming-transformers or sgm", "gumbel", arguments, {**tensors, **remap})


FAMILY = Family("Gumbel", _places, _read)
