"""Names of codebook files, and the search for the files that the command line names."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vqserve.codebook_info import VERSION_MARK
from vqserve.errors import StartError

SUFFIX = ".safetensors"
# Files that `vqserved import` reads. Users put them beside codebooks and expect the server to serve them.
IMPORTED = frozenset({".npy", ".npz", ".pt", ".pth", ".ckpt", ".bin", ".th"})
# Valid names of codebooks, and so valid stems of their files.
NAME = re.compile(r"[\w+-][\w.+-]{0,127}")
DEMO_NAME = "demo"
DEMO_PATH = Path(__file__).parent / "assets" / "demo.safetensors"
# No leading zeros, because 03 would be a second name of 3.
_VERSION = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)
# Valid labels: they begin with a letter, so none looks like a version.
_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}", re.ASCII)


def version_of(name: str) -> int | None:
    """Return the version in a name; None if it has none, or a label in its place."""
    version = name.partition(VERSION_MARK)[2]
    return int(version) if _VERSION.fullmatch(version) else None


def version_order(name: str) -> tuple[str, int, str]:
    """Return the sort key of a name: first the name itself, then its labels, then its versions as numbers."""
    base, _, version = name.partition(VERSION_MARK)
    return base, version_of(name) or 0, version


def latest(names: Iterable[str]) -> dict[str, str]:
    """Return the latest version of each name, by the name without it: {"book": "book@3"}."""
    return {version_order(name)[0]: name for name in sorted(names, key=version_order)}


@dataclass(frozen=True)
class Label:
    """A name for a version: a symbolic link beside it.

    Attributes:
        path: of the link.
        version: the name of the version, "book@3".
    """

    path: Path
    version: str


@dataclass(frozen=True)
class Problem:
    """A file or folder that is not served.

    Attributes:
        text: the file or folder, and the reason.
        paths: paths whose loaded codebooks, also those below a path, stay after a reload.
        is_fatal: whether the problem prevents the start of the daemon.
        is_lost: whether a source itself does not exist or is empty, as when its volume is not mounted.
    """

    text: str
    paths: tuple[Path, ...] = ()
    is_fatal: bool = True
    is_lost: bool = False


@dataclass(frozen=True)
class Found:
    """The codebook files of the sources.

    Attributes:
        files: files by served name ("book@3" for a version), in the order of the sources; in a folder in the order of
            names, versions ascending.
        problems: files and folders that are not served.
        labels: labels of versions by served name ("book@stable").
    """

    files: dict[str, Path] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    labels: dict[str, Label] = field(default_factory=dict)

    def check(self) -> None:
        """Check that no codebook is missing.

        Raises:
            StartError: a source does not exist or is empty, a folder cannot be read, a name is invalid or used twice,
                or a link points out of its folder.
        """
        for problem in self.problems:
            if problem.is_fatal:
                raise StartError(problem.text)


@dataclass(frozen=True)
class _Claim:
    """A file, or a folder of versions, to serve under a name."""

    name: str
    path: Path
    files: dict[str, Path]
    labels: dict[str, Label] = field(default_factory=dict)


def find_codebooks(sources: Sequence[str]) -> Found:
    """Return the codebook files to serve.

    Args:
        sources: paths of files or folders, or NAME=FILE; if empty, the demo codebook. A folder holds files
            (`book.safetensors`) and folders of versions (`book/3.safetensors`) with links to them
            (`book/stable.safetensors`); names with a leading dot are skipped.
    """
    found = Found()
    claims: dict[str, list[_Claim]] = {}
    for source in sources or (f"{DEMO_NAME}={DEMO_PATH}",):
        for one in _look(source):
            if isinstance(one, Problem):
                found.problems.append(one)
            elif not NAME.fullmatch(one.name):
                text = f"{one.name!r} is not a valid name: use letters, digits and . _ + - (NAME=PATH)"
                found.problems.append(Problem(f"{one.path}: {text}", (one.path,)))
            else:
                claims.setdefault(one.name, []).append(one)
    for name, claimants in claims.items():
        if len(claimants) == 1:
            found.files.update(claimants[0].files)
            found.labels.update(claimants[0].labels)
            continue
        paths = tuple(claim.path for claim in claimants)
        way_out = "rename one" if any(path.is_dir() for path in paths) else "name one (NAME=PATH)"
        text = f"two codebooks are named {name!r}: {paths[0]} and {paths[1]}; {way_out}"
        found.problems.append(Problem(text, paths))
    return found


def _look(source: str) -> Iterator[_Claim | Problem]:
    name, equals, path_text = source.partition("=")
    if not equals or os.path.lexists(source):
        name, path_text = "", source
    path = Path(path_text)
    try:
        if path.is_dir():
            if name:
                yield Problem(f"{path} is a folder: NAME=PATH needs a file", (path,))
            else:
                yield from _look_into(path)
        elif path.exists():
            name = name or path.stem
            yield _Claim(name, path, {name: path})
        else:
            yield Problem(f"no such file or folder: {path}", (path,), is_lost=True)
    except OSError as error:
        yield _unreadable(path, error)


def _look_into(folder: Path) -> Iterator[_Claim | Problem]:
    try:
        children = _listed(folder)
    except OSError as error:
        yield _unreadable(folder, error)
        return
    root = folder.resolve()
    is_empty = True
    for child in children:
        for one in _look_at(child, root):
            is_empty = is_empty and isinstance(one, Problem) and not one.is_fatal
            yield one
    if is_empty:
        # With its path: an unmounted volume leaves an empty folder, so after a reload all codebooks from there stay.
        yield Problem(f"no *{SUFFIX} file in {folder}: put one there, or mount its volume", (folder,), is_lost=True)


def _look_at(child: Path, root: Path) -> Iterator[_Claim | Problem]:
    is_folder = child.is_dir()
    if not is_folder and not child.name.endswith(SUFFIX):
        if child.suffix.lower() in IMPORTED:
            text = f"{child} is skipped: it is not a *{SUFFIX} file; `vqserved import` makes one from it"
            yield Problem(text, (child,), is_fatal=False)
        return
    if not _is_inside(child, root):
        yield _outside_link(child)
    elif is_folder:
        yield from _versions(child, root)
    else:
        yield _Claim(child.stem, child, {child.stem: child})


def _versions(folder: Path, root: Path) -> Iterator[_Claim | Problem]:
    try:
        children = _listed(folder)
    except OSError as error:
        # Volumes often have a folder lost+found that only root can list.
        yield _unreadable(folder, error, is_fatal=False)
        return
    files: dict[int, Path] = {}
    links: list[Path] = []
    candidates = [child for child in children if child.name.endswith(SUFFIX)]
    for child in candidates:
        if child.is_symlink() and _LABEL.fullmatch(child.stem):
            links.append(child)
        elif not _VERSION.fullmatch(child.stem):
            text = (
                f"{child} is skipped: the name of a version is its number, for example 3{SUFFIX}, without leading zeros"
            )
            yield Problem(text, (child,), is_fatal=False)
        elif not _is_inside(child, root):
            yield _outside_link(child)
        else:
            files[int(child.stem)] = child
    names = {version: f"{folder.name}{VERSION_MARK}{version}" for version in sorted(files)}
    labels = {}
    targets = {path.resolve(): names[version] for version, path in files.items()}
    for link in links:
        target = _target(link)
        if target in targets:
            labels[f"{folder.name}{VERSION_MARK}{link.stem}"] = Label(link, targets[target])
        else:
            text = f"{link} is a label, and so must be a link to a version beside it, such as 3{SUFFIX}{_not_to(link)}"
            yield Problem(f"{text}; `ln -sfn 3{SUFFIX} {link}` makes one", (link,))
    if files:
        yield _Claim(folder.name, folder, {names[version]: files[version] for version in names}, labels)
    elif not candidates:
        # Without its path, because the codebooks from there are no longer served.
        yield Problem(f"{folder} is skipped: it has no file N{SUFFIX}", is_fatal=False)


def _listed(folder: Path) -> list[Path]:
    # glob would treat an unreadable folder as empty, and a mounted folder often belongs to another user.
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_inside(path: Path, root: Path) -> bool:
    target = _target(path)
    return target is not None and target.is_relative_to(root)


def _target(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        # Links that form a cycle have no target.
        return None


def _not_to(link: Path) -> str:
    # It may be replaced at any moment.
    with contextlib.suppress(OSError):
        return f", not to {link.readlink()}"
    return ""


def _outside_link(path: Path) -> Problem:
    text = f"{path} is a link to outside its folder: replace it by the file, or name the file (NAME=PATH)"
    return Problem(text, (path,))


def _unreadable(path: Path, error: OSError, *, is_fatal: bool = True) -> Problem:
    what = "the folder " if path.is_dir() else ""
    hint = "; let it (chmod a+rX), or serve as another user" if isinstance(error, PermissionError) else ""
    text = f"user {os.geteuid()} cannot read {what}{path}: {error.strerror or error}{hint}"
    return Problem(text, (path,), is_fatal=is_fatal)
