"""What a person says of a checkpoint that its keys do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from vqserve.layout import Layout
from vqserve_server.codebooks.kinds import KINDS
from vqserve_server.errors import ForeignCheckpointError
from vqserve_server.quantizers.fsq_boundaries import Bound
from vqserve_server.quantizers.quantizer import Metric
from vqserve_server.quantizers.scalar import BitOrder
from vqserve_tools.importing.families.checkpoint import Checkpoint

Decode = Literal["normalized", "raw"]
METRICS: tuple[Metric, ...] = get_args(Metric)
DECODES: tuple[Decode, ...] = get_args(Decode)
BIT_ORDERS: tuple[BitOrder, ...] = get_args(BitOrder)

# Options that only the kinds with one of these constructor arguments have a use for.
_ARGUMENTS: Mapping[str, str] = {
    "levels": "levels",
    "bound": "bound",
    "bits": "bits",
    "bit_order": "bit_order",
    "spherical": "spherical",
    "metric": "metric",
    "decode": "decode_normalized",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """None, or what stands for it, where nothing was said.

    Attributes:
        keys: names of the arrays that are the codebook, of a residual one in the order of its stages.
        prefix: where in the checkpoint the quantizer is.
        kind: of the quantizer that is to be made.
        metric: how codes are searched.
        decode: whether a cosine codebook decodes to rows of length one or as they are stored.
        levels: of finite scalar quantization.
        bound: of finite scalar quantization.
        bits: of lookup-free quantization.
        bit_order: of lookup-free quantization.
        spherical: lookup-free quantization decodes to codes of length one.
        layout: of latents where a call does not say.
        unknown_index: what an id outside the checkpoint's remap is reported as.
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
        """Refuse what was said and has no meaning for the kind that was made.

        Raises:
            ForeignCheckpointError: names the option.
        """
        if self.kind not in (None, kind):
            raise ForeignCheckpointError(f"what was found is of kind {kind}, not --kind {self.kind}")
        for field in fields(self):
            if getattr(self, field.name) != field.default and not _has_use(field.name, kind):
                flag = field.name.replace("_", "-")
                raise ForeignCheckpointError(f"--{flag} has no meaning for kind {kind}: leave it out")

    def metric_of(self, family: str, metric: Metric) -> Metric:
        """Return the one metric that a family is searched by.

        Raises:
            ForeignCheckpointError: another one was asked for.
        """
        if self.metric not in (None, metric):
            raise ForeignCheckpointError(
                f"{family} is searched by {metric}, not --metric {self.metric}: leave it out (arrays named by --key "
                "are searched as --metric says)"
            )
        return metric

    def asked_metric(self, checkpoint: Checkpoint, what: str, why: str, among: Iterable[Metric] = METRICS) -> Metric:
        """Return the metric that a person must have said, because keys cannot.

        Args:
            checkpoint: for the message.
            what: does not tell.
            why: it does not.
            among: the metrics that there are for it.

        Raises:
            ForeignCheckpointError: none was said, or one that is not among them.
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
        """Return whether rows are decoded to length one; a person must have said it of a cosine codebook.

        Raises:
            ForeignCheckpointError: nothing was said of a cosine codebook.
        """
        if metric == "cosine" and self.decode is None:
            raise checkpoint.refusal(
                f"{what} does not say what it decodes to: pass --decode normalized for rows of length one (LlamaGen, "
                "TiTok), or --decode raw for rows as they are stored (DAC, vector-quantize-pytorch)"
            )
        return self.decode_of(what, metric, self.decode or "raw")

    def decode_of(self, family: str, metric: Metric, decode: Decode) -> bool:
        """Return whether rows are decoded to length one, which the family settles.

        Raises:
            ForeignCheckpointError: another way was asked for, or any way where the metric is not cosine.
        """
        if self.decode is not None and metric != "cosine":
            raise ForeignCheckpointError(f"--decode is for --metric cosine, not {metric}: leave it out")
        if self.decode not in (None, decode):
            raise ForeignCheckpointError(f"{family} decodes to {decode} rows, not --decode {self.decode}: leave it out")
        return metric == "cosine" and decode == "normalized"


def _has_use(option: str, kind: str) -> bool:
    argument = _ARGUMENTS.get(option)
    if argument is None or argument in KINDS[kind].arguments:
        return True
    return option == "metric" and KINDS[kind].metric is not None
