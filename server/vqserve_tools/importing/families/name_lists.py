"""Names of arrays as options of the next command, and lists of them for messages."""

from __future__ import annotations

import shlex
from collections.abc import Iterable


def accepts(pattern: str, name: str) -> bool:
    """Return whether a pattern, a name or a prefix with ".*", stands for a name."""
    return name == pattern or (pattern.endswith(".*") and name.startswith(pattern[:-1]))


def accept_text(names: Iterable[str]) -> str:
    """Return the option that accepts that these arrays are left."""
    names = list(names)
    return f"--accept-left {' '.join(map(_argument, modules_of(names, common_module(names))))}"


def keys_text(names: Iterable[str]) -> str:
    """Return the options that name these arrays as codebooks."""
    return " ".join(_option("--key", name) for name in names)


def prefix_text(place: str) -> str:
    """Return the option that says where the quantizer is."""
    return _option("--prefix", place)


def _option(flag: str, value: str) -> str:
    return f"{flag}{'=' if value.startswith('-') else ' '}{_argument(value)}"


def _argument(name: str) -> str:
    """Return a name as a shell reads it; what is not printable is written as bash, ksh and zsh read it."""
    if name.isprintable() and "  " not in name:
        return shlex.quote(name)
    return f"$'{''.join(map(_escaped, name))}'"


def _escaped(character: str) -> str:
    code = ord(character)
    if character in "\\' " or (code < 0x80 and not character.isprintable()):
        return f"\\x{code:02x}"
    return character if character.isprintable() else f"\\U{code:08x}"


def common_module(names: Iterable[str]) -> str:
    """Return the prefix of the innermost module around all names."""
    names = sorted(names)
    # What the first and the last of sorted names share, all of them share.
    shared = next((i for i, (a, b) in enumerate(zip(names[0], names[-1], strict=False)) if a != b), len(names[0]))
    return "".join(names[0][:shared].rpartition(".")[:2])


def modules_of(names: Iterable[str], outside: str, limit: int = 8) -> dict[str, list[str]]:
    """Return names by themselves; if there are more than `limit`, by the modules that hold them, as "module.*".

    Args:
        names: names of arrays.
        outside: prefix around the modules; where a name does not begin with it, the first component is its module.
        limit: number of names that are not put together.
    """
    names = list(names)
    if len(names) <= limit:
        return {name: [name] for name in names}
    modules: dict[str, list[str]] = {}
    for name in names:
        shared = outside if name.startswith(outside) else ""
        module, dot, _ = name.removeprefix(shared).partition(".")
        modules.setdefault(f"{shared}{module}{'.*' if dot else ''}", []).append(name)
    return {module if len(inner) > 1 else inner[0]: inner for module, inner in modules.items()}
