"""What a server holds for streams of large messages, and what it keeps."""

from __future__ import annotations

from collections.abc import Iterator

from reliability import loads
from reliability.figure import Figure
from reliability.messages import CHEAP, MIB
from reliability.registry import scenario
from reliability.server import within
from reliability.setup import Setup

_STREAMS, _BYTES = 32, 16 * MIB
_QUEUES_MIB = (1024, 256)
# What the server has anyway, and what gRPC and the allocator add to the queue.
_ANYWAY_MIB, _TIMES = 512, 3
_KEPT_MIB = 512


@scenario("streams-memory", "streams take what --max-queue-bytes allows, and it is given back", seconds=15)
def streams_memory(setup: Setup) -> Iterator[Figure]:
    for queue_mib in _QUEUES_MIB:
        case = f"queue {queue_mib} MiB"
        if not setup.wants(case):
            continue
        server = setup.server("--max-queue-bytes", queue_mib * MIB)
        before = server.resident_mib()
        greedy = setup.beside(loads.greedy_streams, server.target, _STREAMS, _BYTES, CHEAP)
        for _ in within(setup.seconds):
            pass
        most = _ANYWAY_MIB + _TIMES * queue_mib
        yield Figure(what=f"{case}: resident before, MiB", value=before)
        yield Figure(what=f"{case}: peak, MiB", value=server.peak_mib(), at_most=most)
        yield Figure(what=f"{case}: what came of the requests", value=loads.text(greedy.result()))
        for _ in within(setup.seconds):
            pass
        kept = server.resident_mib() - before
        yield Figure(what=f"{case}: kept {setup.seconds:g} s later, MiB", value=kept, at_most=_KEPT_MIB)
        server.kill()
