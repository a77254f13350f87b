"""A guess at why a model's indices are not ours: which one option or order, if changed, would make them agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqserve.errors import CodebookError, InvalidArgument
from vqserve.layout import Layout
from vqserve_server.codebooks.kinds import KINDS
from vqserve_server.codebooks.state import CodebookState
from vqserve_server.quantizers import Quantizer, ResidualFiniteScalarQuantizer
from vqserve_server.quantizers.declared import WEIGHT, Metric
from vqserve_server.quantizers.fsq_boundaries import Bound
from vqserve_server.quantizers.residual_scalar import ResidualBound, Scales
from vqserve_server.quantizers.scalar import BitOrder
from vqserve_server.quantizers.tensors import to_rows, widen

Arrays = dict[str, npt.NDArray[Any]]
# Enough to tell chance from a reason.
_MAX_TOKENS = 4096
# Near-ties and a few damaged tokens may remain.
_AGREES = 0.9
_METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True)
class Reason:
    """A change that makes most indices agree.

    Attributes:
        what: what differs, with the option to pass if there is one.
        agree: number of tokens whose indices then agree.
        total: number of compared tokens.
    """

    what: str
    agree: int
    total: int

    def __str__(self) -> str:
        return f"{self.what} ({self.agree} of {self.total} tokens would agree)"


def find_reason(quantizer: Quantizer, z: Tensor, ours: Tensor, theirs: Tensor) -> Reason | None:
    """Return the change under which the most tokens agree, or None if most disagree under every one that is tried.

    Args:
        quantizer: quantizer of `ours`.
        z: latents, as `encode` takes them.
        ours: indices from `Quantizer.encode`.
        theirs: indices of the same shape.
    """
    rows = widen(to_rows(z, quantizer.layout))[:_MAX_TOKENS]
    mine, yours = (_by_token(quantizer, indices)[:_MAX_TOKENS] for indices in (ours, theirs))
    best = _share(mine, yours)
    found: Reason | None = None
    for what, candidate in _candidates(quantizer, z, rows, mine, yours):
        share = _share(candidate[0], candidate[1])
        if share > best and share >= _AGREES:
            best, found = share, Reason(what, round(share * len(yours)), len(yours))
    return found


def _by_token(quantizer: Quantizer, indices: Tensor) -> Tensor:
    """Return indices (n, n_q) of a tensor as `encode` returns it."""
    return to_rows(indices, quantizer.layout) if quantizer.has_stages else indices.reshape(-1, 1)


def _share(mine: Tensor, yours: Tensor) -> float:
    return float((mine == yours).all(dim=1).double().mean())


def _candidates(
    quantizer: Quantizer, z: Tensor, rows: Tensor, mine: Tensor, yours: Tensor
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield what is changed, with the indices (n, n_q) of both sides under that change."""
    yield from _offsets(mine, yours)
    yield from _stage_axes(mine, yours)
    for layout in Layout:
        if z.ndim > 2 and (other := _under_layout(quantizer, z, layout)) is not None and len(other) >= len(yours):
            yield f"the latents are {layout}: --layout {layout}", (other[: len(yours)], yours)
    for what, build in _variants(CodebookState.of(quantizer), quantizer):
        try:
            indices = build().encode(rows)
        except (CodebookError, InvalidArgument):
            # With these latents it leaves float32's range, so it is not the model's.
            continue
        yield what, (indices.reshape(len(rows), -1), yours)


def _offsets(mine: Tensor, yours: Tensor) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    offsets = torch.mode(yours - mine, dim=0).values
    if bool(offsets.any()):
        each = ", ".join(map(str, offsets.tolist()))
        what = f"{each} more than ours" if len(offsets) == 1 else f"more than ours by stage: {each}"
        yield f"the model's indices are {what}: subtract that from them", (mine, yours - offsets)


def _stage_axes(mine: Tensor, yours: Tensor) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    count = mine.shape[1]
    agreement = (mine[:, :, None] == yours[:, None, :]).double().mean(dim=0) if 1 < count <= 64 else None
    if agreement is not None:
        order = agreement.argmax(dim=1)
        if sorted(order.tolist()) == list(range(count)):
            each = ", ".join(map(str, order.tolist()))
            yield (
                f"the model's indices have the stages in another order: our stages are its {each}",
                (
                    mine,
                    yours[:, order],
                ),
            )


def _under_layout(quantizer: Quantizer, z: Tensor, layout: Layout) -> Tensor | None:
    before = quantizer.layout
    quantizer.layout = layout
    try:
        return _by_token(quantizer, quantizer.encode(z))
    except InvalidArgument:
        return None
    finally:
        quantizer.layout = before


def _variants(state: CodebookState, quantizer: Quantizer) -> Iterator[tuple[str, Callable[[], Quantizer]]]:
    """Yield what is changed, and a function that builds the changed quantizer."""
    arguments, tensors = dict(state.arguments), dict(state.tensors)
    for changes in _changes(state.kind):
        if not all(name in arguments for name in changes) or changes.items() <= arguments.items():
            continue
        changed = {**arguments, **changes}
        if changed.get("metric") != "cosine" and "decode_normalized" in changed:
            changed["decode_normalized"] = False
        names = " and ".join(f"the {name.replace('_', ' ')} is {value}" for name, value in changes.items())
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())
        yield f"{names}: {flags}", partial(_build, state.kind, changed, tensors)
    if quantizer.chains():
        yield from _stage_orders(state)
    elif quantizer.codebooks():
        yield from _single_variants(state, quantizer)


def _changes(kind: str) -> Iterator[Mapping[str, object]]:
    """Yield values of arguments that a checkpoint may not determine."""
    if kind == ResidualFiniteScalarQuantizer.kind:
        for bound, scales in product(get_args(ResidualBound), get_args(Scales)):
            yield {"bound": bound, "scales": scales}
        return
    yield from ({"bound": bound} for bound in get_args(Bound))
    yield from ({"bit_order": order} for order in get_args(BitOrder))
    yield from ({"metric": metric} for metric in _METRICS)


def _single_variants(state: CodebookState, quantizer: Quantizer) -> Iterator[tuple[str, Callable[[], Quantizer]]]:
    [codebook] = quantizer.codebooks()
    if codebook.metric is None or codebook.used is not None:
        return
    codes = codebook.code_rows().detach().cpu().numpy()
    projections = {name: array for name, array in state.tensors.items() if name.startswith("proj_")}
    for metric in _METRICS:
        if metric != codebook.metric:
            what = f"the metric is {metric}: --metric {metric}"
            yield what, partial(_single, quantizer, metric, {WEIGHT: codes} | projections)
    if codes.shape[0] == codes.shape[1]:
        transposed = np.ascontiguousarray(codes.T)
        what = "the codes are the columns of the array: --transpose"
        yield what, partial(_single, quantizer, codebook.metric, {WEIGHT: transposed} | projections)


def _single(quantizer: Quantizer, metric: Metric, tensors: Arrays) -> Quantizer:
    has_in, has_out = (f"{name}.weight" in tensors for name in ("proj_in", "proj_out"))
    inputs = quantizer.input_dim if has_in else None
    outputs = quantizer.output_dim if has_out else None
    codes, width = quantizer.num_codes, quantizer.code_dim
    if metric != "l2":
        sizes = {"n_e": codes, "e_dim": width, "input_dim": inputs, "output_dim": outputs}
        return _build(metric, sizes | ({"decode_normalized": False} if metric == "cosine" else {}), tensors)
    if has_in:
        sizes = {"n_codes": codes, "codebook_dim": width, "input_dim": inputs, "output_dim": outputs}
        return _build("vq_projection", sizes | {"embedding_weight_norm": False}, tensors)
    return _build("vq", {"n_e": codes, "e_dim": width, "embedding_weight_norm": False}, tensors)


def _stage_orders(state: CodebookState) -> Iterator[tuple[str, Callable[[], Quantizer]]]:
    """Yield the orders in which a sorted list of names, or a reversed one, gives the stages."""
    parts = {tuple(name.split(".")[:4]) for name in state.tensors if name.startswith("parts.0.stages.")}
    numbers = sorted({int(part[3]) for part in parts})
    if any(name.startswith("parts.1.") for name in state.tensors):
        return
    for order, what in (
        (numbers[::-1], "the stages are in the reversed order"),
        (sorted(numbers, key=str), "the stages are in the order 0, 1, 10, 11, ..., 2 of names that are sorted as text"),
    ):
        if order != numbers:
            n_e = state.arguments["n_e"]
            sizes = [n_e[old] for old in order] if isinstance(n_e, list) else n_e
            yield what, partial(_build, state.kind, {**state.arguments, "n_e": sizes}, _reordered(state.tensors, order))


def _reordered(tensors: Any, order: list[int]) -> Arrays:
    moved = {f"parts.0.stages.{old}.": f"parts.0.stages.{new}." for new, old in enumerate(order)}
    out: Arrays = {}
    for name, array in tensors.items():
        prefix = next((old for old in moved if name.startswith(old)), "")
        out[f"{moved.get(prefix, '')}{name.removeprefix(prefix)}"] = array
    return out


def _build(kind: str, arguments: Any, tensors: Arrays) -> Quantizer:
    given = {"layout": None, **arguments}
    if "unknown_index" in KINDS[kind].arguments:
        given.setdefault("unknown_index", "random")
    return CodebookState.of_arrays(kind, given, tensors).build()
