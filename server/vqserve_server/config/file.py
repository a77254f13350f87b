"""The file of settings: TOML, one key for each setting, and the codebooks."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqserve_server.config import values
from vqserve_server.config.settings import SETTINGS, Setting

# Names the codebooks, as the arguments of the command line do.
CODEBOOKS = "codebooks"


class ConfigError(ValueError):
    """A setting does not exist or has an invalid value; the text names it."""


@dataclass(frozen=True)
class SettingsFile:
    """What a file says.

    Attributes:
        path: of the file.
        settings: values by name of setting.
        codebooks: files and folders to serve, as on the command line.
    """

    path: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    codebooks: tuple[str, ...] = ()


def read_file(path: str) -> SettingsFile:
    """Return what a file says; relative paths in it start at its folder.

    Raises:
        ConfigError: it cannot be read, is not TOML, has an unknown key, or a value is not valid.
    """
    try:
        document = tomllib.loads(Path(path).read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"cannot read the settings in {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {str(error)[:200]}") from None
    known = {setting.name: setting for setting in SETTINGS}
    folder = Path(path).parent
    codebooks: tuple[str, ...] = ()
    settings = {}
    for key, value in document.items():
        try:
            if key == CODEBOOKS:
                codebooks = _codebooks(value, folder)
            elif key in known:
                settings[key] = _value(known[key], value, folder)
            else:
                raise ConfigError(f"{path}: unknown key {key[:80]!r}{_suggestion(key, known)}")
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"{path}: {key} {error}") from None
    return SettingsFile(path, settings, codebooks)


def near(name: str, known: Mapping[str, object]) -> str | None:
    """Return the known name that a wrong one is near to, if there is one."""
    return next(iter(difflib.get_close_matches(name, known, 1, cutoff=0.75)), None)


def located(source: str, folder: Path) -> str:
    """Return a codebook of the command line, PATH or NAME=PATH, with a path that starts at a folder."""
    name, equals, path = source.partition("=")
    if equals and not (folder / source).exists():
        return f"{name}={folder / path}"
    return str(folder / source)


def _suggestion(key: str, known: Mapping[str, object]) -> str:
    name = near(key, {**known, CODEBOOKS: None})
    return f": did you mean {name}?" if name else "; `vqserved serve --print-config` lists all"


def _value(setting: Setting, value: object, folder: Path) -> Any:
    wanted, kinds = _PORT_OR_AUTO if setting.is_port_or_auto else _KINDS[type(setting.default)]
    # True is an int, too.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"must be {wanted}, not {_shown(value)}")
    if isinstance(value, str) and "\0" in value:
        # A flag or a variable cannot have one, and the system takes none.
        raise ValueError("must not have a zero byte")
    parsed = setting.parse(values.written(value))
    return str(folder / parsed) if setting.is_path and parsed else parsed


_KINDS: Mapping[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false, without quotes", (bool,)),
    int: ("an integer, without quotes", (int,)),
    float: ("a number, without quotes", (int, float)),
    str: ("a text in quotes", (str,)),
}
_PORT_OR_AUTO: tuple[str, tuple[type, ...]] = ('an integer, without quotes, or "auto"', (int, str))


def _codebooks(value: object, folder: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ValueError(f'must be a list of files, folders and NAME=FILE, such as ["/codebooks"], not {_shown(value)}')
    return tuple(located(one, folder) for one in value)


def _shown(value: object) -> str:
    return repr(value)[:80] if isinstance(value, str | int | float) else f"a {type(value).__name__}"
