"""The arrays beside what was taken: if they belong to the same quantizer, it gives other tokens without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vqserve_tools.importing.families.checkpoint import Checkpoint, described
from vqserve_tools.importing.families.family import Family
from vqserve_tools.importing.families.name_lists import accept_text, accepts, keys_text
from vqserve_tools.importing.families.names import Modules, is_part, is_running, numbered_siblings, owner_of
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
    belongs = _membership(checkpoint, family)
    names = [name for name in left if belongs(name)]
    if names:
        raise checkpoint.error(
            f"the quantizer has more than was taken: {described(checkpoint, names)}; without it the tokens may be "
            f"wrong; if the model encodes without it, pass {accept_text(names)}"
        )


def _check_stages(checkpoint: Checkpoint, options: Options, left: Iterable[str]) -> None:
    """Check that no array of the same name with another number was left: it may be another stage."""
    siblings_of = numbered_siblings({name: array.shape for name, array in checkpoint.arrays.items()})
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


def _membership(checkpoint: Checkpoint, family: Family | None) -> Callable[[str], bool]:
    """Return the function that says whether an array belongs to the quantizer that was read."""
    modules = Modules(checkpoint.arrays)
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
    if family is not None and family.kind is not None:
        inside = (name for name in checkpoint.arrays if name.startswith(place))
        whole.update(filter(None, map(modules.quantizer_of, inside)))
    return lambda name: (
        name.startswith(tuple(whole))
        or any(name.startswith(parent) and is_part(name.removeprefix(parent)) for parent in parents)
    )
