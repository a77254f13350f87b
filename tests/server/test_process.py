"""The limit of open files, in a process of its own, since no process may raise what it lowered."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import logging, resource, sys
from vqserve_server.process import allow_connections
logging.basicConfig(stream=sys.stdout, format="%(message)s")
soft, hard, connections = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
allow_connections(connections)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "expected"),
    [(300, 1000, 500, 756), (900, 1000, 500, 900), (300, 400, 500, 400)],
    ids=["is raised", "suffices", "is raised as far as it goes"],
)
def test_there_is_room_for_connections(soft: int, hard: int, connections: int, expected: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(soft), str(hard), str(connections)]
    *log, got = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert int(got) == expected
    assert [line.split()[0] for line in log] == (["open_files_limited"] if expected < connections else [])
