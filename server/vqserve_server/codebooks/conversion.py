"""Quantizer modules to plain data and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from vqserve_server.codebooks.arguments import ArgumentError, check_arguments
from vqserve_server.codebooks.safetensors_file import dtype_name
from vqserve_server.codebooks.state import CodebookState, StateError, canonical_names, check_claims, check_values
from vqserve_server.errors import CodebookError
from vqserve_server.quantizers import (
    CosineQuantizer,
    DotQuantizer,
    EMAVectorQuantizer,
    FiniteScalarQuantizer,
    GumbelQuantizer,
    LookupFreeQuantizer,
    Quantizer,
    ResidualQuantizer,
    VectorQuantizer,
    VectorQuantizerWithInputProjection,
)

_CLASSES: tuple[type[Quantizer], ...] = (
    VectorQuantizer,
    EMAVectorQuantizer,
    GumbelQuantizer,
    VectorQuantizerWithInputProjection,
    CosineQuantizer,
    DotQuantizer,
    ResidualQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
)
KINDS: dict[str, type[Quantizer]] = {cls.kind: cls for cls in _CLASSES}


def kind_of(quantizer: Quantizer) -> str:
    """Return the kind of a quantizer that a file can hold: a key of `KINDS`.

    Raises:
        CodebookError: it is of none of their classes.
    """
    # A subclass may compute something else: a file of it would be read as its base.
    for kind, cls in KINDS.items():
        if type(quantizer) is cls:
            return kind
    known = ", ".join(cls.__name__ for cls in KINDS.values())
    raise CodebookError(
        f"{type(quantizer).__name__} is not one of {known}: load its state dict into the one that it behaves like"
    )


def state_of(quantizer: Quantizer) -> CodebookState:
    """Return a quantizer's arguments and tensors, checked: what a file of it holds.

    The tensors are copies where the quantizer is not on the CPU, else they share its memory.

    Raises:
        CodebookError: it is of no kind that a file can hold, or its weights cannot be served.
    """
    kind = kind_of(quantizer)
    tensors = {name: tensor.detach().cpu() for name, tensor in quantizer.state_dict().items()}
    half = [name for name, tensor in tensors.items() if tensor.dtype in {torch.float16, torch.bfloat16}]
    if half:
        raise CodebookError(f"{half[0]} is {tensors[half[0]].dtype}: call .float() on the quantizer first")
    try:
        layout = None if quantizer.layout is None else str(quantizer.layout)
        arguments = check_arguments(kind, {**_ARGUMENTS_OF[kind](quantizer), "layout": layout})
        names = canonical_names(set(tensors))
        arrays = {names[name]: tensor.contiguous().numpy() for name, tensor in tensors.items()}
        check_claims(kind, arguments, {name: (dtype_name(array.dtype), array.shape) for name, array in arrays.items()})
        state = CodebookState(kind, arguments, arrays)
        check_values(state)
    except (ArgumentError, StateError) as error:
        raise CodebookError(f"this {type(quantizer).__name__} cannot be kept as a codebook: {error}") from None
    return state


def build(state: CodebookState) -> Quantizer:
    """Return the quantizer of a checked state, on the CPU and in eval mode; torch's global generator is left alone."""
    arguments: dict[str, Any] = dict(state.arguments)
    layout = arguments.pop("layout")
    tensors = {name: torch.from_numpy(array) for name, array in state.tensors.items()}
    with torch.random.fork_rng(devices=[]):
        quantizer = KINDS[state.kind](**arguments)
    quantizer.layout = layout
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        quantizer.double()
    # Taken up as a remap that is in a state dict always is: the constructor knows none.
    quantizer.load_state_dict(tensors, strict=True)
    return quantizer.eval()


def _unknown_index(quantizer: Any) -> str | int:
    # The attribute of an "extra" is the extra id itself: only the vocabulary tells it from a given integer.
    known = len(quantizer.used) if quantizer.used is not None else quantizer.num_codes
    return "extra" if quantizer.re_embed == known + 1 else quantizer.unknown_index


def _vector_arguments(quantizer: Any) -> dict[str, object]:
    return {
        "beta": quantizer.beta,
        "unknown_index": _unknown_index(quantizer),
        "sane_index_shape": quantizer.sane_index_shape,
        "log_perplexity": quantizer.log_perplexity,
        "embedding_weight_norm": "embedding.weight" not in quantizer.state_dict(),
        "loss_key": quantizer.loss_key,
    }


def _vq_arguments(quantizer: Any) -> dict[str, object]:
    return {"n_e": quantizer.n_e, "e_dim": quantizer.e_dim, **_vector_arguments(quantizer)}


def _ema_arguments(quantizer: Any) -> dict[str, object]:
    return {
        "n_embed": quantizer.num_tokens,
        "embedding_dim": quantizer.codebook_dim,
        "beta": quantizer.beta,
        "decay": quantizer.embedding.decay,
        "eps": quantizer.embedding.eps,
        "unknown_index": _unknown_index(quantizer),
        "loss_key": quantizer.loss_key,
    }


def _gumbel_arguments(quantizer: Any) -> dict[str, object]:
    return {
        "num_hiddens": quantizer.input_dim,
        "embedding_dim": quantizer.embedding_dim,
        "n_embed": quantizer.n_embed,
        "straight_through": quantizer.straight_through,
        "kl_weight": quantizer.kl_weight,
        # Trainers anneal the temperature: a reloaded quantizer goes on where this one is.
        "temp_init": quantizer.temperature,
        "unknown_index": _unknown_index(quantizer),
        "loss_key": quantizer.loss_key,
    }


def _projection_arguments(quantizer: Any) -> dict[str, object]:
    return {
        "n_codes": quantizer.n_e,
        "codebook_dim": quantizer.e_dim,
        **_projected_arguments(quantizer),
        **_vector_arguments(quantizer),
    }


def _projected_arguments(quantizer: Any) -> dict[str, object]:
    state = quantizer.state_dict()
    return {
        "input_dim": quantizer.input_dim if "proj_in.weight" in state else None,
        "output_dim": quantizer.output_dim if "proj_out.weight" in state else None,
    }


def _dot_arguments(quantizer: Any) -> dict[str, object]:
    return {
        "n_e": quantizer.n_e,
        "e_dim": quantizer.e_dim,
        **_projected_arguments(quantizer),
        "unknown_index": _unknown_index(quantizer),
    }


def _cosine_arguments(quantizer: Any) -> dict[str, object]:
    return {**_dot_arguments(quantizer), "decode_normalized": quantizer.decode_normalized}


def _residual_arguments(quantizer: Any) -> dict[str, object]:
    arguments = asdict(quantizer.structure)
    return {"n_e": arguments.pop("num_codes"), "e_dim": arguments.pop("code_dim"), **arguments}


def _fsq_arguments(quantizer: Any) -> dict[str, object]:
    return {"levels": list(quantizer.levels), "bound": quantizer.bound, **_projected_arguments(quantizer)}


def _lfq_arguments(quantizer: Any) -> dict[str, object]:
    return {
        "bits": quantizer.bits,
        "bit_order": quantizer.bit_order,
        "spherical": quantizer.spherical,
        **_projected_arguments(quantizer),
    }


_ARGUMENTS_OF = {
    "vq": _vq_arguments,
    "ema": _ema_arguments,
    "gumbel": _gumbel_arguments,
    "vq_projection": _projection_arguments,
    "cosine": _cosine_arguments,
    "dot": _dot_arguments,
    "rvq": _residual_arguments,
    "fsq": _fsq_arguments,
    "lfq": _lfq_arguments,
}
