"""Import of foreign checkpoints as quantizers, without guesses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vqserve import __version__
from vqserve.errors import ForeignCheckpointError
from vqserve_server.codebooks.kinds import KINDS
from vqserve_server.codebooks.state import CodebookState, StateError
from vqserve_server.quantizers import Quantizer
from vqserve_server.search.equals import first_of_equal_tensors
from vqserve_tools.importing.beside import check_left
from vqserve_tools.importing.candidates import candidates_text
from vqserve_tools.importing.config import config_of
from vqserve_tools.importing.families import FAMILIES, Family, bare, taming
from vqserve_tools.importing.families.checkpoint import Checkpoint, Ledger, listed, shape_text
from vqserve_tools.importing.families.family import Reading
from vqserve_tools.importing.families.name_lists import prefix_text
from vqserve_tools.importing.families.names import is_part, is_running, missing_before
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.orientation import check_counts
from vqserve_tools.importing.families.taming import WRAPPERS
from vqserve_tools.importing.files import UNNAMED, ForeignArray, check_whole, open_foreign, weights_of

# Families without codes; a checkpoint may have projections of them.
_WITHOUT_CODES = {family.kind: family for family in FAMILIES if family.kind is not None}
# The convolution between the encoder and the quantizer of an autoencoder; it lies beside the quantizer.
_BEFORE = "quant_conv"
# Stages are numbered modules of a quantizer.
_STAGE = re.compile(r"\w+\.\d+\.")


@dataclass(frozen=True)
class Import:
    """Result of an import: the quantizer, and the arrays that were taken and left.

    Attributes:
        state: for `save_state`: kind, constructor arguments and tensors, checked.
        quantizer: made from the state, on the CPU, in eval mode.
        family: name of the checkpoint's family, for messages.
        arrays: shape and element type of every array in the checkpoint, by name.
        taken: those that were taken.
        left: names of the others.
        place: prefix of the quantizer in the checkpoint.
        notes: further information for the user.
        provenance: for `save_state`.
    """

    state: CodebookState
    quantizer: Quantizer
    family: str
    arrays: Mapping[str, str]
    taken: Mapping[str, str]
    left: tuple[str, ...]
    place: str
    notes: tuple[str, ...]
    provenance: Mapping[str, object]


def import_checkpoint(source: str | Path | None, options: Options | None = None) -> Import:
    """Make a quantizer from a foreign checkpoint.

    Args:
        source: .npy, .npz, .safetensors, or a torch file (.pt, .pth, .ckpt, .bin, .th); an index of several files
            (model.safetensors.index.json); a folder with the weights of one model. None: `options` describe the whole
            quantizer.
        options: facts that the checkpoint does not contain; None: none.

    Raises:
        ForeignCheckpointError: the import fails; one line with the reason and a remedy.
    """
    options = options or Options()
    path = None if source is None else Path(source)
    with _opened(path, options) as checkpoint:
        config = None if path is None or options.keys or UNNAMED in checkpoint.arrays else config_of(path)
        if config is not None:
            options = config.completed(options, checkpoint.arrays, checkpoint.note)
        place, reading = _read(checkpoint, options)
        if config is not None:
            config.check(place, reading.kind, reading.arguments, checkpoint.note)
        ledger = checkpoint.ledger
        arrays = _described(checkpoint.arrays)
        left = tuple(name for name in arrays if name not in ledger.taken)
    options.check_use(reading.kind)
    state = _state(checkpoint, reading, options)
    quantizer = state.build()
    _note_encoder_layer(checkpoint, place, left)
    _note_duplicates(checkpoint, quantizer)
    provenance: dict[str, object] = {
        "importer": f"vqserve {__version__}",
        "family": reading.family,
        "tensors": list(ledger.taken),
        "notes": ledger.notes,
    }
    if path is not None:
        provenance |= weights_of(path).provenance()
    if options.metric is not None:
        provenance["metric"] = options.metric
    if options.transpose:
        provenance["transposed"] = True
    if options.accept_left:
        provenance["accepted_left"] = list(options.accept_left)
    return Import(
        state=state,
        quantizer=quantizer,
        family=reading.family,
        arrays=arrays,
        taken=ledger.taken,
        left=left,
        place=place,
        notes=tuple(ledger.notes),
        provenance=provenance,
    )


def arrays_of(source: str | Path) -> Mapping[str, str]:
    """Return shape and element type of every array of a foreign file, by name.

    Raises:
        ForeignCheckpointError: the file cannot be read.
    """
    with open_foreign(Path(source)) as arrays:
        return _described(arrays)


def _described(arrays: Mapping[str, ForeignArray]) -> dict[str, str]:
    return {name or "array": f"{shape_text(array.shape)} {array.dtype}" for name, array in arrays.items()}


@contextmanager
def _opened(path: Path | None, options: Options) -> Iterator[Checkpoint]:
    ledger = Ledger(accepted=options.accept_left)
    if path is not None:
        if len(options.keys) != 1:
            check_whole(path)
        with open_foreign(path) as arrays:
            yield Checkpoint(weights_of(path).name, arrays, ledger=ledger)
        return
    if options.kind not in _WITHOUT_CODES:
        kinds = " or ".join(f"--kind {kind}" for kind in _WITHOUT_CODES)
        raise ForeignCheckpointError(f"name a file to import: it may be omitted only with {kinds}")
    yield Checkpoint(f"--kind {options.kind}", {}, ledger=ledger)


def _read(checkpoint: Checkpoint, options: Options) -> tuple[str, Reading]:
    """Return the prefix of the quantizer and its reading by the family.

    Raises:
        ForeignCheckpointError: there is no quantizer, it cannot be read, or parts of it were left out.
    """
    unnamed = UNNAMED in checkpoint.arrays
    if unnamed and (options.keys or options.prefix):
        raise checkpoint.error("it has one array without a name: leave out --key and --prefix")
    without_codes = _WITHOUT_CODES.get(options.kind or "")
    family: Family | None = None
    if options.keys or unnamed:
        if without_codes is not None:
            raise checkpoint.error(
                f"--kind {options.kind} has no codes, and an array of codes is given: leave out --kind"
            )
        for key in options.keys:
            if key not in checkpoint.arrays:
                raise checkpoint.error(f"there is no array {key!r}; {candidates_text(checkpoint.arrays)}")
        found, reading = checkpoint, bare.read(checkpoint, options)
    else:
        options.check_place()
        prefix = options.prefix if not options.prefix or options.prefix.endswith(".") else f"{options.prefix}."
        found = checkpoint.at(prefix or _wrapper(checkpoint.arrays))
        if without_codes is not None:
            family = without_codes
        else:
            family, place = _found(found)
            found = found.at(place)
        reading = family.read(found, options)
        _check_counts(found)
        if not prefix:
            _check_first_stage(checkpoint)
    if not unnamed:
        check_left(found, options, family)
    return found.prefix, reading


def _check_first_stage(checkpoint: Checkpoint) -> None:
    """Check that what a family took is not a later stage of a quantizer whose first stages are in another file.

    Raises:
        ForeignCheckpointError: it is; the error names the stages that are missing.
    """
    for name in checkpoint.ledger.taken:
        module = missing_before(name, checkpoint.arrays)
        if module:
            raise checkpoint.error(
                f"it has {module}, but no module of this quantizer with a smaller number: the other stages are "
                f"missing; to import this one alone, pass {prefix_text(f'{module}.')}"
            )


def _check_counts(checkpoint: Checkpoint) -> None:
    """Check that the codebooks that a family took have the shapes that counts of their codes say.

    Raises:
        ForeignCheckpointError: counts contradict.
    """
    names = checkpoint.names()
    wide = []
    for name in names:
        if f"{checkpoint.prefix}{name}" in checkpoint.ledger.taken and len(names[name].shape) in (2, 3):
            layer = name.removesuffix(".weight").rpartition(".")[2]
            if not (is_part(layer) or is_running(name)):
                is_known = check_counts(checkpoint, name)
                rows, columns = names[name].shape[-2:]
                if rows < columns and not is_known and f"{checkpoint.prefix}{name}" not in checkpoint.ledger.columns:
                    wide.append(f"{checkpoint.prefix}{name} was read as {rows} codes of width {columns}")
    if wide:
        checkpoint.note(f"{wide[0]}, fewer than its width: check that its codes are rows, as this family stores them")


def _wrapper(names: Mapping[str, ForeignArray]) -> str:
    """Return the prefix that wrappers of a model added to all names."""
    prefix = ""
    while inner := next((name for name in WRAPPERS if names and all(n.startswith(prefix + name) for n in names)), ""):
        prefix += inner
    return prefix


def _found(checkpoint: Checkpoint) -> tuple[Family, str]:
    """Return the family of the quantizer, and its place below the prefix.

    Raises:
        ForeignCheckpointError: the checkpoint has no quantizer, or several.
    """
    names = checkpoint.names()
    found: dict[str, Family] = {}
    for family in FAMILIES:
        for place in sorted(family.places(names)):
            found.setdefault(place, family)
    if len(found) > 1 and found.get("") is taming.FAMILY:
        # Beside other quantizers, these names at the root are the embedding of a language model, not a codebook.
        del found[""]
    # A stage may look like a quantizer of its own.
    found = {place: family for place, family in found.items() if not _is_stage(place, found)}
    if len(found) > 1:
        choices = [f"{prefix_text(checkpoint.prefix + place)} ({family.name})" for place, family in found.items()]
        raise checkpoint.error(f"it has several quantizers: choose one with {listed(choices)}")
    if not found:
        where = f"under {checkpoint.prefix!r}" if checkpoint.prefix else "at its root"
        raise checkpoint.error(f"there is no quantizer {where}; {candidates_text(checkpoint.arrays)}")
    [(place, family)] = found.items()
    return family, place


def _is_stage(place: str, found: Mapping[str, Family]) -> bool:
    """Return whether a place is in a numbered module of another one."""
    starts = (0, *(position + 1 for position, character in enumerate(place) if character == "."))
    return any(place[:start] in found and _STAGE.match(place, start) for start in starts)


def _state(checkpoint: Checkpoint, reading: Reading, options: Options) -> CodebookState:
    given = dict(reading.arguments)
    if "unknown_index" in KINDS[reading.kind].arguments:
        given["unknown_index"] = options.unknown_index
    if options.layout is not None:
        given["layout"] = str(options.layout)
    try:
        return CodebookState.of_arrays(reading.kind, given, reading.tensors)
    except StateError as error:
        raise checkpoint.error(str(error)) from None


def _note_encoder_layer(checkpoint: Checkpoint, place: str, left: Sequence[str]) -> None:
    outside = "".join(place.removesuffix(".").rpartition(".")[:2])
    for name in left:
        before, found, _ = f".{name}".partition(f".{_BEFORE}.")
        if found and name.startswith(outside):
            layer = f"{before}.{_BEFORE}".removeprefix(".")
            checkpoint.note(f"{layer} was left: the latents to encode are its output")
            return


def _note_duplicates(checkpoint: Checkpoint, quantizer: Quantizer) -> None:
    count = 0
    for codebook in quantizer.codebooks():
        # Compare the searched codes, not the stored ones: for cosine the length of a code does not matter.
        problem = codebook.search_problem()
        firsts = first_of_equal_tensors(problem.codes, problem.bias)
        count += 0 if firsts is None else len(problem.codes) - len(firsts)
    if count:
        what = "code is a duplicate" if count == 1 else "codes are duplicates"
        checkpoint.note(f"{count} {what}: the lowest index of equal codes is used")
