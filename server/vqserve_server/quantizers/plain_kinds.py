"""The kinds that can be plain: one search and one lookup. Their classes inherit these declarations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vqserve_server.quantizers.arguments import (
    CODE_DIM,
    CODES,
    FLAG,
    INPUT_DIM,
    LAYOUT,
    LOSS_KEY,
    PROJECTIONS,
    UNKNOWN_INDEX,
    Argument,
    flag,
    number,
)
from vqserve_server.quantizers.declared import (
    DIRECTION,
    NORM,
    WEIGHT,
    Metric,
    PlainCodebook,
    PlainKind,
    Shapes,
    Tensors,
)
from vqserve_server.search.quotients import normalised_columns, normalised_rows
from vqserve_server.search.searcher import Objective

_CLUSTER_SIZES = "embedding.cluster_size"
_SUMS = "embedding.embed_avg"
VECTOR_ARGUMENTS: Mapping[str, Argument] = {
    "unknown_index": UNKNOWN_INDEX,
    "sane_index_shape": Argument(flag, default=False),
    "log_perplexity": Argument(flag, default=False),
    "embedding_weight_norm": FLAG,
    "loss_key": LOSS_KEY,
    "layout": LAYOUT,
}


class VectorKind(PlainKind):
    """`VectorQuantizer`."""

    kind: ClassVar[str] = "vq"
    arguments: ClassVar[Mapping[str, Argument]] = {
        "n_e": CODES,
        "e_dim": CODE_DIM,
        "beta": Argument(number, default=0.25),
        **VECTOR_ARGUMENTS,
    }
    metric: ClassVar[Metric | None] = "l2"

    @classmethod
    def tensor_shapes(cls, arguments: Mapping[str, Any]) -> Shapes:
        """Return the shapes of the weight, or of norms and directions; see `PlainKind`."""
        codes, dim = arguments["n_e"], arguments["e_dim"]
        if arguments["embedding_weight_norm"]:
            return {NORM: (1, dim), DIRECTION: (codes, dim)}
        return {WEIGHT: (codes, dim)}

    @classmethod
    def plain(cls, arguments: Mapping[str, Any], tensors: Tensors) -> PlainCodebook | None:
        """Return the codebook; see `PlainKind`."""
        if arguments["embedding_weight_norm"]:
            directions = tensors[DIRECTION]
            weight = normalised_columns(directions, tensors[NORM]).astype(directions.dtype, copy=False)
            return PlainCodebook(codes=weight, code_rows=weight)
        weight = tensors[WEIGHT]
        return PlainCodebook(codes=weight, code_rows=weight, initial_bound=1.0 / len(weight))


class EMAKind(PlainKind):
    """`EMAVectorQuantizer`."""

    kind: ClassVar[str] = "ema"
    arguments: ClassVar[Mapping[str, Argument]] = {
        "n_embed": CODES,
        "embedding_dim": CODE_DIM,
        # The constructor has no default: this is the original paper's (https://arxiv.org/abs/1711.00937).
        "beta": Argument(number, default=0.25),
        "decay": Argument(number, default=0.99, attribute="embedding.decay"),
        "eps": Argument(number, default=1e-5, attribute="embedding.eps"),
        "unknown_index": UNKNOWN_INDEX,
        "loss_key": LOSS_KEY,
        "layout": LAYOUT,
    }
    training_tensors: ClassVar[frozenset[str]] = frozenset({_CLUSTER_SIZES, _SUMS})
    metric: ClassVar[Metric | None] = "l2"

    @classmethod
    def tensor_shapes(cls, arguments: Mapping[str, Any]) -> Shapes:
        """Return the shapes of the weight and its averages; see `PlainKind`."""
        codes, dim = arguments["n_embed"], arguments["embedding_dim"]
        return {WEIGHT: (codes, dim), _CLUSTER_SIZES: (codes,), _SUMS: (codes, dim)}

    @classmethod
    def plain(cls, arguments: Mapping[str, Any], tensors: Tensors) -> PlainCodebook | None:
        """Return the codebook; see `PlainKind`."""
        return PlainCodebook(codes=tensors[WEIGHT], code_rows=tensors[WEIGHT], cluster_sizes=tensors[_CLUSTER_SIZES])


class GumbelKind(PlainKind):
    """`GumbelQuantizer`."""

    kind: ClassVar[str] = "gumbel"
    arguments: ClassVar[Mapping[str, Argument]] = {
        "num_hiddens": INPUT_DIM,
        "embedding_dim": CODE_DIM,
        "n_embed": CODES,
        "straight_through": Argument(flag, default=True),
        "kl_weight": Argument(number, default=5e-4),
        # Trainers anneal the temperature: a quantizer that is loaded goes on with this one's.
        "temp_init": Argument(number, default=1.0, attribute="temperature"),
        "unknown_index": UNKNOWN_INDEX,
        "loss_key": LOSS_KEY,
        "layout": LAYOUT,
    }
    is_approximate = False

    @classmethod
    def served_arguments(cls, arguments: Mapping[str, object], *, remapped: bool) -> dict[str, object]:
        """Return what `Declared.served_arguments` does.

        Under a remap no unknown id is ever reported: it matters only whether decode takes the extra index.
        """
        served = super().served_arguments(arguments, remapped=remapped)
        if remapped and served["unknown_index"] != "extra":
            served["unknown_index"] = "random"
        return served

    @classmethod
    def tensor_shapes(cls, arguments: Mapping[str, Any]) -> Shapes:
        """Return the shapes of the logits' projection and of the weight; see `PlainKind`."""
        codes, hidden, dim = arguments["n_embed"], arguments["num_hiddens"], arguments["embedding_dim"]
        return {"proj.weight": (codes, hidden, 1, 1), "proj.bias": (codes,), "embed.weight": (codes, dim)}

    @classmethod
    def plain(cls, arguments: Mapping[str, Any], tensors: Tensors) -> PlainCodebook | None:
        """Return the codebook; see `PlainKind`."""
        weight, rows = tensors["proj.weight"], tensors["embed.weight"]
        codes = weight.reshape(weight.shape[:2])
        return PlainCodebook(codes=codes, code_rows=rows, objective=Objective.DOT, bias=tensors["proj.bias"])


class LookupKind(PlainKind):
    """`LookupQuantizer`, the base of the kinds with optional projections."""

    @classmethod
    def tensor_shapes(cls, arguments: Mapping[str, Any]) -> Shapes:
        """Return the shapes of the weight and of the projections that there are; see `PlainKind`."""
        codes, dim = arguments["n_e"], arguments["e_dim"]
        inputs, outputs = arguments["input_dim"], arguments["output_dim"]
        shapes: dict[str, tuple[int, ...]] = {WEIGHT: (codes, dim)}
        if inputs is not None:
            shapes |= {"proj_in.weight": (dim, inputs), "proj_in.bias": (dim,)}
        if outputs is not None:
            shapes |= {"proj_out.weight": (outputs, dim), "proj_out.bias": (outputs,)}
        return shapes


class CosineKind(LookupKind):
    """`CosineQuantizer`."""

    kind: ClassVar[str] = "cosine"
    arguments: ClassVar[Mapping[str, Argument]] = {
        "n_e": CODES,
        "e_dim": CODE_DIM,
        "decode_normalized": FLAG,
        **PROJECTIONS,
        "unknown_index": UNKNOWN_INDEX,
        "layout": LAYOUT,
    }
    metric: ClassVar[Metric | None] = "cosine"

    @classmethod
    def plain(cls, arguments: Mapping[str, Any], tensors: Tensors) -> PlainCodebook | None:
        """Return the codebook without projections; see `PlainKind`."""
        if not _is_bare(tensors):
            return None
        weight = tensors[WEIGHT]
        unit = normalised_rows(weight).astype(weight.dtype, copy=False)
        rows = unit if arguments["decode_normalized"] else weight
        return PlainCodebook(codes=unit, code_rows=rows, objective=Objective.DOT, space="directions")


class DotKind(LookupKind):
    """`DotQuantizer`."""

    kind: ClassVar[str] = "dot"
    arguments: ClassVar[Mapping[str, Argument]] = {
        "n_e": CODES,
        "e_dim": CODE_DIM,
        **PROJECTIONS,
        "unknown_index": UNKNOWN_INDEX,
        "layout": LAYOUT,
    }
    metric: ClassVar[Metric | None] = "dot"

    @classmethod
    def plain(cls, arguments: Mapping[str, Any], tensors: Tensors) -> PlainCodebook | None:
        """Return the codebook without projections; see `PlainKind`."""
        if not _is_bare(tensors):
            return None
        return PlainCodebook(codes=tensors[WEIGHT], code_rows=tensors[WEIGHT], objective=Objective.DOT)


def _is_bare(tensors: Tensors) -> bool:
    """Return whether there are no projections."""
    return set(tensors) == {WEIGHT}


PLAIN_KINDS: Mapping[str, type[PlainKind]] = {
    cls.kind: cls for cls in (VectorKind, EMAKind, GumbelKind, CosineKind, DotKind)
}
