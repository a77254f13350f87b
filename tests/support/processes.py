"""Which tests start processes: found in their code, so that no list of them is kept by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

_STARTERS = {"subprocess", "multiprocessing"}


def starts_a_process(item: pytest.Function) -> bool:
    """Return whether the test, one of its fixtures, or a function of theirs names a module that starts processes."""
    fixtures = [definition.func for found in item._fixtureinfo.name2fixturedefs.values() for definition in found]
    seen: set[Callable[..., Any]] = set()
    return any(_names_a_starter(function, seen) for function in (item.function, *fixtures))


def _names_a_starter(function: Callable[..., Any], seen: set[Callable[..., Any]]) -> bool:
    if not isinstance(function, FunctionType) or function in seen:
        return False
    seen.add(function)
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType) and value.__name__ in _STARTERS:
            return True
        # What is called is followed where tests define it, and not into what is tested.
        if getattr(value, "__module__", None) == function.__module__ and any(
            _names_a_starter(each, seen) for each in _functions(value)
        ):
            return True
    return False


def _functions(value: Any) -> list[Any]:
    return list(vars(value).values()) if isinstance(value, type) else [value]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
