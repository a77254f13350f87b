"""How the job whose output a folder has differs from the one that is to write there, in words of the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vqserve.text import printable

# Differences that an error lists.
_MOST_LISTED = 5
# What of a job the user chooses, and the flags that have other names there.
_GROUPS_OF_OPTIONS = ("options", "select", "format")
_FLAGS = {"batched": "unbatched", "members": "member", "name": "format"}


def some_of(differences: Sequence[str]) -> str:
    """Return the first few as one text."""
    shown = "; ".join(differences[:_MOST_LISTED])
    more = f"; and {len(differences) - _MOST_LISTED} more" if len(differences) > _MOST_LISTED else ""
    return f"{shown}{more}"


def job_differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return how two jobs, as their manifests describe them, differ: one text for each difference."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys((*before, *now))
        return [
            text for key in keys for text in job_differences(before.get(key), now.get(key), f"{name} {key}".strip())
        ]
    if before == now or name == "vqserve":
        return []
    group, _, option = name.rpartition(" ")
    if group in _GROUPS_OF_OPTIONS:
        return [f"{_flag(option)} was {_given(option, before)} and is {_given(option, now)}"]
    return [f"{name} was {_shown(before)} and is {_shown(now)}"]


def _flag(option: str) -> str:
    return "--" + _FLAGS.get(option, option).replace("_", "-")


def _given(option: str, value: object) -> str:
    if option == "batched":
        return "not given" if value else "given"
    return "not given" if value in (None, []) else _shown(value)


def source_differences(before: str, now: str) -> list[str]:
    """Return how two lists of sources, a line of JSON each, differ."""
    if before == now:
        return []
    old, new = ({line["name"]: line for line in map(json.loads, text.splitlines())} for text in (before, now))
    gone = [f"source {_shown(name)} is missing" for name in old if name not in new]
    more = [f"source {_shown(name)} is new" for name in new if name not in old]
    changed = [f"source {_shown(name)} was changed" for name in new if name in old and old[name] != new[name]]
    return [*gone, *more, *changed] or ["the sources are in another order"]


def _shown(value: object) -> str:
    return printable(json.dumps(value, ensure_ascii=False), 100)
