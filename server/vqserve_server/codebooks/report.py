"""What a person wants to know of a codebook file before serving it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqserve_server.codebooks.codebook_file import Codebook
from vqserve_server.codebooks.device import select_device
from vqserve_server.quantizers import AbstractQuantizer, Quantizer, freeze

# Tokens a batch, on the EMA's average. A code that is met once in some hundred batches lies above.
_DEAD_CLUSTER_SIZE = 0.01
_ELEMENTS_PER_CHUNK = 1 << 22
# Kinds whose codes start within [-1/K, 1/K].
_UNIFORM_AT_FIRST = frozenset({"vq", "vq_projection"})
# The longest argument's name fits; a provenance's may be of any length.
_NAME_COLUMNS = 32
_LEAST_VALUE_COLUMNS = 20


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Euclidean norms of the codes."""

    min: float
    median: float
    max: float

    def __str__(self) -> str:
        return f"min {self.min:.6g}, median {self.median:.6g}, max {self.max:.6g}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """A codebook in numbers.

    Attributes:
        kind: "vq", "ema" and so on.
        digest: lower-case hexadecimal SHA-256 of what encode and decode read.
        num_codes: K (of each stage, if there are several).
        vocab_size: indices lie in [0, vocab_size).
        num_quantizers: indices per token.
        layout: of latents where a call does not say; None: by the number of axes.
        input_dim: channels that encode takes.
        code_dim: D.
        output_dim: channels that decode returns.
        dtype: element type of the codebook.
        arguments: of the quantizer's constructor.
        provenance: where the codebook came from, as its writer told it.
        norms: of the codes, those of all stages; None where codes are computed and not kept.
        duplicates: codes that equal an earlier one of their stage: encode never gives them.
        dead_looking: codes that training seems never to have moved or met; None where nothing tells.
        dead_looking_means: what `dead_looking` counts.
        search: the search backend chosen, by device type.
    """

    kind: str
    digest: str
    num_codes: int
    vocab_size: int
    num_quantizers: int
    layout: str | None
    input_dim: int
    code_dim: int
    output_dim: int
    dtype: str
    arguments: Mapping[str, object]
    provenance: Mapping[str, object]
    norms: Norms | None
    duplicates: int
    dead_looking: int | None
    dead_looking_means: str
    search: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def as_text(self, columns: int = 120) -> str:
        """Return lines for people; what the file says of itself is cut to so many columns, as_dict has all of it."""
        dead = "unknown" if self.dead_looking is None else f"{self.dead_looking} of {self.num_codes}"
        shown: list[tuple[str, object]] = [
            ("kind", self.kind),
            ("digest", self.digest),
            ("codes", f"{self.num_codes} of width {self.code_dim}, {self.dtype}"),
            ("vocabulary", self.vocab_size),
            ("indices", f"{self.num_quantizers} for a token"),
            (
                "channels",
                f"{self.input_dim} in, {self.output_dim} out, {self.layout or 'layout by the number of axes'}",
            ),
            ("norms", "none: the codes are computed" if self.norms is None else str(self.norms)),
            ("duplicates", f"{self.duplicates} (codes equal to an earlier one)"),
            ("dead-looking", f"{dead} ({self.dead_looking_means})"),
            ("search", ", ".join(f"{backend} on {device}" for device, backend in self.search.items())),
        ]
        own = [
            *((f"argument {name}", value) for name, value in self.arguments.items()),
            *((f"provenance {name}", value) for name, value in self.provenance.items()),
        ]
        names = [_cut(printable(name), _NAME_COLUMNS) for name, _ in (*shown, *own)]
        width = max(map(len, names))
        left = max(columns - width - 2, _LEAST_VALUE_COLUMNS)
        values = [*(str(value) for _, value in shown), *(_cut(printable(str(value)), left) for _, value in own)]
        return "".join(f"{name:{width}}  {value}\n" for name, value in zip(names, values, strict=True))


def inspect(codebook: Codebook) -> Report:
    """Return the report of a codebook; memory is bounded by a few times the codebook's own."""
    quantizer = codebook.quantizer
    devices = {"cpu", select_device("auto").type}
    frozen = {name: freeze(quantizer, device=name) for name in sorted(devices)}
    form = frozen["cpu"]
    codes = _codes(quantizer)
    dead, means = _dead_looking(codebook, codes)
    return Report(
        kind=codebook.kind,
        digest=codebook.digest,
        num_codes=form.num_codes,
        vocab_size=form.vocab_size,
        num_quantizers=form.num_quantizers,
        layout=None if quantizer.layout is None else str(quantizer.layout),
        input_dim=form.input_dim,
        code_dim=form.code_dim,
        output_dim=form.output_dim,
        dtype=str(form.weight_dtype).removeprefix("torch."),
        arguments=dict(codebook.arguments),
        provenance=dict(codebook.provenance),
        norms=_norms(codes) if codes else None,
        duplicates=sum(map(count_duplicates, codes)),
        dead_looking=dead,
        dead_looking_means=means,
        search={name: form.search_backend for name, form in frozen.items()},
    )


def _codes(quantizer: Quantizer) -> list[npt.NDArray[np.floating[Any]]]:
    """Return the codebook of every stage; none where codes are computed."""
    return [stage.code_rows().numpy() for stage in quantizer.modules() if isinstance(stage, AbstractQuantizer)]


def count_duplicates(codes: npt.NDArray[np.floating[Any]]) -> int:
    """Return how many rows equal an earlier one, zeros of either sign being equal."""
    # Sorted as bytes, which must then be equal where the numbers are.
    plain = np.ascontiguousarray(codes + codes.dtype.type(0))
    rows = plain.view(np.dtype((np.void, plain.shape[1] * plain.itemsize))).reshape(-1)
    return int(rows.size - np.unique(rows).size)


def _norms(codebooks: list[npt.NDArray[np.floating[Any]]]) -> Norms:
    chunks = [chunk for codes in codebooks for chunk in _chunks(codes)]
    norms = np.concatenate([np.linalg.norm(chunk.astype(np.float64), axis=1) for chunk in chunks])
    return Norms(min=float(norms.min()), median=float(np.median(norms)), max=float(norms.max()))


def _dead_looking(codebook: Codebook, codebooks: list[npt.NDArray[np.floating[Any]]]) -> tuple[int | None, str]:
    if codebook.kind == "ema":
        cluster_size = codebook.quantizer.state_dict()["embedding.cluster_size"].numpy()
        return int(np.count_nonzero(cluster_size < _DEAD_CLUSTER_SIZE)), f"cluster size below {_DEAD_CLUSTER_SIZE}"
    if codebook.kind not in _UNIFORM_AT_FIRST:
        return None, f"nothing tells in a codebook of kind {codebook.kind}"
    if codebook.arguments["embedding_weight_norm"]:
        return None, "a weight-normed codebook starts normal: nothing tells"
    [codes] = codebooks
    # As the initialiser rounds it.
    bound = codes.dtype.type(1 / codes.shape[0])
    inside = sum(int(np.count_nonzero(np.abs(chunk).max(axis=1) <= bound)) for chunk in _chunks(codes))
    return inside, "still within the initial range [-1/K, 1/K]"


def _chunks(codes: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    step = max(1, _ELEMENTS_PER_CHUNK // codes.shape[1])
    return [codes[start : start + step] for start in range(0, codes.shape[0], step)]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def printable(text: str) -> str:
    """Return text in which nothing that a file says of itself can move a terminal's cursor."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
