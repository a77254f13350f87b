"""Residual quantization: every stage quantizes what those before it left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, get_args

import torch
from torch import nn

from vqserve.layout import Layout
from vqserve.validation import LARGEST_VOCABULARY
from vqserve_server.quantizers.abstract import AbstractQuantizer
from vqserve_server.quantizers.arguments import (
    CODE_DIM,
    INPUT_DIM,
    MAYBE_CHANNELS,
    Argument,
    ArgumentError,
    check_layout,
    choice,
    flag,
    integer,
    served,
)
from vqserve_server.quantizers.declared import Metric
from vqserve_server.quantizers.inference.residual import (
    MAX_QUANTIZERS,
    FrozenPart,
    FrozenResidual,
    Part,
    ResidualStructure,
    check_sums,
    sizes_written,
    stage_sizes,
    sum_of_largest,
)
from vqserve_server.quantizers.lookup import CosineQuantizer, DotQuantizer
from vqserve_server.quantizers.projected import VectorQuantizerWithInputProjection
from vqserve_server.quantizers.projections import ProjectedModule, on_device, projection
from vqserve_server.quantizers.staged import StagedQuantizer
from vqserve_server.quantizers.vector import VectorQuantizer

_codes_of_a_stage = integer(1, LARGEST_VOCABULARY)


def _check_stage_codes(value: object) -> object:
    """Return K of every stage, or a list of K of each stage, if it can be one.

    Raises:
        ArgumentError: it cannot.
    """
    if type(value) is not list:
        return _codes_of_a_stage(value)
    if not 1 <= len(value) <= MAX_QUANTIZERS:
        raise ArgumentError(f"must have 1 to {MAX_QUANTIZERS} numbers, one for each stage")
    return [_codes_of_a_stage(codes) for codes in value]


class ResidualPart(ProjectedModule):
    """A chain of codebooks, behind a projection of its own or none.

    State: `stages.{i}.` with that of each stage's codebook, and the tensors of `ProjectedModule` for the projections
    that there are.
    """

    def __init__(self, part: Part, structure: ResidualStructure) -> None:
        super().__init__()
        self.part = part
        self.normalizes = structure.normalize_residuals
        self.stages = nn.ModuleList(_stage(structure, place) for place in part.places)
        self.proj_in = projection("input_dim", part.stop - part.start, structure.inner_dim)
        self.proj_out = projection("input_dim", structure.inner_dim, part.stop - part.start)

    def codebooks(self) -> list[AbstractQuantizer]:
        """Return the codebooks of the stages, in order."""
        # nn.ModuleList does not know the type of its modules.
        return [stage for stage in self.stages if isinstance(stage, AbstractQuantizer)]

    def frozen(self, device: torch.device, search: str) -> FrozenPart:
        """Return the form that serves."""
        stages = tuple(stage.frozen(device, search) for stage in self.codebooks())
        return FrozenPart(
            part=self.part,
            stages=stages,
            projection=on_device(self.input_projection(), device),
            output_projection=on_device(self.output_projection(), device),
            largest=float(sum_of_largest(stages).max()),
            normalizes=self.normalizes,
        )


class ResidualQuantizer(StagedQuantizer):
    """n_q indices for a token, from coarse to fine. Inference only: there is no `forward`.

    A stage encodes the residual r, and the next one gets r - q with q what the stage decodes to; decode adds the q in
    the order of the stages (Zeghidour et al. 2021, arXiv:2107.03312). Differences and sums are float32's (float64 where
    latents or codes are). The stages may be one chain (EnCodec); one chain for each group of channels (Yang et al.
    2023, arXiv:2305.02765); or two chains that both see the latents and are added, each behind projections of its own
    (Mimi: Defossez et al. 2024, arXiv:2410.00037). With `stage_projections` every stage projects the residual to its
    codes' width and its codes back (DAC: Kumar et al. 2023, arXiv:2306.06546). With `normalize_residuals` a stage
    encodes r / |r|, each element rounded once to float32, and the next one gets r / |r| - q.

    State: `parts.{p}.` with that of each `ResidualPart`.

    Attributes:
        structure: the arrangement.
        layout: channels first, unless changed: (b, C, s) has indices (b, n_q, s).
    """

    kind: ClassVar[str] = "rvq"
    arguments: ClassVar[Mapping[str, Argument]] = {
        "num_quantizers": served(integer(1, MAX_QUANTIZERS)),
        "n_e": served(_check_stage_codes),
        "e_dim": CODE_DIM,
        "input_dim": INPUT_DIM,
        "metric": served(choice(*get_args(Metric)), "structure.metric"),
        "decode_normalized": served(flag, "structure.decode_normalized"),
        "stage_projections": served(flag, "structure.stage_projections"),
        "inner_dim": replace(MAYBE_CHANNELS, attribute="structure.inner_dim"),
        "groups": served(integer(1, MAX_QUANTIZERS), "structure.groups"),
        "first_quantizers": served(integer(0, MAX_QUANTIZERS), "structure.first_quantizers"),
        # A reader of the file should not have to know the usual layout of residual codebooks.
        "layout": served(check_layout),
        "normalize_residuals": Argument(flag, served=True, default=False, attribute="structure.normalize_residuals"),
    }

    def __init__(
        self,
        num_quantizers: int,
        n_e: int | Sequence[int],
        e_dim: int,
        input_dim: int | None = None,
        metric: Metric = "l2",
        *,
        decode_normalized: bool = False,
        stage_projections: bool = False,
        inner_dim: int | None = None,
        groups: int = 1,
        first_quantizers: int = 0,
        normalize_residuals: bool = False,
    ) -> None:
        """Draw the codebooks and projections as their classes do; a state dict is to follow.

        Args:
            num_quantizers: n_q, stages in all, at most 256.
            n_e: K, codes of every stage; or a list with K of each stage, in the order of a token's indices.
            e_dim: D, the width of the codes.
            input_dim: C, channels of the latents; None: D of each group.
            metric: "l2", "cosine" or "dot", for all stages.
            decode_normalized: see `CosineQuantizer`.
            stage_projections: every stage has `proj_in` and `proj_out`, from and to the residual's width.
            inner_dim: the residual's width where each part has projections from and to its channels; None: none has.
            groups: number of parts that the channels are cut into, each with the same number of stages. The indices of
                a token are those of the first stages of all groups, then of the second stages, and so on.
            first_quantizers: number of stages of the first of two parts; the second has the rest. 0: one part.
            normalize_residuals: every stage divides the residual by its length before it searches, and its code is
                subtracted from that (GRID's semantic ids: `torch.nn.functional.normalize`). Decoded sums then do not
                approximate the latents.

        Raises:
            InvalidOption: the arguments do not fit together.
        """
        super().__init__()
        self.structure = ResidualStructure(
            num_quantizers=num_quantizers,
            stage_codes=stage_sizes(n_e, num_quantizers),
            code_dim=e_dim,
            input_dim=e_dim * groups if input_dim is None else input_dim,
            metric=metric,
            decode_normalized=decode_normalized,
            stage_projections=stage_projections,
            inner_dim=inner_dim,
            groups=groups,
            first_quantizers=first_quantizers,
            normalize_residuals=bool(normalize_residuals),
        )
        self.is_approximate = not self.structure.normalize_residuals
        self.num_codes, self.code_dim, self.num_quantizers = max(self.structure.stage_codes), e_dim, num_quantizers
        self.input_dim = self.output_dim = self.structure.input_dim
        self.layout = Layout.CHANNELS_FIRST
        self.parts = nn.ModuleList(ResidualPart(part, self.structure) for part in self.structure.parts)

    @property
    def n_e(self) -> int | list[int]:
        """K of every stage; a list with K of each stage where they differ."""
        return sizes_written(self.structure.stage_codes)

    @property
    def stage_vocab_sizes(self) -> tuple[int, ...]:
        """The exclusive bound of each stage's indices where these differ; empty: `vocab_size` bounds all indices."""
        sizes = self.structure.stage_codes
        return sizes if len(set(sizes)) > 1 else ()

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type that decode returns."""
        return next(self.parameters()).dtype

    @classmethod
    def canonical_arguments(cls, arguments: Mapping[str, object]) -> dict[str, object]:
        """Return checked arguments, K of each stage in the one form that files and digests have."""
        n_e = arguments["n_e"]
        # A list of another length stays one: the constructor refuses it.
        if isinstance(n_e, list) and len(n_e) == arguments["num_quantizers"]:
            return {**arguments, "n_e": sizes_written(n_e)}
        return dict(arguments)

    def codebooks(self) -> list[AbstractQuantizer]:
        """Return the codebooks of the stages, in the order of a token's indices."""
        placed: dict[int, AbstractQuantizer] = {}
        for chain in self.chains():
            placed |= zip(chain.part.places, chain.codebooks(), strict=True)
        return [placed[place] for place in range(self.num_quantizers)]

    def chains(self) -> list[ResidualPart]:
        """Return the parts."""
        return [part for part in self.parts if isinstance(part, ResidualPart)]

    def frozen(self, device: torch.device, search: str = "auto") -> FrozenResidual:
        """Return the form that serves; see `Quantizer.frozen`."""
        are_added = self.structure.first_quantizers > 0
        parts = tuple(part.frozen(device, search) for part in self.chains())
        check_sums(parts, are_added=are_added, dtype=self.weight_dtype)
        return FrozenResidual(
            **self.sizes(device),
            _parts=parts,
            _are_added=are_added,
        )


def _stage(structure: ResidualStructure, place: int) -> AbstractQuantizer:
    codes, width = structure.stage_codes[place], structure.code_dim
    outer = structure.width if structure.stage_projections else None
    match structure.metric:
        case "cosine":
            return CosineQuantizer(codes, width, structure.decode_normalized, input_dim=outer, output_dim=outer)
        case "dot":
            return DotQuantizer(codes, width, input_dim=outer, output_dim=outer)
        case "l2" if outer is None:
            return VectorQuantizer(codes, width)
        case _:
            return VectorQuantizerWithInputProjection(structure.width, codes, width, output_dim=outer)
