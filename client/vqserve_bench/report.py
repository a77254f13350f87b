"""A run as JSON, with all of its results."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import grpc
import numpy as np

from vqserve import __version__
from vqserve.codebook_info import CodebookInfo
from vqserve_bench.measurement import Measurement

# Increased when a field changes its meaning or is removed; fields may be added without it.
FORMAT = 1


def report(
    measurements: Sequence[Measurement], *, target: str, codebook: CodebookInfo, settings: Mapping[str, Any], began: str
) -> dict[str, Any]:
    """Return a run as a JSON object; unknown values are null.

    Args:
        measurements: one per load; the fields are those of Measurement.
        target: HOST:PORT.
        codebook: the codebook.
        settings: the options of the command.
        began: start of the run, as ISO 8601.
    """
    return {
        "format": FORMAT,
        "began": began,
        "versions": {
            "vqserve": __version__,
            "python": platform.python_version(),
            "grpcio": grpc.__version__,
            "numpy": np.__version__,
        },
        "client": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "target": target,
        "codebook": asdict(codebook),
        "settings": dict(settings),
        "loads": [_plain(asdict(measured)) for measured in measurements],
    }


def to_json(run: Mapping[str, Any]) -> str:
    """Return the text of a report."""
    return json.dumps(run, indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Return a value with null for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
