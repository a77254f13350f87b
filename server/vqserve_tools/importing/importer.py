"""Import of foreign checkpoints as quantizers, without guesses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vqserve import __version__
from vqserve.errors import ForeignCheckpointError
from vqserve_server.codebooks.kinds import KINDS
from vqserve_server.codebooks.state import CodebookState, StateError
from vqserve_server.quantizers import Quantizer
from vqserve_server.search.searcher import first_of_equals
from vqserve_tools.importing.config import config_of
from vqserve_tools.importing.families import FAMILIES, Family, bare, fsq, lfq, taming
from vqserve_tools.importing.families.checkpoint import Checkpoint, listed, places_of, shape_text
from vqserve_tools.importing.families.family import Reading
from vqserve_tools.importing.families.options import Options
from vqserve_tools.importing.families.taming import CODES, WRAPPERS
from vqserve_tools.importing.files import UNNAMED, ForeignArray, check_whole, open_foreign, weights_of

# Readers of the kinds that need no checkpoint; a checkpoint may have projections of them.
_WITHOUT_CODES = {"fsq": fsq.read, "lfq": lfq.read}
# The convolution between the encoder and the quantizer of an autoencoder; it lies beside the quantizer.
_BEFORE = "quant_conv"
# Endings of names that indicate a codebook in the state dict of a model.
_ENDINGS = (*CODES, "embed.weight")


@dataclass(frozen=True)
class Import:
    """Result of an import: the quantizer, and the arrays that were taken and left.

    Attributes:
        state: for `save_state`: kind, constructor arguments and tensors, checked.
        quantizer: made from the state, on the CPU, in eval mode.
        family: name of the checkpoint's family, for messages.
        taken: names in the checkpoint, with shape and element type.
        left: the other names in the checkpoint.
        place: prefix of the quantizer in the checkpoint.
        notes: further information for the user.
        provenance: for `save_state`.
    """

    state: CodebookState
    quantizer: Quantizer
    family: str
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
        left = tuple(name for name in checkpoint.arrays if (name or "array") not in ledger.taken)
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
    return Import(
        state=state,
        quantizer=quantizer,
        family=reading.family,
        taken=ledger.taken,
        left=left,
        place=place,
        notes=tuple(ledger.notes),
        provenance=provenance,
    )


@contextmanager
def _opened(path: Path | None, options: Options) -> Iterator[Checkpoint]:
    if path is not None:
        if len(options.keys) != 1:
            check_whole(path)
        with open_foreign(path) as arrays:
            yield Checkpoint(weights_of(path).name, arrays)
        return
    if options.kind not in _WITHOUT_CODES:
        raise ForeignCheckpointError("name a file to import: only --kind fsq and --kind lfq need none")
    yield Checkpoint(f"--kind {options.kind}", {})


def _read(checkpoint: Checkpoint, options: Options) -> tuple[str, Reading]:
    """Return the prefix of the quantizer and its reading by the family."""
    unnamed = UNNAMED in checkpoint.arrays
    if unnamed and (options.keys or options.prefix):
        raise checkpoint.error("it has one array without a name: leave out --key and --prefix")
    reader = _WITHOUT_CODES.get(options.kind or "")
    if options.keys or (unnamed and reader is None):
        for number, key in enumerate(options.keys):
            if key not in checkpoint.arrays:
                raise checkpoint.error(f"there is no array {key!r}; {_candidates(checkpoint.arrays)}")
            if key in options.keys[:number]:
                raise checkpoint.error(
                    f"--key {key} is given twice: if stages share a codebook, the file has the array twice"
                )
        return "", bare.read(checkpoint, options)
    prefix = options.prefix if not options.prefix or options.prefix.endswith(".") else f"{options.prefix}."
    within = checkpoint.at(prefix or _wrapper(checkpoint.arrays))
    if reader is not None:
        return within.prefix, reader(within, options)
    family, place = _found(within)
    found = within.at(place)
    return found.prefix, family.read(found, options)


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
    if len(found) > 1:
        choices = [f"--prefix {checkpoint.prefix}{place} ({family.name})" for place, family in found.items()]
        raise checkpoint.error(f"it has several quantizers: choose one with {listed(choices)}")
    if not found:
        where = f"under {checkpoint.prefix!r}" if checkpoint.prefix else "at its root"
        raise checkpoint.error(f"there is no quantizer {where}; {_candidates(checkpoint.arrays)}")
    [(place, family)] = found.items()
    return family, place


def _candidates(arrays: Mapping[str, ForeignArray]) -> str:
    """Return suggestions for --prefix or --key, in one line."""
    prefixes = {place for ending in _ENDINGS for place in places_of(arrays, ending)} - {""}
    if prefixes:
        return f"try --prefix {listed(sorted(prefixes))}, or --key with the name of the codebook's array"
    matrices = sorted(f"{name} {shape_text(array.shape)}" for name, array in arrays.items() if len(array.shape) == 2)
    if matrices:
        return f"name the codebook's array with --key: {listed(matrices)}"
    stacks = sorted(f"{name} {shape_text(array.shape)}" for name, array in arrays.items() if len(array.shape) == 3)
    if stacks:
        return f"name a residual codebook's array with --key, and pass --kind rvq: {listed(stacks)}"
    return (
        "it has no array of two axes: for finite scalar or lookup-free quantization, which have no codebook, pass "
        "--kind fsq --levels or --kind lfq --bits"
    )


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
        firsts = first_of_equals(problem.codes, problem.bias)
        count += 0 if firsts is None else len(problem.codes) - len(firsts)
    if count:
        what = "code is a duplicate" if count == 1 else "codes are duplicates"
        checkpoint.note(f"{count} {what}: the lowest index of equal codes is used")
