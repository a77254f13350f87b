"""JSON from strangers: of bounded size and depth, with unique names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vqserve.errors import ForeignCheckpointError
from vqserve.safetensors_file import unique_names


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ForeignCheckpointError: it is larger than `max_bytes`, or is no JSON object.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ForeignCheckpointError(f"{path.name}: it has more than {max_bytes} bytes, too many for such a file")
    try:
        # Python's parser bounds the depth by the recursion limit, and the digits of an integer.
        content = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ForeignCheckpointError(f"{path.name}: it is not JSON ({reason}): download it again") from None
    if not isinstance(content, dict):
        raise ForeignCheckpointError(f"{path.name}: it is no JSON object")
    return content
