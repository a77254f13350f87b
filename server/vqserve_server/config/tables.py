"""The settings as text: the table of docs/operations.md, and a file of settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import wrap

from vqserve_server.config.file import CODEBOOKS, ConfigError, located
from vqserve_server.config.settings import GROUPS, SETTINGS, ServeConfig
from vqserve_server.config.sources import Resolved

_WIDTH = 100


def settings_table() -> str:
    """Return the table of docs/operations.md, in Markdown."""
    lines = ["| Flag | Environment | Default | Meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{setting.flag}` | `{setting.variable}` | `{setting.shown_default}` | {setting.help} |"
        for setting in SETTINGS
    ]
    return "\n".join(lines)


def settings_file(resolved: Resolved) -> str:
    """Return a file for --config with these settings, each with its meaning; defaults are comments.

    Paths are absolute, since in the file they would start at its folder.

    Raises:
        ConfigError: a value cannot be in such a file.
    """
    here = Path.cwd()
    codebooks = _literals(CODEBOOKS, (located(each, here) for each in resolved.codebooks))
    lines = [
        "# Settings of `vqserved serve --config FILE`. A flag and a VQSERVE_* variable override a key of this file.",
        "# A comment with a key is its default. Relative paths start at the folder of the file.",
        "",
        '# codebook files, folders of them, and "NAME=FILE"; none: the demo codebook',
        _entry(CODEBOOKS, codebooks, is_set=CODEBOOKS in resolved.origins),
    ]
    for group, cls in (*GROUPS.items(), (None, ServeConfig)):
        title = "The server." if group is None else (cls.__doc__ or "").partition("\n")[0]
        lines += ["", f"## {title}"]
        for setting in SETTINGS:
            if setting.group == group:
                lines += ["", *wrap(setting.help, _WIDTH, initial_indent="# ", subsequent_indent="# ")]
                value = setting.of(resolved.config)
                if setting.is_path and value:
                    value = str(here / value)
                elif setting.is_port_or_auto and value != "auto":
                    value = int(value)
                literal = _literal(setting.name, value)
                lines.append(_entry(setting.name, literal, is_set=setting.name in resolved.origins))
    return "\n".join(lines) + "\n"


def _entry(key: str, literal: str, *, is_set: bool) -> str:
    return f"{'' if is_set else '# '}{key} = {literal}"


def _literals(key: str, texts: Iterable[str]) -> str:
    return f"[{', '.join(_literal(key, text) for text in texts)}]"


def _literal(key: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{"".join(_escaped(key, value))}"'
    return repr(value).removesuffix(".0")


def _escaped(key: str, text: str) -> Iterator[str]:
    """Yield the characters of a text as a TOML string has them, in ASCII alone.

    Raises:
        ConfigError: it is no text, but bytes of a path that no TOML file can have.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{key} {text!r} is not UTF-8, and so cannot be in a file of settings") from None
    for character in text:
        if character in '"\\':
            yield f"\\{character}"
        elif " " <= character <= "~":
            yield character
        else:
            # Not as JSON has it, where two escapes make one character above U+FFFF.
            yield f"\\U{ord(character):08X}"
