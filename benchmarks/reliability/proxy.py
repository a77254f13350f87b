"""A proxy in the environment is for other machines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

from reliability.figure import Figure
from reliability.registry import scenario
from reliability.setup import Setup

# Nothing listens there.
_PROXY = "http://127.0.0.1:9"


@scenario("proxy", "with http_proxy set, `vqserve status` reaches this machine", seconds=10)
def proxy(setup: Setup) -> Iterator[Figure]:
    path = setup.scratch / "proxy.sock"
    server = setup.server("--unix-socket", path)
    port = server.target.rpartition(":")[2]
    variables = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), _PROXY)
    environment = {**{k: v for k, v in os.environ.items() if k not in {"no_proxy", "no_grpc_proxy"}}, **variables}
    for target in (f"127.0.0.1:{port}", f"localhost:{port}", f"unix:{path}"):
        command = [sys.executable, "-m", "vqserve_client", "status", "--target", target]
        command += ["--timeout", f"{setup.seconds:g}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        last = (done.stdout or done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        shown = "SERVING" if done.returncode == 0 else last[-1].removeprefix("vqserve: error: ")[:60]
        yield Figure(what=f"vqserve status of {target.partition(':')[0]}", value=shown, wanted="SERVING")
