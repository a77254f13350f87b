"""A codebook that only its name tells: `codebook.weight`, `vq_layer.embeddings`, `dictionary` and the like.

Tried only where no other family has its keys. Whether codes are rows or columns is seen from arrays beside the codes
that have a number for each code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set

from vqserve_tools.importing.families.checkpoint import Checkpoint, Floats, shape_text
from vqserve_tools.importing.families.family import Family, Reading
from vqserve_tools.importing.families.name_lists import keys_text
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.tables import Stage, single
from vqserve_tools.importing.files import ForeignArray

_QUANTIZER = r"(?:vq|vq_layers?|vector_quanti\w+|quanti[sz]\w+|codebooks?)"
_TABLE = r"(?:codebook|codes|dictionary|embed|embeddings?)"
_MODULE = re.compile(rf"(?:.*\.)?{_QUANTIZER}\.")
# A table in a quantizer's module, or a table that is named codebook, dictionary or _embedding.
_CODES = re.compile(rf"(?:.*\.)?(?:{_QUANTIZER}\.{_TABLE}|codebook|dictionary|_embedding)(?:\.weight)?")
# What training counts for each code.
_COUNTS = re.compile(r"_?(?:ema_)?(?:cluster_size|cluster_usage|counts?|usage|N)")
# What training keeps for each number of a code.
_AVERAGES = re.compile(r"_?(?:ema_\w+|embed(?:ding)?_avg|embed(?:ding)?_sum)")
_NAME = "an array of codes"
_WHY = "some models search by distance, some by cosine, some by dot product"


def last_resort(families: Sequence[Family]) -> Family:
    """Return the family, which takes a checkpoint only if it has the keys of none of the other families."""

    def places(arrays: Mapping[str, ForeignArray]) -> Set[str]:
        found = arrays_of_codes(arrays)
        # Two such arrays may be two quantizers or two stages: the user must say.
        if len(found) != 1 or any(family.places(arrays) for family in families):
            return set()
        return {_module_of(found[0])}

    return Family("a codebook by its name", places, _read, in_model=True)


def arrays_of_codes(arrays: Mapping[str, ForeignArray], prefix: str = "") -> list[str]:
    """Return the names of arrays that only their names tell to be codebooks."""
    return [name for name, array in arrays.items() if len(array.shape) == 2 and _CODES.fullmatch(f"{prefix}{name}")]


def _module_of(name: str) -> str:
    return "".join(name.removesuffix(".weight").rpartition(".")[:2])


def _read(checkpoint: Checkpoint, options: Options) -> Reading:
    [name] = arrays_of_codes(checkpoint.names(), checkpoint.prefix)
    training = {n for n in checkpoint.names() if _COUNTS.fullmatch(n) or _AVERAGES.fullmatch(n)}
    # A module with a quantizer's name has nothing else in it; other modules may be the whole model.
    within = None if _MODULE.fullmatch(checkpoint.prefix) else [name.partition(".")[0]]
    checkpoint.check_known([name, *training], modules=within)
    metric = options.asked_metric(checkpoint, f"{checkpoint.prefix}{name}", _WHY)
    decode_normalized = options.asked_decode(checkpoint, f"{checkpoint.prefix}{name}", metric)
    return single(_NAME, Stage(_rows(checkpoint, name)), metric, decode_normalized=decode_normalized)


def _rows(checkpoint: Checkpoint, name: str) -> Floats:
    """Take the codes, as rows.

    Raises:
        ForeignCheckpointError: nothing beside a wide array tells whether its codes are rows or columns.
    """
    rows, columns = checkpoint.shape(name)
    counted = {array.shape for other, array in checkpoint.names().items() if _COUNTS.fullmatch(other)}
    where = f"{checkpoint.prefix}{name} is {shape_text((rows, columns))}"
    # Layers of torch have outputs, which are the codes, as rows; a square array of another name may have either.
    is_open = rows < columns or (rows == columns and not name.endswith(".weight"))
    if is_open and (rows == columns or not counted & {(rows,), (columns,)}):
        raise checkpoint.error(
            f"{where}, and nothing beside it tells whether its codes are rows or columns: pass "
            f"{keys_text([checkpoint.prefix + name])} if they are rows, or "
            f"{keys_text([checkpoint.prefix + name])} --transpose if they are columns"
        )
    if rows != columns and (columns,) in counted and (rows,) not in counted:
        checkpoint.note(f"{where}, and there is a number for each column: its codes are the columns")
        return checkpoint.columns(name)
    return checkpoint.floats(name)
