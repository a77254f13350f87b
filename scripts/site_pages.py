"""A MkDocs hook (mkdocs.yml): adds pages from outside docs/, makes links work on GitHub and on the site, runs `--help`.

The pages in docs/ link to files of the repository. On the site such a link leads to the page made from that file, if
there is one, and otherwise to the file on GitHub.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).resolve().parents[1]
# Files outside docs/ that become pages or figures; those that do not exist are left out.
_OTHER_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
    **{
        path.relative_to(_ROOT).as_posix(): path.relative_to(_ROOT).as_posix()
        for path in sorted((_ROOT / "benchmarks" / "results").iterdir())
        if path.suffix in {".md", ".png"}
    },
}
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HELP = re.compile(r"^\$ (vqserved?(?: \w+)? --help)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and figures that come from outside docs/."""
    for path, uri in _OTHER_PAGES.items():
        if (_ROOT / path).exists():
            files.append(File.generated(config, uri, abs_src_path=str(_ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links for the site, and insert the output of each `--help` command below it."""
    path = next((path for path, uri in _OTHER_PAGES.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}")

    def linked(match: re.Match[str]) -> str:
        return f"]({_link(match[1], path, page.file.src_uri, config, files)})"

    parts, end = [], 0
    for fence in _FENCED.finditer(markdown):
        parts += [_LINK.sub(linked, markdown[end : fence.start()]), _HELP.sub(_with_help, fence[0])]
        end = fence.end()
    return "".join([*parts, _LINK.sub(linked, markdown[end:])])


def _link(link: str, path: str, uri: str, config: MkDocsConfig, files: Files) -> str:
    """Return a link of the file `path` as the page `uri` needs it.

    Raises:
        FileNotFoundError: if the file that it names does not exist.
    """
    name, mark, anchor = link.partition("#")
    if not name or "://" in name:
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
    on_site = _uri(target) or _uri(f"{target}/README.md")
    if on_site and files.get_file_from_path(on_site):
        return posixpath.relpath(on_site, posixpath.dirname(uri) or ".") + mark + anchor
    if not (_ROOT / target).exists():
        raise FileNotFoundError(f"{path} links to {link}, which does not exist")
    kind = "tree" if (_ROOT / target).is_dir() else "blob"
    return f"{config.extra['repository']}/{kind}/main/{target}{mark}{anchor}"


def _uri(path: str) -> str | None:
    """Return where a file of the repository is on the site; None: the site does not have it."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and (_ROOT / path).is_file():
        return path.removeprefix("docs/")
    return _OTHER_PAGES.get(path)


def _with_help(match: re.Match[str]) -> str:
    command, *words = match[1].split()
    program = Path(sys.executable).with_name(command)
    ran = subprocess.run(  # noqa: S603
        [program, *words], env={**os.environ, "COLUMNS": "82"}, stdout=subprocess.PIPE, check=True, text=True
    )
    return f"{match[0]}\n{ran.stdout.rstrip()}"
