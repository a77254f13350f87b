"""Foreign checkpoints to quantizers, where nothing has to be guessed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve import __version__
from vqserve_server.codebooks.arguments import ARGUMENTS, ArgumentError, check_arguments
from vqserve_server.codebooks.conversion import build
from vqserve_server.codebooks.foreign import UNNAMED, ForeignArray, open_foreign
from vqserve_server.codebooks.safetensors_file import dtype_name
from vqserve_server.codebooks.state import (
    LEGACY_NAMES,
    USED,
    CodebookState,
    StateError,
    canonical_names,
    check_claims,
    check_values,
)
from vqserve_server.errors import ForeignCheckpointError
from vqserve_server.quantizers import Quantizer
from vqserve_server.validation import first_non_finite

METRICS = ("l2", "cosine", "dot")

_WEIGHT = "embedding.weight"
_DIRECTIONS = frozenset({"embedding.weight_v", LEGACY_NAMES["embedding.weight_v"]})
# Every tensor that one of the four quantizers can have.
_KNOWN = frozenset(
    {
        *LEGACY_NAMES,
        *LEGACY_NAMES.values(),
        _WEIGHT,
        "embedding.cluster_size",
        "embedding.embed_avg",
        "embed.weight",
        "proj.weight",
        "proj.bias",
        "proj_in.weight",
        "proj_in.bias",
        "proj_out.weight",
        "proj_out.bias",
        USED,
    }
)
# The ends by which a codebook shows itself in a model's state dict.
_CODES = (_WEIGHT, "embed.weight", *_DIRECTIONS)
# The one name under which a bare embedding.weight is known to be searched by distance: the others are shared by
# models that search by distance (taming, latent diffusion), by cosine (LlamaGen, TiTok) and by dot product (IBQ).
_L2_PREFIXES = ("", "regularization.")
_NOT_GUESSED = (
    "some models search the same keys by distance, others by cosine or dot product, and the wrong one gives wrong "
    "tokens: see how the model that it was trained with searches, and pass --metric l2 if it is by distance"
)


@dataclass(frozen=True)
class Import:
    """What an import took, what it left, and the quantizer that it made.

    Attributes:
        quantizer: on the CPU, in eval mode.
        kind: of the quantizer.
        arguments: of its constructor.
        taken: names in the checkpoint, with shape and element type.
        left: the other names in the checkpoint.
        assumed: arguments that no checkpoint holds, at the constructor's defaults.
        notes: what else a person should know.
        provenance: for `save_codebook`.
    """

    quantizer: Quantizer
    kind: str
    arguments: Mapping[str, object]
    taken: Mapping[str, str]
    left: tuple[str, ...]
    assumed: tuple[str, ...]
    notes: tuple[str, ...]
    provenance: Mapping[str, object]


def import_checkpoint(
    source: str | Path,
    *,
    key: str | None = None,
    prefix: str | None = None,
    metric: str | None = None,
    unknown_index: str | int = "random",
) -> Import:
    """Make a quantizer of a foreign checkpoint.

    Args:
        source: .npy, .npz, .safetensors, or a torch file (.pt, .pth, .ckpt, .bin, .th).
        key: name of the array that is the codebook (K, D); None: the state dict of a quantizer is looked for, or the
            file is a single array.
        prefix: where in the checkpoint the quantizer's state dict is; None: at its root.
        metric: "l2" says that the codebook is searched by distance, where the checkpoint cannot say so.
        unknown_index: what an id outside the checkpoint's remap is reported as: "random", "extra" or an integer.

    Raises:
        ForeignCheckpointError: one line with the reason and the way out.
    """
    source = Path(source)
    if metric not in (None, "l2"):
        raise ForeignCheckpointError(f"--metric {metric}: this version imports codebooks that are searched by l2 only")
    with open_foreign(source) as arrays:
        if UNNAMED in arrays and (key or prefix):
            raise ForeignCheckpointError(
                f"{source.name}: it holds one array without a name: leave --key and --prefix out"
            )
        if key is not None or UNNAMED in arrays:
            names = {_the_array(source, arrays, key): _WEIGHT}
            if metric is None:
                raise ForeignCheckpointError(
                    f"{source.name}: a bare array does not say how it is searched; {_NOT_GUESSED}"
                )
        else:
            names = _quantizer_names(source, arrays, _with_dot(prefix or ""), metric)
        taken = {name or "array": f"{_shape(arrays[name])} {arrays[name].dtype}" for name in names}
        left = tuple(name for name in arrays if name not in names)
        notes: list[str] = []
        tensors = {own: _read(source, name or "array", arrays[name], own, notes) for name, own in names.items()}
    try:
        state, assumed = _state(tensors, unknown_index)
        quantizer = build(state)
    except (ArgumentError, StateError) as error:
        raise ForeignCheckpointError(f"{source.name}: {error}") from None
    with source.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    provenance: dict[str, object] = {
        "importer": f"vqserve {__version__}",
        "source": source.name,
        "source_sha256": checksum,
        "tensors": {own: name for name, own in names.items()},
        "notes": notes,
    }
    if metric is not None:
        provenance["metric"] = metric
    return Import(quantizer, state.kind, state.arguments, taken, left, assumed, tuple(notes), provenance)


def _with_dot(prefix: str) -> str:
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def _the_array(source: Path, arrays: Mapping[str, ForeignArray], key: str | None) -> str:
    if key is None:
        return UNNAMED
    if key not in arrays:
        raise ForeignCheckpointError(f"{source.name}: there is no array {key!r}; {_candidates(arrays)}")
    return key


def _quantizer_names(
    source: Path, arrays: Mapping[str, ForeignArray], prefix: str, metric: str | None
) -> dict[str, str]:
    """Return the quantizer's own name of every tensor under the prefix, by the name in the checkpoint."""
    own = {name: name.removeprefix(prefix) for name in arrays if name.startswith(prefix)}
    where = f"under {prefix!r}" if prefix else "at its root"
    if not any(name in _CODES for name in own.values()):
        raise ForeignCheckpointError(f"{source.name}: there is no quantizer {where}; {_candidates(arrays)}")
    strange = sorted(set(own.values()) - _KNOWN)
    if strange:
        raise ForeignCheckpointError(
            f"{source.name}: {where} there is {strange[0]!r} too, which none of the quantizers here has: what it "
            f"means is not guessed; {_candidates(arrays)}"
        )
    if set(own.values()) <= {_WEIGHT, USED} and prefix not in _L2_PREFIXES and metric is None:
        raise ForeignCheckpointError(
            f"{source.name}: {prefix}{_WEIGHT} does not say how it is searched; {_NOT_GUESSED}"
        )
    return own


def _candidates(arrays: Mapping[str, ForeignArray]) -> str:
    """Return what --prefix or --key could name, in one line."""
    prefixes = {name.removesuffix(end) for name in arrays for end in _CODES if name.endswith(f".{end}")}
    if prefixes:
        return f"try --prefix {_listed(sorted(prefixes))}, or --key with the name of the codebook's array"
    matrices = sorted(f"{name} {_shape(array)}" for name, array in arrays.items() if len(array.shape) == 2)
    if matrices:
        return f"name the codebook's array by --key: {_listed(matrices)}"
    return "it has no array of two axes"


def _listed(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _read(source: Path, name: str, array: ForeignArray, own: str, notes: list[str]) -> npt.NDArray[Any]:
    """Return an array as the codebook holds it: float32, or int64 for the remap."""
    expected = 1 if own == USED else 2 if own == _WEIGHT else None
    if expected is not None and len(array.shape) != expected:
        what = "the codebook must be (K, D)" if own == _WEIGHT else "a remap has one axis"
        raise ForeignCheckpointError(f"{source.name}: {name} has shape {_shape(array)}: {what}")
    values = array.read()
    if own == USED:
        if values.dtype.kind not in "iu":
            raise ForeignCheckpointError(f"{source.name}: {name} is {array.dtype}: a remap holds integers")
        # An id beyond int64 wraps to a negative one, which is refused like any other that is not in [0, K).
        return values.astype(np.int64)
    if values.dtype.kind != "f" or values.dtype.itemsize > 8:
        raise ForeignCheckpointError(f"{source.name}: {name} is {array.dtype}: a codebook holds floating-point numbers")
    position = first_non_finite(values.astype(values.dtype.newbyteorder("="), copy=False))
    if position is not None:
        raise ForeignCheckpointError(f"{source.name}: {name}{list(position)} is {float(values[position])}")
    with np.errstate(over="ignore"):
        narrowed = values.astype(np.float32)
    if values.dtype.itemsize > 4:
        position = first_non_finite(narrowed)
        if position is not None:
            raise ForeignCheckpointError(
                f"{source.name}: {name}{list(position)} is {float(values[position])}, beyond float32's range"
            )
        rounded = int(np.count_nonzero(narrowed != values))
        exactly = f"{rounded} of {values.size} numbers were rounded" if rounded else "exactly"
        notes.append(f"{name}: float64 to float32, {exactly}")
    elif array.dtype != "float32":
        notes.append(f"{name}: {array.dtype} to float32, exactly")
    return narrowed


def _state(tensors: dict[str, npt.NDArray[Any]], unknown_index: str | int) -> tuple[CodebookState, tuple[str, ...]]:
    names = canonical_names(set(tensors))
    kind, sizes = _kind_and_sizes(tensors)
    known = ARGUMENTS[kind]
    given = {**sizes, "unknown_index": unknown_index}
    if "embedding_weight_norm" in known:
        given["embedding_weight_norm"] = _WEIGHT not in tensors
    arguments = check_arguments(kind, given)
    canonical = {names[name]: array for name, array in tensors.items()}
    check_claims(kind, arguments, {name: (dtype_name(array.dtype), array.shape) for name, array in canonical.items()})
    state = CodebookState(kind, arguments, canonical)
    check_values(state)
    return state, tuple(name for name in known if name not in given)


def _kind_and_sizes(tensors: Mapping[str, npt.NDArray[Any]]) -> tuple[str, dict[str, object]]:
    """Return the kind that has these tensors, and the sizes that they say; `check_claims` finds what does not fit."""
    if "embed.weight" in tensors:
        codes, width = _lengths(tensors, "embed.weight")
        hidden = tensors["proj.weight"].shape[1:2] if "proj.weight" in tensors else ()
        return "gumbel", {"n_embed": codes, "embedding_dim": width, "num_hiddens": next(iter(hidden), None)}
    weight = next(name for name in (_WEIGHT, *sorted(_DIRECTIONS)) if name in tensors)
    codes, width = _lengths(tensors, weight)
    if {"embedding.cluster_size", "embedding.embed_avg"} & set(tensors):
        return "ema", {"n_embed": codes, "embedding_dim": width}
    if "proj_in.weight" in tensors:
        out = _lengths(tensors, "proj_out.weight")[0] if "proj_out.weight" in tensors else None
        inner = _lengths(tensors, "proj_in.weight")[1]
        return "vq_projection", {"input_dim": inner, "n_codes": codes, "codebook_dim": width, "output_dim": out}
    return "vq", {"n_e": codes, "e_dim": width}


def _lengths(tensors: Mapping[str, npt.NDArray[Any]], name: str) -> tuple[int, int]:
    shape = tensors[name].shape
    if len(shape) != 2:
        raise StateError(f"tensor {name!r} has shape {list(shape)}: it must have two axes")
    return shape[0], shape[1]


def _shape(array: ForeignArray) -> str:
    return "x".join(str(length) for length in array.shape) or "scalar"
