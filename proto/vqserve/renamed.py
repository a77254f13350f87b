"""Old names of public things, which work for one more release."""

from __future__ import annotations

import warnings
from collections.abc import Callable


def renamed(module: str, **now: type) -> Callable[[str], object]:
    """Return the `__getattr__` of a module with old names: every use emits a DeprecationWarning with the new name.

    Args:
        module: name of the module.
        now: by old name, what has another name now.
    """

    def find(name: str) -> object:
        if name not in now:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(module, name, now[name])
        return now[name]

    return find


def warn_renamed(module: str, name: str, new: type) -> None:
    """Emit the warning about an old name, from the module's `__getattr__`."""
    text = f"{module}.{name} is {new.__module__}.{new.__name__} now; the old name goes with the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
