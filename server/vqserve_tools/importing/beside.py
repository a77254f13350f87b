"""The arrays beside what was taken: if they belong to the same quantizer, it gives other tokens without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vqserve_tools.importing.families.checkpoint import Checkpoint, described
from vqserve_tools.importing.families.family import Family
from vqserve_tools.importing.families.name_lists import accept_text, accepts, keys_text, prefix_text
from vqserve_tools.importing.families.names import (
    Modules,
    is_part,
    is_projection,
    is_running,
    numbered_siblings,
    owner_of,
)
from vqserve_tools.importing.families.options import Options


def check_left(checkpoint: Checkpoint, options: Options, family: Family | None) -> None:
    """Check that nothing of the quantizer was left out.

    Running averages, and arrays that the family knows to leave, are no part of it here.

    Args:
        checkpoint: view of the place where the quantizer was read.
        options: keys, and arrays that the user accepts to leave.
        family: family of the quantizer; None: its arrays were named. Of a family without codes any quantizer in the
            file counts, because options describe it.

    Raises:
        ForeignCheckpointError: arrays of the quantizer were left out, or `accept_left` names an array that was not.
    """
    ledger = checkpoint.ledger
    left = [name for name in checkpoint.arrays if name not in ledger.taken]
    for pattern in options.accept_left:
        if not any(accepts(pattern, name) for name in left):
            raise checkpoint.error(f"no array of the name {pattern!r} was left: leave out --accept-left for it")
    left = [name for name in left if not (is_running(name) or name in ledger.known or ledger.accepts(name))]
    if options.keys:
        _check_stages(checkpoint, options, left)
    modules = Modules(checkpoint.arrays)
    belongs = _membership(checkpoint, family, modules)
    names = [name for name in left if belongs(name)]
    if family is not None and family.kind is not None:
        names = names or _projections(checkpoint, options, left)
    if names:
        raise checkpoint.error(
            f"the quantizer has more than was taken: {described(checkpoint, names)}; without it the tokens may be "
            f"wrong; if the model encodes without it, pass {accept_text(names)}"
        )
    if not options.keys:
        _check_second(checkpoint, [name for name in left if name.startswith(options.prefix)], modules)


def _projections(checkpoint: Checkpoint, options: Options, left: Iterable[str]) -> list[str]:
    """Return the projections to or from the levels or bits of the options, wherever they are, if none was taken."""
    width = len(options.levels or ()) or options.bits
    if any(map(is_projection, checkpoint.ledger.taken)):
        return []
    return [
        name
        for name in left
        if name.startswith(checkpoint.prefix)
        and is_projection(name)
        and (".project_" in f".{name}" or width in checkpoint.arrays[name].shape)
    ]


def _check_second(checkpoint: Checkpoint, left: Iterable[str], modules: Modules) -> None:
    """Check that no array outside the quantizer is the codebook of a second one, by its name.

    Families find only the quantizers whose keys they know.
    """
    place = checkpoint.prefix
    others = [
        name
        for name in left
        if not name.startswith(place) and len(checkpoint.arrays[name].shape) in (2, 3) and modules.may_be_codes(name)
    ]
    if others:
        raise checkpoint.error(
            f"it has a quantizer under {place!r}, and what may be codes of another one: "
            f"{described(checkpoint, others)}; pass {prefix_text(place)} for the first, or {keys_text(others[:1])} for "
            "codes of the other"
        )


def _check_stages(checkpoint: Checkpoint, options: Options, left: Iterable[str]) -> None:
    """Check that no array of the same name with another number was left: it may be another stage."""
    shapes = {name: array.shape for name, array in checkpoint.arrays.items()}
    siblings_of = numbered_siblings(shapes, width_axis=0 if options.transpose else -1)
    among = set(left)
    for key in options.keys:
        siblings = [name for name in siblings_of[key] if name in among or name in options.keys]
        others = [name for name in siblings if name in among]
        if others:
            keys = keys_text(siblings)
            raise checkpoint.error(
                f"{described(checkpoint, others)} may be further stages, or groups, of {key}: pass {keys} for stages, "
                f"{keys} --groups for groups of the channels, or {accept_text(others)} for the named arrays alone"
            )


def _membership(checkpoint: Checkpoint, family: Family | None, modules: Modules) -> Callable[[str], bool]:
    """Return the function that says whether an array belongs to the quantizer that was read."""
    # All arrays below these prefixes belong to it; of those directly below `parents`, only parts by their names.
    whole, parents = set[str](), set[str]()
    for name in checkpoint.ledger.taken:
        module = modules.quantizer_of(name)
        if module is not None:
            whole.add(module)
        parents.add(owner_of(name))
    place = checkpoint.prefix
    module = modules.quantizer_of(place)
    if module is not None:
        whole.add(module)
    elif family is None or family.kind is not None or family.in_model or modules.is_model(place):
        parents.add(place)
    else:
        whole.add(place)
    # Around a quantizer that is saved alone may be a module with its projections; `quant_proj` is the encoder's.
    outside = {"".join(module[:-1].rpartition(".")[:2]) for module in whole if module}
    around = [module for module in outside if not modules.is_model(module)]
    if family is not None and family.kind is not None:
        inside = (name for name in checkpoint.arrays if name.startswith(place))
        whole.update(filter(None, map(modules.quantizer_of, inside)))
    return lambda name: (
        name.startswith(tuple(whole))
        or any(name.startswith(parent) and is_part(name.removeprefix(parent)) for parent in parents)
        or any(
            name.startswith(module) and is_part(name.removeprefix(module)) for module in around if "quant_" not in name
        )
    )
