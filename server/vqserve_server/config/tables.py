"""The settings as text: the table of docs/operations.md."""

from __future__ import annotations

from vqserve_server.config.settings import SETTINGS


def settings_table() -> str:
    """Return the table of docs/operations.md, in Markdown."""
    lines = ["| Flag | Environment | Default | Meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{setting.flag}` | `{setting.variable}` | `{setting.shown_default}` | {setting.help} |"
        for setting in SETTINGS
    ]
    return "\n".join(lines)
