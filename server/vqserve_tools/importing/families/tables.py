"""Readings of quantizers: one table of codes, chains of stages, and projections around quantizers without codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve_server.quantizers.declared import USED, WEIGHT, Metric
from vqserve_tools.importing.families.checkpoint import (
    Checkpoint,
    Floats,
    Layer,
    places_of,
    read_pair,
    shape_text,
)
from vqserve_tools.importing.families.family import Reading
from vqserve_tools.importing.families.name_lists import prefix_text

_LAYERS = ("project_in", "project_out")
_ROTATION = "orthogonal_rot"


@dataclass(frozen=True)
class Stage:
    """A codebook with its projections.

    Attributes:
        codes: (K, D) codes.
        proj_in: projection to D channels, or None.
        proj_out: projection from D channels, or None.
    """

    codes: Floats
    proj_in: Layer | None = None
    proj_out: Layer | None = None

    def tensors(self, prefix: str = "") -> dict[str, Floats]:
        """Return the tensors of the stage, with names that begin with `prefix`."""
        return {f"{prefix}{WEIGHT}": self.codes} | _projections(prefix, self.proj_in, self.proj_out)


@dataclass(frozen=True)
class Chain:
    """Stages of residual quantization: each stage quantizes the residual of the stages before it.

    Attributes:
        stages: one or more stages.
        proj_in: projection before the first stage, or None.
        proj_out: projection of the sum of all stages, or None.
    """

    stages: Sequence[Stage]
    proj_in: Layer | None = None
    proj_out: Layer | None = None


def single(
    family: str,
    stage: Stage,
    metric: Metric,
    *,
    decode_normalized: bool = False,
    used: npt.NDArray[np.int64] | None = None,
) -> Reading:
    """Return the reading of one codebook; its metric and projections determine the kind."""
    codes, width = stage.codes.shape
    tensors: dict[str, npt.NDArray[Any]] = {**stage.tensors()}
    if used is not None:
        tensors[USED] = used
    inputs = None if stage.proj_in is None else stage.proj_in.inputs
    outputs = None if stage.proj_out is None else stage.proj_out.outputs
    if metric == "l2" and inputs is None:
        sizes = {"n_e": codes, "e_dim": width, "embedding_weight_norm": False}
        return Reading(family, "vq", sizes, tensors)
    if metric == "l2":
        sizes = {"n_codes": codes, "codebook_dim": width, "embedding_weight_norm": False}
        return Reading(family, "vq_projection", {**sizes, "input_dim": inputs, "output_dim": outputs}, tensors)
    arguments: dict[str, object] = {"n_e": codes, "e_dim": width, "input_dim": inputs, "output_dim": outputs}
    if metric == "cosine":
        arguments["decode_normalized"] = decode_normalized
    return Reading(family, metric, arguments, tensors)


def residual(
    checkpoint: Checkpoint,
    family: str,
    chains: Sequence[Chain],
    metric: Metric,
    *,
    decode_normalized: bool = False,
    are_groups: bool = False,
    normalize_residuals: bool = False,
) -> Reading:
    """Return the reading of a residual quantizer.

    Args:
        checkpoint: checkpoint, for error messages.
        family: name of the family for messages.
        chains: one chain; or several chains, each with a group of the channels; or two chains that both use all
            channels.
        metric: metric of every stage.
        decode_normalized: whether a cosine stage decodes to rows of length one.
        are_groups: whether the chains have groups of channels.
        normalize_residuals: whether every stage searches its residual scaled to length one.

    Raises:
        ForeignCheckpointError: the codes of the stages have different widths, or the groups differ in stages.
    """
    stages = [stage for chain in chains for stage in chain.stages]
    widths = {stage.codes.shape[1] for stage in stages}
    if len(widths) > 1:
        listing = " and ".join(map(shape_text, sorted({stage.codes.shape for stage in stages})))
        raise checkpoint.error(f"its stages have codes of different widths, {listing}: all codes must have one width")
    [width] = widths
    if are_groups and len({len(chain.stages) for chain in chains}) > 1:
        raise checkpoint.error("its groups have different numbers of stages, which is not supported")
    if are_groups:
        # The indices of groups are those of all first stages, then of all second ones.
        stages = [stage for places in zip(*(chain.stages for chain in chains), strict=True) for stage in places]
    sizes = [len(stage.codes) for stage in stages]
    first = chains[0]
    outer = width if stages[0].proj_in is None else stages[0].proj_in.inputs
    channels = outer if first.proj_in is None else first.proj_in.inputs
    tensors: dict[str, Floats] = {}
    for part, chain in enumerate(chains):
        tensors |= _projections(f"parts.{part}.", chain.proj_in, chain.proj_out)
        for place, stage in enumerate(chain.stages):
            tensors |= stage.tensors(f"parts.{part}.stages.{place}.")
    arguments: Mapping[str, object] = {
        "num_quantizers": len(stages),
        "n_e": sizes if len(set(sizes)) > 1 else sizes[0],
        "e_dim": width,
        "input_dim": channels * len(chains) if are_groups else channels,
        "metric": metric,
        "decode_normalized": decode_normalized,
        "stage_projections": stages[0].proj_in is not None,
        "inner_dim": None if first.proj_in is None else first.proj_in.outputs,
        "groups": len(chains) if are_groups else 1,
        "first_quantizers": len(first.stages) if len(chains) > 1 and not are_groups else 0,
        "normalize_residuals": normalize_residuals,
        "layout": "channels_first",
    }
    return Reading(family, "rvq", arguments, tensors)


def projections_to(
    checkpoint: Checkpoint, width: int, *, biased: bool = False
) -> tuple[dict[str, int | None], dict[str, Floats]]:
    """Take the projections to `width` channels and back, if the checkpoint has them; see `read_pair`.

    Returns:
        The arguments `input_dim` and `output_dim`, and the tensors.

    Raises:
        ForeignCheckpointError: the checkpoint has several such projections, or a layer that is not supported.
    """
    arrays = checkpoint.names()
    places = sorted(
        place
        for place in places_of(arrays, f"{_LAYERS[0]}.weight")
        if arrays[f"{place}{_LAYERS[0]}.weight"].shape[:1] == (width,)
    )
    rotations = sorted(places_of(arrays, _ROTATION))
    if rotations:
        raise checkpoint.error(f"{checkpoint.prefix}{rotations[0]}{_ROTATION}: a rotation is not supported")
    if len(places) > 1:
        choices = " or ".join(prefix_text(checkpoint.prefix + place) for place in places)
        raise checkpoint.error(f"it has several projections to {width} channels: pass {choices}")
    if not places:
        several = places_of(arrays, f"{_LAYERS[0]}.weight") & {""}
        if several:
            raise checkpoint.error(
                f"{checkpoint.prefix}{_LAYERS[0]} does not have {width} outputs: the quantizer has several codebooks "
                "side by side, or other levels or bits than the options give"
            )
        return {"input_dim": None, "output_dim": None}, {}
    proj_in, proj_out = read_pair(checkpoint.at(places[0]), _LAYERS, biased=biased)
    return {
        "input_dim": None if proj_in is None else proj_in.inputs,
        "output_dim": None if proj_out is None else proj_out.outputs,
    }, _projections("", proj_in, proj_out)


def _projections(prefix: str, proj_in: Layer | None, proj_out: Layer | None) -> dict[str, Floats]:
    tensors: dict[str, Floats] = {}
    for name, layer in (("proj_in", proj_in), ("proj_out", proj_out)):
        if layer is not None:
            tensors |= {f"{prefix}{name}.weight": layer.weight, f"{prefix}{name}.bias": layer.bias}
    return tensors
