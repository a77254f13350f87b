"""Old clients, old servers and old pickles with this tree: `make test-old OLD=COMMIT`.

The sources of the old commit run in this environment. Each server answers each SDK; every pair must give the same
tokens, latents and kinds of error. A Tokenizer that the old code pickled must give the same tokens here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Runs with either SDK; prints results that must be the same for every pair of client and server.
SDK = r"""
import hashlib, re, sys
import numpy as np
from vqserve_client import Client

def seen(array):
    return array.dtype, array.shape, hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:16]

def error(call):
    try:
        call()
    except Exception as raised:
        bases = (ValueError, LookupError, TimeoutError, ConnectionError)
        position = re.match(r"\w+\[[0-9, ]+\]", str(raised))
        return [base.__name__ for base in bases if isinstance(raised, base)], position and position[0]
    return None

with Client(sys.argv[1]) as client:
    info = client.codebooks()[0]
    latents = np.random.default_rng(0).standard_normal((3, info.input_dim, 8, 9)).astype(np.float32)
    indices = client.encode(latents)
    print(info.digest, seen(indices))
    print(seen(client.encode(latents.astype(np.float16))), seen(client.encode(latents.astype(np.float64))))
    print(*(seen(client.decode(indices, dtype=dtype)) for dtype in ("float32", "float16", "float64")))
    print(seen(client.decode(indices, output="code_rows")), seen(client.encode(latents, digest=info.digest)))
    print(*map(seen, client.encode_many([latents[:1], latents[1:], latents])))
    latents[1, 2, 3, 4] = np.nan
    for call in (
        lambda: client.encode(latents),
        lambda: list(client.encode_many([latents[:1], latents])),
        lambda: client.encode(latents[:, :3]),
        lambda: client.decode(np.full((2, 3), 1 << 20)),
        lambda: client.encode(latents, codebook="missing"),
        lambda: client.encode(latents, digest="0" * 64),
    ):
        print(error(call))
"""
PICKLE = """
import pickle, sys
from vqserve_server import Tokenizer
sys.stdout.buffer.write(pickle.dumps(Tokenizer.load(sys.argv[1], device="cpu")))
"""
UNPICKLE = """
import pickle, sys
import numpy as np
from vqserve_server import Tokenizer
old, new = pickle.load(sys.stdin.buffer), Tokenizer.load(sys.argv[1], device="cpu")
latents = np.random.default_rng(0).standard_normal((500, new.info.input_dim)).astype(np.float32)
assert (old.encode(latents) == new.encode(latents)).all()
"""


def main() -> int:
    """Compare this tree with an old commit; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", help="a commit of this repository")
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder), ROOT
        _extract(parser.parse_args().commit, old)
        said = {}
        for server in (old, new):
            with _serving(server) as target:
                for client in (old, new):
                    said[server, client] = _run(client, SDK, target).decode()
        for (server, client), text in said.items():
            same = text == said[old, old]
            names = ("old" if tree == old else "new" for tree in (server, client))
            print("{} server, {} SDK: {}".format(*names, "the same" if same else f"differs:\n{text}"))
        demo = str(new / "server/vqserve_server/assets/demo.safetensors")
        _run(new, UNPICKLE, demo, stdin=_run(old, PICKLE, demo))
        print("a Tokenizer that the old code pickled: the same tokens")
    return int(len(set(said.values())) > 1)


def _extract(commit: str, folder: Path) -> None:
    archive = folder / "old.tar"
    subprocess.run(["git", "archive", "-o", str(archive), commit, "proto", "server", "client"], cwd=ROOT, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(tree / part) for part in ("proto", "server", "client"))}


def _run(tree: Path, code: str, *arguments: str, stdin: bytes = b"") -> bytes:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, input=stdin, env=_environment(tree), stdout=subprocess.PIPE, check=True).stdout


@contextmanager
def _serving(tree: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "vqserve_server", "serve", "--port", "0", "--log-level", "error"]
    with subprocess.Popen(command, env=_environment(tree), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().partition(" on ")[2].partition(",")[0]
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
