"""buildah in a storage of its own: builds, layers and what a push would send. For scripts/image_test.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A date that a zip can hold. It is always the same, so that the time of a commit does not make the layers differ.
SOURCE_DATE_EPOCH = 315_532_800
_RELEASE = "bookworm"
_PYTHON = "3.11"


class Failed(Exception):
    """A command failed; the text has the end of what it wrote."""


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return its standard output.

    Raises:
        Failed: it did not succeed.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise Failed(f"{' '.join(words)}\nexit code {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


class Buildah:
    """One storage. The driver is buildah's choice, or that of STORAGE_DRIVER (vfs works without overlay mounts)."""

    def __init__(self, folder: Path) -> None:
        """Use a storage; it is made when it is first used."""
        self._folder = folder

    @property
    def command(self) -> list[str]:
        """The command with the options of this storage."""
        return ["buildah", "--root", str(self._folder / "root"), "--runroot", str(self._folder / "run")]

    def __call__(self, *arguments: str | Path) -> str:
        """Run buildah and return its standard output without the newline at the end."""
        return run(*self.command, *arguments).strip()

    def has(self, image: str) -> bool:
        """Return whether the storage has an image of this name."""
        return f"localhost/{image}:latest" in self("images", "--all", "--format", "{{.Name}}:{{.Tag}}").splitlines()

    def build(self, context: Path, image: str, *, base: str, wheels: Path) -> float:
        """Build an image as `make image` does, without a network; return the seconds.

        Args:
            context: copy of the repository.
            image: name of the new image.
            base: name of the image that it is built on.
            wheels: folder with everything that pip installs.
        """
        bud = [*self.command, "bud", "--layers", "--format", "docker", "--isolation", "chroot"]
        bud += ["--timestamp", str(SOURCE_DATE_EPOCH), "-v", f"{wheels}:/wheels:ro"]
        arguments = {"BASE": base, "PIP_FIND_LINKS": "/wheels", "PIP_NO_INDEX": "1"}
        options = " ".join(f"--build-arg {name}={value}" for name, value in arguments.items())
        started = time.monotonic()
        run("make", "image", f"IMAGE={image}", f"BUILDER={' '.join(bud)}", f"BUILD_ARGS={options}", cwd=context)
        return time.monotonic() - started

    def config(self, image: str) -> dict[str, Any]:
        """Return the settings of an image as Docker knows them."""
        config: dict[str, Any] = json.loads(self("inspect", "--type", "image", image))["Docker"]["config"]
        return config

    def layers(self, image: str) -> list[str]:
        """Return the digests of an image's layers, the lowest first; they are those of the content, not compressed."""
        layers: list[str] = json.loads(self("inspect", "--type", "image", image))["OCIv1"]["rootfs"]["diff_ids"]
        return layers

    def push(self, image: str, registry: Path) -> int:
        """Push an image to a folder and return the bytes that were not there yet, compressed as for a registry."""
        before = _sizes(registry)
        self("push", image, f"oci:{registry}:{image}")
        after = _sizes(registry)
        return sum(after[name] for name in after.keys() - before.keys())

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """Yield the root folder of a new container of an image, which can be written."""
        name = self("from", "--pull-never", image)
        try:
            yield Path(self("mount", name))
            self("umount", name)
        finally:
            self("rm", name)

    def copy_to(self, other: Buildah, image: str) -> None:
        """Copy an image to another storage."""
        with tempfile.TemporaryDirectory() as scratch:
            archive = f"oci-archive:{scratch}/image.tar"
            self("push", image, archive)
            other("tag", other("pull", "--quiet", archive).splitlines()[-1], image)

    def remove(self) -> None:
        """Delete the whole storage."""
        if self._folder.exists():
            self("rm", "--all")
            self("rmi", "--all", "--force")
            shutil.rmtree(self._folder)


def _sizes(registry: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (registry / "blobs").rglob("*") if path.is_file()}


def make_base(buildah: Buildah, image: str) -> None:
    """Make an image of Debian with Python from Debian's packages (needs debootstrap, and root)."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        include = "--include=python3,python3-venv,ca-certificates"
        run("debootstrap", "--variant=minbase", include, _RELEASE, root)
        shutil.rmtree(root / "var" / "cache" / "apt" / "archives")
        # Other base images have it; buildah would make it, to mount its own there.
        (root / "etc" / "hosts").touch()
        container = buildah("from", "scratch")
        buildah("add", "--quiet", container, root, "/")
        buildah("commit", "--quiet", "--rm", container, image)


def download_wheels(context: Path, folder: Path) -> None:
    """Download what the image installs, as pip is configured here (PIP_FIND_LINKS: wheels of torch for the CPU)."""
    with tempfile.TemporaryDirectory() as scratch:
        run(sys.executable, "scripts/image_requirements.py", scratch, cwd=context)
        for part in ("runtime", "build", "kernels"):
            files = [
                f"-{flag}{scratch}/{part}/{name}.txt" for flag, name in (("c", "constraints"), ("r", "requirements"))
            ]
            target = ["--only-binary=:all:", "--python-version", _PYTHON, "--dest", str(folder)]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            run(*pip, *target, *files, env=dict(os.environ))


def copy_context(root: Path, target: Path) -> None:
    """Copy what `make image` needs from a checkout."""
    target.mkdir()
    for name in ("Dockerfile", ".dockerignore", "Makefile", "pyproject.toml", "constraints.txt", "hatch_build.py"):
        shutil.copy2(root / name, target / name)
    for name in ("README.md", "LICENSE"):
        shutil.copy2(root / name, target / name)
    for name in ("scripts", "proto", "server", "client"):
        shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "compiled"))
