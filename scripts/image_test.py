"""Builds the image with buildah, runs it as a cluster would, and measures what small changes cost (`make image-test`).

Needs root, and buildah, debootstrap and util-linux from Debian; no container engine and no registry. Variables:

- BASE: a base image that buildah can pull. Without it debootstrap makes one.
- PIP_FIND_LINKS: a folder or page with torch's wheel for the CPU. Without it pip's index decides, whose wheel may bring
  gigabytes of CUDA.
- STORAGE_DRIVER: vfs, where overlay file systems cannot be mounted.

It writes to build/image-test, where the base, the wheels and the layers stay for the next time, and prints what it
measured. The first build takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import urllib.request
from importlib import metadata
from pathlib import Path

import numpy as np
import sbom
import trustme
from image_buildah import Buildah, Failed, copy_context, download_wheels, make_base, run
from image_container import Container
from packaging.utils import canonicalize_name

import vqserve
from vqserve_client import Client, Tls
from vqserve_server import Tokenizer

_ROOT = Path(__file__).resolve().parents[1]
_FOLDER = _ROOT / "build" / "image-test"
_DEMO = _ROOT / "server" / "vqserve_server" / "assets" / "demo.safetensors"
_START_SECONDS = 300.0
_METRIC_SECONDS = 30.0


def main() -> int:
    """Run all parts; return the exit code."""
    for program in ("buildah", "debootstrap", "unshare", "setpriv"):
        if shutil.which(program) is None:
            print(f"{program} is missing: apt-get install buildah debootstrap util-linux", file=sys.stderr)
            return 2
    _FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            buildah, base = _builds(Path(scratch))
            _has_what_it_needs(buildah, base, Path(scratch))
            _serves(buildah, Path(scratch))
    except (Failed, AssertionError) as error:
        print(error, file=sys.stderr)
        return 1
    print("image-test: 1 passed, 0 failed")
    return 0


def _builds(scratch: Path) -> tuple[Buildah, str]:
    """Build again and again, and print the seconds, the bytes to push and the layers; return where, and the base."""
    context, wheels, registry = scratch / "context", _FOLDER / "wheels", scratch / "registry"
    copy_context(_ROOT, context)
    download_wheels(context, wheels)
    buildah = Buildah(_FOLDER / "storage")
    base = os.environ.get("BASE", "localhost/vqserve-base")
    if base.startswith("localhost/") and not buildah.has("vqserve-base"):
        make_base(buildah, "vqserve-base")
    print(f"{'build':36}{'seconds':>9}{'bytes to push':>15}  layers")
    layers: dict[str, list[str]] = {}

    def build(what: str, image: str, builder: Buildah) -> None:
        seconds = builder.build(context, image, base=base, wheels=wheels)
        layers[image] = builder.layers(image)
        pushed = builder.push(image, registry)
        short = " ".join(digest.removeprefix("sha256:")[:8] for digest in layers[image])
        print(f"{what:36}{seconds:9.1f}{pushed:15,}  {short}", flush=True)

    build("from an empty or a full cache", "vqserve", buildah)
    build("nothing changed", "vqserve-same", buildah)
    _replace(context / "server/vqserve_server/app.py", r"\Z", "# One more line.\n")
    build("a line of Python", "vqserve-python", buildah)
    _replace(context / "constraints.txt", r"(?m)^typos==.*$", "typos==1.0.0")
    build("a tool's pin", "vqserve-tool", buildah)
    _replace(context / "pyproject.toml", r'"typos>=[\d.]+"', '"typos>=1.0.0"')
    build("a tool's requirement", "vqserve-requirement", buildah)
    assert layers["vqserve"] == layers["vqserve-same"]
    for image in ("vqserve-python", "vqserve-tool", "vqserve-requirement"):
        assert layers[image][:-1] == layers["vqserve"][:-1], f"{image} has another layer than its last"
    assert layers["vqserve-python"] == layers["vqserve-tool"], "a tool's pin changed the image"
    other = Buildah(scratch / "storage")
    try:
        if base.startswith("localhost/"):
            buildah.copy_to(other, base)
        build("the same without any cache", "vqserve-requirement", other)
    finally:
        other.remove()
    return buildah, base


def _has_what_it_needs(buildah: Buildah, base: str, scratch: Path) -> None:
    """Look for files that the build left behind, and for packages that the bill of materials does not list."""
    with buildah.mounted(base) as root:
        before = {path: _stamp(path, root) for path in _files(root)}
    with buildah.mounted("vqserve") as root:
        after = {path: _stamp(path, root) for path in _files(root)}
        [packages] = root.glob("opt/vqserve/lib/python3*/site-packages")
        installed = {canonicalize_name(one.name): one.version for one in metadata.distributions(path=[str(packages)])}
        kernels = packages / "vqserve_server/search/cuda/compiled/index.json"
        assert kernels.exists(), "the image has no kernels for GPUs"
        times = [path for path in _files(packages) if path.suffix == ".pyc" and not _has_hash(packages / path)]
    assert "triton" not in installed
    changed = {path for path in after if after[path] != before.get(path)}
    others = {str(path) for path in changed if path.parts[:2] != ("opt", "vqserve")}
    assert others == {"etc/group", "etc/passwd"}, f"beside the environment the build left {sorted(others)}"
    assert not before.keys() - after.keys()
    assert not times, f"compiled files with times: {times[:3]}"
    sbom.main(scratch / "sbom.json")
    listed = json.loads((scratch / "sbom.json").read_text())["components"]
    bill = {canonicalize_name(one["name"]): one["version"] for one in listed}
    assert installed == bill | {"vqserve": vqserve.__version__}, "the bill of materials differs from the image"


def _serves(buildah: Buildah, scratch: Path) -> None:
    """Run the image and use it from outside."""
    files = scratch / "files"
    (files / "books").mkdir(parents=True)
    shutil.copy2(_DEMO, files / "books" / "demo.safetensors")
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(scratch / "ca.pem")
    certificate.private_key_pem.write_to_path(files / "tls.key")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(files / "tls.crt", append=True)
    secret = run(sys.executable, "-m", "vqserve_tools", "token", "tester", "--file", files / "tokens.toml").strip()
    for path in (files, *files.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    port, health, metrics = _free_ports(3)
    arguments = ["serve", "/files/books", "--host", "0.0.0.0", "--port", str(port), "--health-port", str(health)]  # noqa: S104
    arguments += ["--tls-cert", "/files/tls.crt", "--tls-key", "/files/tls.key", "--tokens", "/files/tokens.toml"]
    arguments += ["--metrics-port", str(metrics)]
    container = Container(buildah, "vqserve", arguments, files, {"VQSERVE_TARGET": f"localhost:{health}"})
    try:
        container.wait_until_healthy(_START_SECONDS)
        found = container.privileges()
        assert found == {"users": "10001", "capabilities": "", "no new privileges": "1", "root": "ro"}, found
        latents = np.random.default_rng(0).normal(size=(1, 16, 8, 8)).astype(np.float32)
        local = Tokenizer.load(_DEMO, device="cpu")
        with Client(f"localhost:{port}", tls=Tls(ca=str(scratch / "ca.pem")), token=secret) as client:
            tokens = client.encode(latents)
            decoded = client.decode(tokens)
        assert np.array_equal(tokens, local.encode(latents)), "the image gives other tokens than this checkout"
        assert np.array_equal(decoded, local.decode(tokens)), "the image decodes to other latents than this checkout"
        for operation in ("encode", "decode"):
            _wait_for_metric(
                metrics, f'vqserve_requests_total{{codebook="demo",operation="{operation}",status="OK"}} 1.0'
            )
        code = container.stop()
        assert code == 0, f"exit code {code} after SIGTERM:\n{container.log.read_text()[-2000:]}"
    finally:
        container.close()
    print("served as 10001 without capabilities on a read-only root: health check, encode and decode over TLS with a")
    print("token, the tokens of this checkout, metrics, exit code 0 after SIGTERM")


def _wait_for_metric(port: int, line: str) -> None:
    """Scrape the metrics until they have a line: a request is counted after its reply."""
    deadline = time.monotonic() + _METRIC_SECONDS
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            scraped = reply.read().decode()
        if line in scraped.splitlines():
            return
        assert time.monotonic() < deadline, f"no {line} in the metrics:\n{scraped}"
        time.sleep(0.1)


def _files(root: Path) -> list[Path]:
    return [Path(folder, name).relative_to(root) for folder, _, names in os.walk(root) for name in names]


def _stamp(path: Path, root: Path) -> tuple[int, int]:
    status = (root / path).lstat()
    return status.st_mode, status.st_size


def _has_hash(path: Path) -> bool:
    # After the magic number a .pyc file has flags: the lowest bit says that a hash follows, not a time.
    return bool(path.read_bytes()[4] & 1)


def _replace(path: Path, pattern: str, text: str) -> None:
    changed, count = re.subn(pattern, text, path.read_text(), count=1)
    assert count, f"{path} has no {pattern}"
    path.write_text(changed)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())
