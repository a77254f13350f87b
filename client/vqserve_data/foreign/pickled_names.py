"""Dotted names of the tensors in what a pickle describes, as a state dict would name them.

Dictionaries give their keys, lists their positions, objects their attributes. Of a pickled module, these are its
parameters, buffers and modules only. Everything that leads to no tensor is left out, however large or endless it is:
configurations, callbacks and their references to each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from vqserve_data.foreign.foreign_array import MAX_NAME_CHARACTERS
from vqserve_data.foreign.pickled_tensors import PickledTensor, tensor_of
from vqserve_data.foreign.pickled_values import Bag, Instance, PickleError, Table

# All entries of all containers, and the containers among them that may lead to tensors; a shared container counts once.
_MAX_ENTRIES = 1 << 21
_MAX_CONTAINERS = 1 << 19
# Containers and tensors by name; a model has thousands. Containers that contain each other can look like billions.
_MAX_NAMES = 1 << 17
_MAX_CHARACTERS = 16 << 20
_MAX_DEPTH = 100
# Levels of wrappers that are looked through.
_MAX_WRAPPERS = 16
_ENDLESS = "has dictionaries that contain each other: it is not a model's state dict"
_TOO_MANY = (
    f"has more than {_MAX_CONTAINERS} objects beside its tensors; where it was made, save its tensors alone: "
    "torch.save(model.state_dict(), 'weights.pt')"
)
# What trainers put around the state dict of the whole model.
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
# Levels of names that wrappers may have added to a model or to its copy.
_MAX_ADDED = 8
# A quantizer that was saved beside the model, not in it.
_QUANTIZER = re.compile(r"quanti[sz]|codebook|(?:^|[._])r?vq")

Entries: TypeAlias = Iterable[tuple[object, object]]


def named_tensors(root: object) -> dict[str, PickledTensor]:
    """Return the tensors by name; a lone tensor has the empty name.

    A `state_dict` or `model` around the whole model is removed from the names.

    Raises:
        PickleError: two tensors have one name, or limits are exceeded.
    """
    if isinstance(root, Instance):
        tensor = tensor_of(root)
        if tensor is not None:
            return {"": tensor}
    tree = _Tree(root)
    named: dict[str, PickledTensor] = {}
    for name, tensor in tree.tensors(tree.unwrapped(root)):
        if name in named:
            raise PickleError(f"has two tensors {name!r}")
        named[name] = tensor
    return named


def _is_container(value: object) -> bool:
    """Whether a value can contain tensors by name."""
    return isinstance(value, Table | Instance | list | tuple)


class _Tree:
    """The containers that lead to tensors, with their entries that do.

    Containers have no content that could be compared, so they are known by their identity. `root` keeps them alive.
    """

    def __init__(self, root: object) -> None:
        self._entries: dict[int, list[tuple[object, object]]] = {}
        tensors: dict[int, PickledTensor | None] = {}
        parents: dict[int, list[int]] = {}
        leading: list[int] = []
        entries_left, containers_left = _MAX_ENTRIES, _MAX_CONTAINERS
        todo = [root]
        while todo:
            container = todo.pop()
            if id(container) in self._entries:
                continue
            entries: list[tuple[object, object]] = []
            self._entries[id(container)] = entries
            for name, value in _entries_of(container):
                entries_left -= 1
                containers_left -= _is_container(value)
                if entries_left < 0 or containers_left < 0:
                    raise PickleError(_TOO_MANY)
                if not _is_container(value):
                    continue
                if isinstance(value, Instance) and id(value) not in tensors:
                    tensors[id(value)] = tensor_of(value)
                tensor = tensors.get(id(value))
                if tensor is not None:
                    entries.append((name, tensor))
                    leading.append(id(container))
                else:
                    entries.append((name, value))
                    parents.setdefault(id(value), []).append(id(container))
                    todo.append(value)
        self._prune(leading, parents)

    def _prune(self, leading: list[int], parents: dict[int, list[int]]) -> None:
        kept = set()
        while leading:
            container = leading.pop()
            if container not in kept:
                kept.add(container)
                leading += parents.get(container, [])
        for container, entries in self._entries.items():
            entries[:] = (
                (name, value)
                for name, value in entries
                if container in kept and (isinstance(value, PickledTensor) or id(value) in kept)
            )

    def tensors(self, container: object) -> Iterator[tuple[str, PickledTensor]]:
        """Yield the tensors in a container by dotted name.

        A container that is reached from itself is not entered again.

        Raises:
            PickleError: limits are exceeded.
        """
        todo: list[tuple[str, object, tuple[int, ...]]] = [("", container, ())]
        left, characters = _MAX_NAMES, 0
        while todo:
            prefix, container, within = todo.pop()
            if id(container) in within:
                continue
            entries = self._entries.get(id(container), [])
            left -= len(entries)
            characters += len(prefix) * (len(entries) + 1)
            if left < 0 or characters > _MAX_CHARACTERS or len(within) > _MAX_DEPTH:
                raise PickleError(_ENDLESS)
            inner = []
            for key, value in entries:
                if len(prefix) + (len(key) if isinstance(key, str) else 0) > MAX_NAME_CHARACTERS:
                    raise PickleError(
                        f"has a name of more than {MAX_NAME_CHARACTERS} characters: it is not a model's state dict"
                    )
                if isinstance(value, PickledTensor):
                    yield f"{prefix}{key}", value
                else:
                    inner.append((f"{prefix}{key}.", value, (*within, id(container))))
            todo += reversed(inner)

    def unwrapped(self, root: object) -> object:
        """Return the container of the model inside dictionaries around it.

        Names stay complete if the wrapper is ambiguous: beside tensors, with both wrappers, or beside another copy of
        the same model, such as its moving average, or a quantizer that is not in the model.
        """
        for _ in range(_MAX_WRAPPERS):
            entries = self._entries.get(id(root), [])
            inner = [(name, value) for name, value in entries if name in _WRAPPERS]
            if _table_of(root) is None or len(inner) != 1 or any(isinstance(v, PickledTensor) for _, v in entries):
                break
            [(wrapper, model)] = inner
            others = (
                (f"{name}.{inside}", tensor)
                for name, value in entries
                # Optimizers of the model and of a wrapper around it have the same names.
                if name != wrapper and not (isinstance(name, str) and "optim" in name)
                for inside, tensor in self.tensors(value)
            )
            # Wrappers of the model and of its copy may differ.
            names = {ending for name, tensor in self.tensors(model) for ending in _endings(name, tensor, 2)}
            if any(_QUANTIZER.search(name) or names.intersection(_endings(name, tensor, 1)) for name, tensor in others):
                break
            root = model
        return root


def _endings(name: str, tensor: PickledTensor, least: int) -> Iterator[int]:
    """Yield hashes of a tensor's shape with its name, and with the ends of its name of at least `least` components."""
    # Hashes, because the ends of many long names would take much memory. Two that are equal by chance do no harm.
    yield hash((tensor.shape, name))
    components = name.split(".")
    for start in range(1, min(len(components) - least, _MAX_ADDED) + 1):
        yield hash((tensor.shape, ".".join(components[start:])))


def _table_of(value: object) -> Table | None:
    """Return the entries of a dictionary, of its class or one derived from it; None: it is none."""
    if isinstance(value, Instance):
        if value.table is None and value.path == ("collections", "OrderedDict"):
            # As Python 2 wrote it.
            pairs = value.argument(0)
            return Table(others=pairs if isinstance(pairs, list) else [])
        return value.table
    return value if isinstance(value, Table) else None


def _entries_of(container: object) -> Entries:
    table = _table_of(container)
    if table is not None:
        return _entries_of_table(table)
    if isinstance(container, list | tuple):
        return enumerate(container)
    if not isinstance(container, Instance):
        return ()
    if container.elements is not None:
        return enumerate(container.elements)
    if container.path[0] == "torch.jit._pickle":
        # A list or a dictionary with its type.
        typed = container.argument(0)
        return (
            _entries_of_table(typed)
            if isinstance(typed, Table)
            else enumerate(typed if isinstance(typed, list) else ())
        )
    return _entries_of_object(container.state)


def _entries_of_table(table: Table) -> Entries:
    yield from table.named.items()
    for pair in table.others or ():
        # What is no entry is yielded too, because it counts.
        key, value = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, None)
        yield (key, value) if type(key) in (str, int) else (None, None)


def _entries_of_object(state: object) -> Entries:
    # Attributes that are in slots come in a second dictionary.
    for attributes in state if isinstance(state, tuple) and len(state) == 2 else (state,):
        if isinstance(attributes, Table):
            tables = [_table_of(attributes.named.get(name)) for name in ("_parameters", "_buffers", "_modules")]
            parts = [table for table in tables if table is not None]
            yield from _entries_of_module(attributes, parts) if len(parts) == 3 else attributes.named.items()


def _entries_of_module(attributes: Table, parts: list[Table]) -> Entries:
    left_out = attributes.named.get("_non_persistent_buffers_set")
    if isinstance(left_out, Instance) and left_out.path == ("builtins", "set"):
        left_out = left_out.argument(0)
    names = set()
    for name in left_out.members if isinstance(left_out, Bag) else left_out if isinstance(left_out, list) else ():
        if isinstance(name, str) and len(name) <= MAX_NAME_CHARACTERS:
            names.add(name)
        yield None, None
    parameters, buffers, modules = parts
    yield from _entries_of_table(parameters)
    yield from ((name, None if name in names else value) for name, value in _entries_of_table(buffers))
    yield from _entries_of_table(modules)
