"""A closed loop over HTTP/1.1: keep-alive connections that send one prepared request again and again."""

from __future__ import annotations

import asyncio
import time


def measure_http(port: int, body: bytes, concurrency: int, seconds: float, *, path: str = "/inference") -> float:
    """Return the requests per second of `concurrency` callers; a reply other than 200 is an error."""
    return asyncio.run(_measure(port, body, concurrency, seconds, path))


async def _measure(port: int, body: bytes, concurrency: int, seconds: float, path: str) -> float:
    request = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    started = time.perf_counter()
    counts = await asyncio.gather(*(_call(port, request, started + seconds) for _ in range(concurrency)))
    return sum(counts) / (time.perf_counter() - started)


async def _call(port: int, request: bytes, ends: float) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
    done = 0
    while time.perf_counter() < ends:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(f"the peer answered {head[:80]!r}")
        await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
        done += 1
    writer.close()
    return done
