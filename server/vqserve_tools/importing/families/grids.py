"""Projections of quantizers without a codebook."""

from __future__ import annotations

from vqserve_tools.importing.families.checkpoint import Checkpoint, listed, places_of
from vqserve_tools.importing.families.family import Floats
from vqserve_tools.importing.families.layers import read_pair

_LAYERS = ("project_in", "project_out")
_ROTATION = "orthogonal_rot"


def projections_to(checkpoint: Checkpoint, width: int) -> tuple[dict[str, int | None], dict[str, Floats]]:
    """Take the projections to `width` channels and back, if the checkpoint has them.

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
        raise checkpoint.refusal(f"{checkpoint.prefix}{rotations[0]}{_ROTATION}: a rotation is not held here")
    if len(places) > 1:
        raise checkpoint.refusal(f"it has several projections to {width} channels: pass --prefix {listed(places)}")
    if not places:
        several = places_of(arrays, f"{_LAYERS[0]}.weight") & {""}
        if several:
            raise checkpoint.refusal(
                f"{checkpoint.prefix}{_LAYERS[0]} does not give {width} channels: several codebooks side by side, or "
                "other levels or bits than were said"
            )
        return {"input_dim": None, "output_dim": None}, {}
    proj_in, proj_out = read_pair(checkpoint.at(places[0]), _LAYERS)
    tensors: dict[str, Floats] = {}
    for name, layer in (("proj_in", proj_in), ("proj_out", proj_out)):
        if layer is not None:
            tensors |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    return {
        "input_dim": None if proj_in is None else proj_in.inputs,
        "output_dim": None if proj_out is None else proj_out.outputs,
    }, tensors
