"""A container of an image without an engine, from util-linux's commands. For scripts/image_test.py; needs root.

As with `docker run --read-only --cap-drop ALL --security-opt no-new-privileges --network host`: mounts and process
numbers of its own, a read-only root without a tmpfs, and the image's user, environment, entry point and health check.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from image_buildah import Buildah, Failed

# Arguments: the root folder, a folder that is mounted on /files, the user, and the command.
_ENTER = """
set -e
root=$1 files=$2 user=$3; shift 3
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --bind "$files" "$root/files"
mount -o remount,bind,ro "$root/files"
mount -o remount,bind,ro "$root"
exec setpriv --no-new-privs chroot --userspec="$user" --groups= "$root" "$@"
"""
_READ_ONLY = 5


class Container:
    """A running container."""

    def __init__(self, buildah: Buildah, image: str, arguments: list[str], files: Path, env: Mapping[str, str]) -> None:
        """Start it.

        Args:
            buildah: storage of the image.
            image: its name.
            arguments: of its entry point.
            files: folder that it sees, read-only, as /files.
            env: variables beside the image's own.
        """
        self._buildah = buildah
        self.config: dict[str, Any] = buildah.config(image)
        self._name = buildah("from", "--pull-never", image)
        root = Path(buildah("mount", self._name))
        (root / "files").mkdir(exist_ok=True)
        self._environment = [*self.config["Env"], *(f"{name}={value}" for name, value in env.items())]
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _ENTER, "enter"]
        command = [*self.config["Entrypoint"], *arguments]
        self.log = files.with_name(f"{files.name}.log")
        with self.log.open("w") as log:
            self._process = subprocess.Popen(  # noqa: S603
                [*unshare, root, files, self.config["User"], *self._with_environment(command)], stdout=log, stderr=log
            )

    def health(self) -> str | None:
        """Run the image's health check in the container; return what is wrong, None: nothing."""
        kind, *command = self.config["Healthcheck"]["Test"]
        if kind != "CMD":
            raise Failed(f"a health check of the kind {kind}")
        user, group = self.config["User"].split(":")
        nsenter = [
            "nsenter",
            "--target",
            str(self.pid),
            "--mount",
            "--pid",
            "--root",
            "--wd=/",
            "-S",
            user,
            "-G",
            group,
        ]
        done = subprocess.run(  # noqa: S603
            [*nsenter, *self._with_environment(command)], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr if done.returncode else None

    def wait_until_healthy(self, seconds: float) -> None:
        """Ask for health until it is there.

        Raises:
            Failed: the container ended, or the time is over.
        """
        deadline = time.monotonic() + seconds
        while True:
            if self._process.poll() is not None:
                raise Failed(f"the container ended with {self._process.returncode}:\n{self.log.read_text()[-4000:]}")
            wrong = self.health() if self.pid else "not started"
            if wrong is None:
                return
            if time.monotonic() > deadline:
                raise Failed(f"not healthy after {seconds} seconds: {wrong}\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)

    @property
    def pid(self) -> int | None:
        """The number of its first process, outside."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def privileges(self) -> dict[str, str]:
        """Return what the kernel says of its first process: user, capabilities, new privileges, the root's mount."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        mounts = [line.split() for line in Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()]
        root = next(fields for fields in reversed(mounts) if fields[4] == "/")
        return {
            "users": " ".join(sorted({*status["Uid"].split(), *status["Gid"].split()})),
            "capabilities": status["CapEff"].strip("0"),
            "no new privileges": status["NoNewPrivs"],
            "root": root[_READ_ONLY].split(",")[0],
        }

    def stop(self) -> int:
        """Send SIGTERM to its first process, wait, and return the exit code."""
        if self._process.poll() is None and self.pid:
            subprocess.run(["kill", "-TERM", str(self.pid)], check=True)  # noqa: S603, S607
        return self._process.wait(timeout=60)

    def close(self) -> None:
        """End what is left of it, and delete it."""
        self._process.kill()
        self._process.wait()
        self._buildah("umount", self._name)
        self._buildah("rm", self._name)

    def _with_environment(self, command: list[str]) -> list[str]:
        return ["/usr/bin/env", "-i", *self._environment, *command]
