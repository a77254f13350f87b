"""What a stranger's pickle describes, as data: nothing of it is looked up, called or compared.

Strings, numbers, lists and tuples stay Python's. All else is one of the classes below. None of them is hashed by its
content, because a pickle can nest values deeper than Python can hash.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vqserve_data.foreign.foreign_array import MAX_NAME_CHARACTERS


class PickleError(Exception):
    """A pickle is damaged or too large; the text continues a sentence that begins with the file."""


class PickleCutOff(PickleError):
    """A pickle ends early."""

    def __init__(self) -> None:
        super().__init__("is damaged: it ends early")


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """The name of a class or a function. It stays a name."""

    module: str
    name: str

    @property
    def path(self) -> tuple[str, str]:
        """Module and name."""
        return self.module, self.name


@dataclass(slots=True, eq=False)
class Table:
    """The entries of a dictionary.

    Attributes:
        named: entries with short names.
        others: key and value of all other entries, in no particular form; None: there are none.
    """

    named: dict[str, object] = field(default_factory=dict)
    others: list[object] | None = None

    def put(self, key: object, value: object) -> None:
        """Set an entry."""
        # Keys of other types can take very long to hash, and long strings to compare.
        if type(key) is str and len(key) <= MAX_NAME_CHARACTERS:
            self.named[key] = value
        elif self.others is None:
            self.others = [(key, value)]
        else:
            self.others.append((key, value))


@dataclass(slots=True, eq=False)
class Bag:
    """The members of a set, in no particular form."""

    members: list[object] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class PersistentId:
    """A reference to something outside of the pickle, such as the numbers of a tensor."""

    value: object


@dataclass(slots=True, eq=False)
class Instance:
    """What Python would have made by a call, which was not made.

    Attributes:
        function: what would have been called; a Global, unless the pickle is hostile.
        arguments: what it would have been called with; a tuple, unless the pickle is hostile.
        state: what its attributes would have been set from.
        table: what would have been set by key; None: nothing.
        elements: what would have been appended; None: nothing.
    """

    function: object
    arguments: object = ()
    state: object = None
    table: Table | None = None
    elements: list[object] | None = None

    @property
    def path(self) -> tuple[str, str]:
        """Module and name of the function."""
        return self.function.path if isinstance(self.function, Global) else ("", "")

    def argument(self, index: int) -> object:
        """Return an argument; None: there is none."""
        arguments = self.arguments
        return arguments[index] if isinstance(arguments, tuple) and index < len(arguments) else None


def described(value: object) -> str:
    """Return what a value is, for messages: in one line, without control characters."""
    kind = value.function if isinstance(value, Instance) else value
    if isinstance(kind, Global):
        return f"an object of {_shown(kind.module)}.{_shown(kind.name)}"
    return f"an object of type {type(value).__name__}"


def _shown(text: str) -> str:
    return ascii(text[:100])[1:-1]
