"""State dicts with the names of taming-transformers and sgm, which many models share.

The name `quantize.embedding.weight` does not determine the metric: latent diffusion, diffusers' VQModel, aMUSEd,
Chameleon and Emu3 search by distance, some TiTok models by cosine, IBQ and Emu3.5 by dot product. sgm's own name is
`regularization.embedding.weight`; it searches by distance. In many models the module has one of a few other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from vqserve_server.codebooks.state import LEGACY_NAMES
from vqserve_server.quantizers.declared import DIRECTION, NORM, USED, WEIGHT
from vqserve_tools.importing.families.checkpoint import Checkpoint, Layer, layer_names, places_of, read_layer
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.name_lists import keys_text
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Stage, single
from vqserve_tools.importing.files import ForeignArray

_DIRECTIONS = (*(name for name in LEGACY_NAMES if LEGACY_NAMES[name] == DIRECTION), DIRECTION)
# Names that indicate a codebook.
CODES = (WEIGHT, *_DIRECTIONS)
_AVERAGES = ("embedding.cluster_size", "embedding.embed_avg")
_LAYERS = ("proj_in", "proj_out")
_PROJECTIONS = tuple(f"{layer}.{name}" for layer in _LAYERS for name in ("weight", "bias"))
_KNOWN = frozenset({*CODES, *LEGACY_NAMES, NORM, *_AVERAGES, *_PROJECTIONS, USED})
# Modules of the quantizer: in taming-transformers, in sgm, in other models, and in the quantizer's own state dict.
_OTHERS = (
    "codebook.",
    "quantization.",
    "quantizer.",
    "vector_quantization.",
    "vector_quantizer.",
    "vq.",
    "vq_layer.",
)
_ENDINGS = tuple(f".{module}" for module in ("quantize.", "regularization.", *_OTHERS))
WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")

_NAME = "a quantizer of taming-transformers or sgm"
_OTHER_NAME = "a quantizer with the names of taming-transformers"
_WHY = (
    "taming-transformers, latent diffusion, diffusers and Chameleon search these keys by l2, TiTok's 12-channel models "
    "by cosine, IBQ and Emu3.5 by dot"
)
_OTHER_WHY = "some models search by distance, some by cosine, some by dot product"
_OUR_WHY = "VectorQuantizer, CosineQuantizer and DotQuantizer have the same keys"
# TiTok has this array beside a codebook that training clusters.
_CLUSTERING = "embed_prob"


def _places(arrays: Mapping[str, ForeignArray]) -> set[str]:
    places = {place for name in CODES for place in places_of(arrays, name)}
    return {place for place in places if f".{place}".endswith(_ENDINGS)} | places & {""}


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    model = _model(checkpoint)
    checkpoint.check_known(_KNOWN | ({_CLUSTERING} if model == "TiTok" else set()))
    names = set(checkpoint.names()) & _KNOWN
    if names <= {WEIGHT, USED, *_PROJECTIONS}:
        return _bare(checkpoint, options, model)
    options.metric_of("a quantizer with these keys", "l2")
    options.decode_of("a quantizer with these keys", "l2", "raw")
    tensors: dict[str, npt.NDArray[Any]] = {
        name: _remap(checkpoint) if name == USED else checkpoint.floats(name) for name in sorted(names)
    }
    kind, sizes = _kind_and_sizes(checkpoint, tensors)
    return Reading(_NAME, kind, sizes, tensors)


def _bare(checkpoint: Checkpoint, options: Options, model: str) -> Reading:
    if model == "Emu3" or f".{checkpoint.prefix}".endswith(".regularization."):
        metric = options.metric or "l2"
    else:
        why = _OUR_WHY
        if f".{checkpoint.prefix}".endswith(".quantize."):
            why = _WHY
        elif model == _OTHER_NAME:
            why = _OTHER_WHY
        metric = options.asked_metric(checkpoint, f"{checkpoint.prefix}{WEIGHT}", why)
    if model == "TiTok":
        # The codes that its decoder predicts are not those of its tokens.
        checkpoint.knows(f"{checkpoint.prefix.removesuffix('quantize.')}pixel_quantize.{WEIGHT}")
        decode_normalized = options.decode_of(model, metric, "normalized")
    else:
        decode_normalized = options.asked_decode(checkpoint, f"{checkpoint.prefix}{WEIGHT}", metric)
    codes = checkpoint.floats(WEIGHT, rank=2, what="the codebook must be (K, D)")
    used = _remap(checkpoint) if USED in checkpoint else None
    _note_average(checkpoint, metric)
    stage = Stage(codes, *(_layer(checkpoint, name) for name in _LAYERS))
    return single(model, stage, metric, decode_normalized=decode_normalized, used=used)


def _layer(checkpoint: Checkpoint, name: str) -> Layer | None:
    return read_layer(checkpoint, name, biased=True) if layer_names([name]) & set(checkpoint.names()) else None


def _remap(checkpoint: Checkpoint) -> npt.NDArray[Any]:
    return checkpoint.integers(USED, "a remap")


def _model(checkpoint: Checkpoint) -> str:
    """Return the name of the model, recognised by the arrays beside the quantizer."""
    outside = checkpoint.prefix.removesuffix("quantize.")
    first = checkpoint.arrays.get(f"{outside}quant_conv.conv.weight")
    if first is not None and len(first.shape) == 5:
        return "Emu3"
    if f"{outside}latent_tokens" in checkpoint.arrays:
        return "TiTok"
    is_other = f".{checkpoint.prefix}".endswith(tuple(f".{module}" for module in _OTHERS))
    return _OTHER_NAME if is_other else _NAME


def _note_average(checkpoint: Checkpoint, metric: str) -> None:
    # LitEma of latent diffusion removes the dots from the names.
    outside = checkpoint.prefix.removesuffix("quantize.")
    place = checkpoint.prefix.removeprefix(outside)
    average = f"{outside}model_ema.{f'{place}{WEIGHT}'.replace('.', '')}"
    if average in checkpoint.arrays:
        checkpoint.note(
            f"{average} is a moving average of the imported codes; {keys_text([average])} --metric {metric} imports it"
        )


def _kind_and_sizes(checkpoint: Checkpoint, tensors: Mapping[str, npt.NDArray[Any]]) -> tuple[str, dict[str, object]]:
    """Return the kind of these tensors, and the sizes from their shapes; later checks find contradictions."""
    weight = next(name for name in CODES if name in tensors)
    codes, width = _lengths(checkpoint, tensors, weight)
    if set(_AVERAGES) & set(tensors):
        return "ema", {"n_embed": codes, "embedding_dim": width}
    normed = {"embedding_weight_norm": weight != WEIGHT}
    if "proj_in.weight" in tensors:
        out = _lengths(checkpoint, tensors, "proj_out.weight")[0] if "proj_out.weight" in tensors else None
        inner = _lengths(checkpoint, tensors, "proj_in.weight")[1]
        return "vq_projection", {
            "input_dim": inner,
            "n_codes": codes,
            "codebook_dim": width,
            "output_dim": out,
            **normed,
        }
    return "vq", {"n_e": codes, "e_dim": width, **normed}


def _lengths(checkpoint: Checkpoint, tensors: Mapping[str, npt.NDArray[Any]], name: str) -> tuple[int, int]:
    shape = tensors[name].shape
    if len(shape) != 2:
        raise checkpoint.error(f"tensor {name!r} has shape {list(shape)}: it must have two axes")
    return shape[0], shape[1]


FAMILY = Family("taming-transformers or sgm", _places, _read)
