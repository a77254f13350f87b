"""Which tensors the kinds have, and of what shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from vqserve_server.quantizers.residual_structure import ResidualStructure

WEIGHT = "embedding.weight"
NORM = "embedding.parametrizations.weight.original0"
DIRECTION = "embedding.parametrizations.weight.original1"

Shapes: TypeAlias = dict[str, tuple[int, ...]]


def expected_shapes(kind: str, arguments: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the tensors that a quantizer of these arguments has, `used` left out.

    Raises:
        InvalidOption: the arguments of a residual quantizer do not fit together.
    """
    return _SHAPES[kind](arguments)


def structure_of(arguments: Mapping[str, Any]) -> ResidualStructure:
    """Return how the stages of a residual quantizer are arranged.

    Raises:
        InvalidOption: the arguments do not fit together.
    """
    return ResidualStructure(
        num_codes=arguments["n_e"],
        code_dim=arguments["e_dim"],
        **{name: value for name, value in arguments.items() if name not in {"n_e", "e_dim", "layout"}},
    )


def _gumbel(arguments: Mapping[str, Any]) -> Shapes:
    codes, width, hidden = arguments["n_embed"], arguments["embedding_dim"], arguments["num_hiddens"]
    return {"proj.weight": (codes, hidden, 1, 1), "proj.bias": (codes,), "embed.weight": (codes, width)}


def _ema(arguments: Mapping[str, Any]) -> Shapes:
    codes, width = arguments["n_embed"], arguments["embedding_dim"]
    return {WEIGHT: (codes, width), "embedding.cluster_size": (codes,), "embedding.embed_avg": (codes, width)}


def _vector(codes: int, width: int, arguments: Mapping[str, Any]) -> Shapes:
    return {NORM: (1, width), DIRECTION: (codes, width)} if arguments["embedding_weight_norm"] else _codes(codes, width)


def _vq(arguments: Mapping[str, Any]) -> Shapes:
    return _vector(arguments["n_e"], arguments["e_dim"], arguments)


def _vq_projection(arguments: Mapping[str, Any]) -> Shapes:
    width = arguments["codebook_dim"]
    return _vector(arguments["n_codes"], width, arguments) | _around(width, arguments)


def _lookup(arguments: Mapping[str, Any]) -> Shapes:
    width = arguments["e_dim"]
    return _codes(arguments["n_e"], width) | _around(width, arguments)


def _fsq(arguments: Mapping[str, Any]) -> Shapes:
    return _around(len(arguments["levels"]), arguments)


def _lfq(arguments: Mapping[str, Any]) -> Shapes:
    return _around(arguments["bits"], arguments)


def _rvq(arguments: Mapping[str, Any]) -> Shapes:
    structure = structure_of(arguments)
    width = structure.width if structure.stage_projections else None
    stage = _codes(structure.num_codes, structure.code_dim) | _projections(structure.code_dim, width, width)
    shapes: Shapes = {}
    for number, part in enumerate(structure.parts):
        prefix = f"parts.{number}."
        for place in range(len(part.places)):
            shapes |= {f"{prefix}stages.{place}.{name}": shape for name, shape in stage.items()}
        if structure.inner_dim is not None:
            channels = part.stop - part.start
            around = _projections(structure.inner_dim, channels, channels)
            shapes |= {f"{prefix}{name}": shape for name, shape in around.items()}
    return shapes


def _codes(codes: int, width: int) -> Shapes:
    return {WEIGHT: (codes, width)}


def _around(width: int, arguments: Mapping[str, Any]) -> Shapes:
    return _projections(width, arguments["input_dim"], arguments["output_dim"])


def _projections(width: int, inputs: int | None, outputs: int | None) -> Shapes:
    shapes: Shapes = {}
    if inputs is not None:
        shapes |= {"proj_in.weight": (width, inputs), "proj_in.bias": (width,)}
    if outputs is not None:
        shapes |= {"proj_out.weight": (outputs, width), "proj_out.bias": (outputs,)}
    return shapes


_SHAPES: Mapping[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "vq": _vq,
    "ema": _ema,
    "gumbel": _gumbel,
    "vq_projection": _vq_projection,
    "cosine": _lookup,
    "dot": _lookup,
    "rvq": _rvq,
    "fsq": _fsq,
    "lfq": _lfq,
}
