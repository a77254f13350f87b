"""Options of a command, declared once: each field of a frozen dataclass is a flag with its help."""

from __future__ import annotations

import argparse
from dataclasses import Field, field, fields
from typing import Any, TypeVar

_FLAG = "flag"

T = TypeVar("T")


def option(default: Any, help_text: str, *, flag: str | None = None, group: str | None = None, **keywords: Any) -> Any:
    """Return a dataclass field that is also a flag.

    Args:
        default: value of the field when the flag is absent; a tuple for a flag that can be repeated.
        help_text: help of the flag; "%(default)s" stands for the default.
        flag: the flag; None: made from the field's name.
        group: name that flags share if only one of them may be given.
        keywords: further arguments of `argparse.ArgumentParser.add_argument`.
    """
    metadata = {"flag": flag, "group": group, "keywords": {"help": help_text, **keywords}}
    return field(default=default, metadata={_FLAG: metadata})


def flag_of(setting: Field[Any]) -> str:
    """Return the flag of a field: "--batch-size"."""
    given: str | None = setting.metadata[_FLAG]["flag"]
    return given or f"--{setting.name.replace('_', '-')}"


def add_flags(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """Add the flags of all fields of a dataclass to a parser, in the order of the fields."""
    groups: dict[str, argparse._MutuallyExclusiveGroup] = {}
    for setting in fields(options):
        group, keywords = setting.metadata[_FLAG]["group"], setting.metadata[_FLAG]["keywords"]
        if group is not None and group not in groups:
            groups[group] = parser.add_mutually_exclusive_group()
        # argparse appends repeated flags to a list.
        default = list(setting.default) if isinstance(setting.default, tuple) else setting.default
        target = parser if group is None else groups[group]
        target.add_argument(flag_of(setting), dest=setting.name, default=default, **keywords)


def from_flags(options: type[T], args: argparse.Namespace) -> T:
    """Return a dataclass with the values of the flags that `add_flags` added."""
    values = {setting.name: getattr(args, setting.name) for setting in fields(options)}  # type: ignore[arg-type]
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
