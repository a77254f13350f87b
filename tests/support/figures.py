"""The figures of a report, computed once more: numpy in float64, on whole arrays, from the state dict alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Encoded:
    """What tokens become.

    Attributes:
        ids: (n, q) full ids.
        wanted: (n, width) what is compared with the codes.
        found: the same, of the first 1, 2, 4, ... and all indices.
    """

    ids: np.ndarray
    wanted: np.ndarray
    found: list[np.ndarray]


def state_of(quantizer):
    return {name: tensor.numpy() for name, tensor in quantizer.state_dict().items()}


def to_float16(x):
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(x.dtype)


def to_bfloat16(x):
    """Round float32 numbers to their upper half, to nearest even."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(x.dtype)


def encode(quantizer, state, z):
    """Encode latents (n, C) with a quantizer's arguments and a state, which may have been rounded."""
    state = {name: array.astype(np.float64) for name, array in state.items() if array.dtype.kind == "f"}
    z = z.astype(np.float64)
    if quantizer.kind == "rvq":
        return _residual(quantizer, state, z)
    if quantizer.kind == "residual_fsq":
        return _residual_grid(quantizer, state, z)
    if quantizer.kind in {"fsq", "lfq"}:
        return _grid(quantizer, state, z)
    return _single(quantizer, state, z)


def _affine(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"] if f"{name}.weight" in state else x


def _unit(x):
    norms = np.sqrt((x * x).sum(axis=1, keepdims=True))
    return x / np.where(norms > 0, norms, 1)


def _squared_distances(x, codes):
    return ((x[:, None, :] - codes) ** 2).sum(axis=2)


def _weight(state, prefix=""):
    if f"{prefix}embedding.weight" in state:
        return state[f"{prefix}embedding.weight"]
    g, v = (state[f"{prefix}embedding.parametrizations.weight.original{i}"] for i in (0, 1))
    return g * v / np.sqrt((v * v).sum(axis=0, keepdims=True))


def _lookup(state, prefix, metric, normalised, z):
    x, codes = _affine(state, f"{prefix}proj_in", z), _weight(state, prefix)
    if metric == "l2":
        ids = _squared_distances(x, codes).argmin(axis=1)
    else:
        ids = (x @ (_unit(codes) if metric == "cosine" else codes).T).argmax(axis=1)
    rows = (_unit(codes) if normalised else codes)[ids]
    return ids, x, rows, _affine(state, f"{prefix}proj_out", rows)


def _single(quantizer, state, z):
    if quantizer.kind == "gumbel":
        scores = z @ state["proj.weight"][:, :, 0, 0].T + state["proj.bias"]
        used = np.arange(len(scores[0])) if quantizer.used is None else quantizer.used.numpy()
        return Encoded(used[scores[:, used].argmax(axis=1)][:, None], z, [])
    metric = quantizer.kind if quantizer.kind in {"cosine", "dot"} else "l2"
    ids, x, rows, out = _lookup(state, "", metric, getattr(quantizer, "decode_normalized", False), z)
    has_both = "proj_in.weight" in state and "proj_out.weight" in state
    if has_both and quantizer.input_dim == quantizer.output_dim:
        return Encoded(ids[:, None], z, [out])
    if metric == "cosine":
        return Encoded(ids[:, None], _unit(x), [_unit(rows)])
    return Encoded(ids[:, None], x, [rows])


def _residual(quantizer, state, z):
    structure = quantizer.structure
    count = structure.num_quantizers
    ids, steps = np.zeros((len(z), count), np.int64), {}
    for number, part in enumerate(structure.parts):
        prefix = f"parts.{number}."
        rest = _affine(state, f"{prefix}proj_in", z[:, part.start : part.stop])
        for i, place in enumerate(part.places):
            name = f"{prefix}stages.{i}."
            ids[:, place], _, _, out = _lookup(state, name, structure.metric, structure.decode_normalized, rest)
            rest = rest - out
            steps[place] = out
    found = []
    for stages in sorted({2**k for k in range(9) if 2**k < count} | {count}):
        total = np.zeros_like(z)
        for number, part in enumerate(structure.parts):
            taken = [steps[place] for place in part.places if place < stages]
            if taken:
                total[:, part.start : part.stop] += _affine(state, f"parts.{number}.proj_out", sum(taken))
        found.append(total)
    return Encoded(ids, z, found)


def _grid(quantizer, state, z):
    x = _affine(state, "proj_in", z)
    if quantizer.kind == "lfq":
        digits, levels = (x > 0).astype(np.int64), np.full(x.shape[1], 2)
        codes = np.where(digits > 0, 1.0, -1.0) / (np.sqrt(x.shape[1]) if quantizer.spherical else 1)
        wanted = _unit(x) if quantizer.spherical else x
    else:
        levels = np.array(quantizer.levels)
        if quantizer.bound == "symmetric":
            wanted = np.tanh(x)
            digits = np.floor((levels - 1) * (wanted + 1) / 2 + 0.5).astype(np.int64)
            codes = 2 * digits / (levels - 1) - 1
        else:
            sign, curve = (1, np.arctanh) if quantizer.bound == "atanh" else (-1, np.tan)
            half, offset = (levels - 1) * (1 + sign * 1e-3) / 2, np.where(levels % 2, 0, 0.5)
            bounded = np.tanh(x + curve(offset / half)) * half - offset
            digits = np.rint(bounded).astype(np.int64) + levels // 2
            wanted, codes = bounded / (levels // 2), digits / (levels // 2) - 1
    ids = (digits * np.concatenate([[1], np.cumprod(levels)[:-1]])).sum(axis=1)[:, None]
    if "proj_in.weight" in state and "proj_out.weight" in state and quantizer.input_dim == quantizer.output_dim:
        return Encoded(ids, z, [_affine(state, "proj_out", codes)])
    return Encoded(ids, wanted, [codes])


def _residual_grid(quantizer, state, z):
    levels, groups, count = np.array(quantizer.levels), quantizer.groups, quantizer.num_quantizers
    half, offset = (levels - 1) * 1.001 / 2, np.where(levels % 2, 0, 0.5)
    limit, is_symmetric = levels / (levels - 1), quantizer.bound in {"symmetric", "soft_clamp"}

    def bounded(x):
        return np.tanh(x + np.arctanh(offset / half)) * half - offset

    ids, steps = np.zeros((len(z), count), np.int64), {}
    for group, channels in enumerate(np.split(z, groups, axis=1)):
        rest = _affine(state, f"parts.{group}.proj_in", channels)
        if quantizer.bound == "atanh_twice":
            rest = bounded(rest)
        if quantizer.bound == "soft_clamp":
            rest = np.tanh(rest / limit) * limit
        for stage, place in enumerate(range(group, count, groups)):
            scale = (levels - 1.0 if quantizer.scales == "levels_minus_one" else levels * 1.0) ** -stage
            if is_symmetric:
                unit = np.tanh(rest / scale) if quantizer.bound == "symmetric" else np.clip(rest / scale, -1, 1)
                digits = np.floor((levels - 1) * (unit + 1) / 2 + 0.5).astype(np.int64)
                steps[place] = (2 * digits / (levels - 1) - 1) * scale
            else:
                digits = np.rint(bounded(rest / scale)).astype(np.int64) + levels // 2
                steps[place] = (digits / (levels // 2) - 1) * scale
            ids[:, place] = (digits * np.concatenate([[1], np.cumprod(levels)[:-1]])).sum(axis=1)
            rest = rest - steps[place]
    found = []
    for stages in sorted({2**k for k in range(9) if 2**k < count} | {count}):
        sums = [[steps[place] for place in range(group, stages, groups)] for group in range(groups)]
        outputs = [_affine(state, f"parts.{group}.proj_out", sum(taken)) for group, taken in enumerate(sums) if taken]
        # A group without indices decodes to zeros.
        missing = np.zeros((len(z), quantizer.output_dim - sum(output.shape[1] for output in outputs)))
        found.append(np.concatenate([*outputs, missing], axis=1))
    return Encoded(ids, z, found)
