"""Options of an import: facts about a quantizer that its checkpoint does not contain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from vqserve.layout import Layout
from vqserve_server.errors import ForeignCheckpointError
from vqserve_server.quantizers.fsq_boundaries import Bound
from vqserve_server.quantizers.lfq import BitOrder
from vqserve_server.quantizers.residual_structure import Metric
from vqserve_tools.importing.families.checkpoint import Checkpoint

Decode = Literal["normalized", "raw"]
METRICS: tuple[Metric, ...] = get_args(Metric)
DECODES: tuple[Decode, ...] = get_args(Decode)
BIT_ORDERS: tuple[BitOrder, ...] = get_args(BitOrder)

# Options that some kinds alone have a use for.
_KINDS: Mapping[str, frozenset[str]] = {
    "levels": frozenset({"fsq"}),
    "bound": frozenset({"fsq"}),
    "bits": frozenset({"lfq"}),
    "bit_order": frozenset({"lfq"}),
    "spherical": frozenset({"lfq"}),
    "metric": frozenset({"vq", "ema", "vq_projection", "cosine", "dot", "rvq"}),
    "decode": frozenset({"cosine", "rvq"}),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of an import; the defaults mean that an option was not given.

    Attributes:
        keys: names of the codebook arrays; for a residual codebook in the order of its stages.
        prefix: prefix of the quantizer in the checkpoint.
        kind: kind of the quantizer.
        metric: metric of the search.
        decode: whether a cosine codebook decodes to rows of length one ("normalized") or to stored rows ("raw").
        levels: levels of finite scalar quantization.
        bound: bound of finite scalar quantization.
        bits: number of bits of lookup-free quantization.
        bit_order: bit order of lookup-free quantization.
        spherical: whether lookup-free quantization decodes to codes of length one.
        layout: default layout of latents.
        unknown_index: index that is reported for an id outside the checkpoint's remap.
    """

    keys: tuple[str, ...] = ()
    prefix: str = ""
    kind: str | None = None
    metric: Metric | None = None
    decode: Decode | None = None
    levels: tuple[int, ...] | None = None
    bound: Bound | None = None
    bits: int | None = None
    bit_order: BitOrder | None = None
    spherical: bool = False
    layout: Layout | None = None
    unknown_index: str | int = "random"

    def check_use(self, kind: str) -> None:
        """Check that all given options have a meaning for the kind of the quantizer.

        Raises:
            ForeignCheckpointError: an option has none; the error names it.
        """
        if self.kind not in (None, kind):
            raise ForeignCheckpointError(f"what was found is of kind {kind}, not --kind {self.kind}")
        for field in fields(self):
            kinds = _KINDS.get(field.name)
            if kinds is not None and kind not in kinds and getattr(self, field.name) != field.default:
                flag = field.name.replace("_", "-")
                raise ForeignCheckpointError(f"--{flag} has no meaning for kind {kind}: leave it out")

    def metric_of(self, family: str, metric: Metric) -> Metric:
        """Return the only metric of a family.

        Raises:
            ForeignCheckpointError: the option asks for another metric.
        """
        if self.metric not in (None, metric):
            raise ForeignCheckpointError(
                f"{family} is searched by {metric}, not --metric {self.metric}: leave it out (arrays named by --key "
                "are searched as --metric says)"
            )
        return metric

    def asked_metric(self, checkpoint: Checkpoint, what: str, why: str, among: Iterable[Metric] = METRICS) -> Metric:
        """Return the metric of the options, which is required because the checkpoint does not define it.

        Args:
            checkpoint: checkpoint, for error messages.
            what: subject of the message, such as "an array of codes".
            why: reason why the checkpoint does not define the metric.
            among: metrics that are possible.

        Raises:
            ForeignCheckpointError: no metric was given, or one that is not possible.
        """
        choice = " or ".join(f"--metric {metric}" for metric in among)
        if self.metric is None:
            raise checkpoint.refusal(
                f"{what} does not say how it is searched: {why}, and the wrong metric gives wrong tokens without an "
                f"error; see how the model that it was trained with searches, and pass {choice}"
            )
        if self.metric not in among:
            raise checkpoint.refusal(f"{what} is not searched by {self.metric}: pass {choice}")
        return self.metric

    def asked_decode(self, checkpoint: Checkpoint, what: str, metric: Metric) -> bool:
        """Return whether rows decode to length one; the option is required for a cosine codebook.

        Raises:
            ForeignCheckpointError: the option is missing for a cosine codebook.
        """
        if metric == "cosine" and self.decode is None:
            raise checkpoint.refusal(
                f"{what} does not say what it decodes to: pass --decode normalized for rows of length one (LlamaGen, "
                "TiTok), or --decode raw for rows as they are stored (DAC, vector-quantize-pytorch)"
            )
        return self.decode_of(what, metric, self.decode or "raw")

    def decode_of(self, family: str, metric: Metric, decode: Decode) -> bool:
        """Return whether rows decode to length one, which the family defines.

        Raises:
            ForeignCheckpointError: the option contradicts the family, or is given for a metric other than cosine.
        """
        if self.decode is not None and metric != "cosine":
            raise ForeignCheckpointError(f"--decode is for --metric cosine, not {metric}: leave it out")
        if self.decode not in (None, decode):
            raise ForeignCheckpointError(f"{family} decodes to {decode} rows, not --decode {self.decode}: leave it out")
        return metric == "cosine" and decode == "normalized"
