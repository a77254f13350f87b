"""Options of an import: facts about a quantizer that its checkpoint does not contain."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from vqserve.errors import ForeignCheckpointError
from vqserve.layout import Layout
from vqserve_server.codebooks.kinds import KINDS
from vqserve_server.quantizers.arguments import check_unknown_index
from vqserve_server.quantizers.declared import Metric
from vqserve_server.quantizers.fsq_boundaries import Bound
from vqserve_server.quantizers.residual_scalar import ResidualBound, Scales
from vqserve_server.quantizers.scalar import BOUNDS, BitOrder
from vqserve_tools.flags import option
from vqserve_tools.importing.families.checkpoint import Checkpoint

Decode = Literal["normalized", "raw"]
METRICS: tuple[Metric, ...] = get_args(Metric)
DECODES: tuple[Decode, ...] = get_args(Decode)
RESIDUAL_BOUNDS: tuple[ResidualBound, ...] = get_args(ResidualBound)
SCALES: tuple[Scales, ...] = get_args(Scales)
BIT_ORDERS: tuple[BitOrder, ...] = get_args(BitOrder)

# Constructor argument of each option that applies only to kinds with this argument.
_ARGUMENTS: Mapping[str, str] = {
    "levels": "levels",
    "bound": "bound",
    "scales": "scales",
    "stages": "scales",
    "library_version": "scales",
    "bits": "bits",
    "bit_order": "bit_order",
    "spherical": "spherical",
    "metric": "metric",
    "normalize_residuals": "normalize_residuals",
    "decode": "decode_normalized",
}


def _levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(level) for level in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers such as 8,8,8,5,5,5") from None


def _version(text: str) -> str:
    if re.fullmatch(r"\d+(\.\d+){1,2}", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a version such as 1.17.8")
    return text


def _unknown_index(text: str) -> str | int:
    try:
        value = text if text in {"random", "extra"} else int(text)
        check_unknown_index(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither random, extra nor an integer in [0, 2^32)") from None
    return value


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of an import; the defaults mean that an option was not given.

    Attributes:
        keys: names of the codebook arrays; for a residual codebook in the order of its stages.
        prefix: prefix of the quantizer in the checkpoint.
        groups: whether several codebooks quantize groups of the channels, instead of the residual one after the other.
        transpose: whether the codes are the columns of the arrays in `keys`.
        accept_left: names, or prefixes that end in ".*", of arrays of the quantizer that may be left out.
        kind: kind of the quantizer.
        metric: metric of the search.
        decode: whether a cosine codebook decodes to rows of length one ("normalized") or to stored rows ("raw").
        normalize_residuals: whether every stage of a residual codebook searches its residual scaled to length one.
        levels: levels of finite scalar quantization.
        bound: bound of finite scalar quantization, or of its residual form.
        scales: scales of the stages of residual finite scalar quantization.
        stages: number of stages of residual finite scalar quantization, in each group.
        library_version: version of vector-quantize-pytorch that determines this bound and these scales.
        bits: number of bits of lookup-free quantization.
        bit_order: bit order of lookup-free quantization.
        spherical: whether lookup-free quantization decodes to codes of length one.
        layout: default layout of latents.
        unknown_index: index that is reported for an id outside the checkpoint's remap.
    """

    keys: tuple[str, ...] = option(
        (),
        "name of the array that is the codebook, (K, D); several in the order of a residual codebook's stages, or with "
        "--groups of the groups",
        flag="--key",
        group="place",
        action="append",
        metavar="KEY",
    )
    prefix: str = option("", "prefix of the quantizer in the checkpoint, for example first_stage_model.", group="place")
    groups: bool = option(
        False,
        "codebooks of several --key, or of an array (groups, K, D), quantize groups of the channels (product "
        "quantization), not the residual one after the other",
        action="store_true",
    )
    transpose: bool = option(False, "codes are the columns of the array named by --key", action="store_true")
    accept_left: tuple[str, ...] = option(
        (),
        "arrays of the quantizer that may be left out: names, or a prefix such as model.quantize.norm.*",
        action="extend",
        nargs="+",
        metavar="KEY",
    )
    kind: str | None = option(None, "kind of the quantizer, if the keys do not determine it", choices=tuple(KINDS))
    metric: Metric | None = option(
        None, "metric of the search, if the checkpoint does not determine it", choices=METRICS
    )
    decode: Decode | None = option(
        None, "whether a cosine codebook decodes to rows of length one or to stored rows", choices=DECODES
    )
    normalize_residuals: bool = option(
        False,
        "every stage of a residual codebook searches its residual scaled to length one (GRID)",
        action="store_true",
    )
    levels: tuple[int, ...] | None = option(
        None, "levels of --kind fsq, for example 8,8,8,5,5,5", type=_levels, metavar="L,L,..."
    )
    bound: Bound | ResidualBound | None = option(
        None,
        f"bound of --kind fsq: {', '.join(BOUNDS)} (default: atanh); of --kind residual_fsq: "
        f"{', '.join(RESIDUAL_BOUNDS)}",
        choices=tuple(dict.fromkeys((*BOUNDS, *RESIDUAL_BOUNDS))),
    )
    scales: Scales | None = option(None, "scales of the stages of --kind residual_fsq", choices=SCALES)
    stages: int | None = option(None, "number of stages of --kind residual_fsq", type=int, metavar="N")
    library_version: str | None = option(
        None,
        "version of vector-quantize-pytorch that the model was trained with: it gives --bound and --scales of --kind "
        "residual_fsq",
        type=_version,
        metavar="X.Y.Z",
    )
    bits: int | None = option(None, "number of bits of --kind lfq", type=int, metavar="N")
    bit_order: BitOrder | None = option(None, "bit order of --kind lfq (default: big)", choices=BIT_ORDERS)
    spherical: bool = option(False, "codes of --kind lfq have length one", action="store_true")
    layout: Layout | None = option(None, "default layout of latents", type=Layout, choices=tuple(Layout))
    unknown_index: str | int = option(
        "random",
        "index that is reported for a code outside the checkpoint's remap (default: random)",
        type=_unknown_index,
        metavar="random|extra|N",
    )

    def check_use(self, kind: str) -> None:
        """Check that all given options apply to the kind of the quantizer.

        Raises:
            ForeignCheckpointError: an option does not apply; the error names it.
        """
        if self.kind not in (None, kind):
            raise ForeignCheckpointError(f"the checkpoint is of kind {kind}, not --kind {self.kind}: leave out --kind")
        for field in fields(self):
            if getattr(self, field.name) != field.default and not _has_use(field.name, kind):
                flag = field.name.replace("_", "-")
                raise ForeignCheckpointError(f"--{flag} has no meaning for kind {kind}: leave out --{flag}")

    def check_place(self) -> None:
        """Check that options about arrays named by the user are not given for a quantizer that was found by its keys.

        Raises:
            ForeignCheckpointError: one was given; the error names it.
        """
        for flag, given in (("--groups", self.groups), ("--transpose", self.transpose)):
            if given:
                raise ForeignCheckpointError(
                    f"{flag} is for arrays named by --key: leave out {flag}, or name the array"
                )

    def metric_of(self, family: str, metric: Metric) -> Metric:
        """Return the only metric of a family.

        Raises:
            ForeignCheckpointError: the option asks for another metric.
        """
        if self.metric not in (None, metric):
            raise ForeignCheckpointError(
                f"{family} is searched by {metric}, not --metric {self.metric}: leave out --metric (arrays named by "
                "--key are searched by any metric)"
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
            raise checkpoint.error(
                f"{what} does not define the metric: {why}, and a wrong metric gives wrong tokens without an error; "
                f"look up the metric of the model, and pass {choice}"
            )
        if self.metric not in among:
            raise checkpoint.error(f"{what} is not searched by {self.metric}: pass {choice}")
        return self.metric

    def asked_decode(self, checkpoint: Checkpoint, what: str, metric: Metric) -> bool:
        """Return whether rows decode to length one; the option is required for a cosine codebook.

        Raises:
            ForeignCheckpointError: the option is missing for a cosine codebook.
        """
        if metric == "cosine" and self.decode is None:
            raise checkpoint.error(
                f"{what} does not define what it decodes to: pass --decode normalized for rows of length one "
                "(LlamaGen, TiTok), or --decode raw for stored rows (DAC, vector-quantize-pytorch)"
            )
        return self.decode_of(what, metric, self.decode or "raw")

    def decode_of(self, family: str, metric: Metric, decode: Decode) -> bool:
        """Return whether rows decode to length one, which the family defines.

        Raises:
            ForeignCheckpointError: the option contradicts the family, or is given for a metric other than cosine.
        """
        if self.decode is not None and metric != "cosine":
            raise ForeignCheckpointError(f"--decode is for --metric cosine, not {metric}: leave out --decode")
        if self.decode not in (None, decode):
            raise ForeignCheckpointError(
                f"{family} decodes to {decode} rows, not --decode {self.decode}: leave out --decode"
            )
        return metric == "cosine" and decode == "normalized"


def _has_use(option: str, kind: str) -> bool:
    argument = _ARGUMENTS.get(option)
    if argument is None or argument in KINDS[kind].arguments:
        return True
    return option == "metric" and KINDS[kind].metric is not None
