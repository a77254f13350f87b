"""What TLS costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial

import grpc

from reliability.beside import Control
from reliability.figure import Figure
from reliability.messages import CHEAP, ENCODE, channel_options, encode_request
from reliability.registry import scenario
from reliability.server import within
from reliability.setup import Setup

_CALLERS = 32
_ROUNDS = 3
_ROWS = {"64 rows": 64, "16384 rows": 16384}


@scenario("tls-cost", "requests per second with TLS, as a part of those without", seconds=4)
def tls_cost(setup: Setup) -> Iterator[Figure]:
    if not setup.knows("--tls-cert"):
        yield Figure(what="the server", value="has no TLS", wanted="has TLS")
        return
    from support.certificates import Authority, Folder

    authority, folder = Authority(), Folder(setup.scratch)
    folder.put(authority.issue("127.0.0.1"))
    plain = setup.server()
    secret = setup.server("--tls-cert", folder.cert, "--tls-key", folder.key)
    ways: dict[str, tuple[str, bytes | None]] = {
        "plain": (plain.target, None),
        "TLS": (secret.target, authority.pem),
    }
    for name, rows in _ROWS.items():
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(_ROUNDS):
            for way, (target, ca) in ways.items():
                load = setup.beside(call_in_a_loop, target, ca, rows)
                for _ in within(setup.seconds):
                    pass
                rates[way].append(load.result())
        plain_rate, secret_rate = (sorted(rates[way])[_ROUNDS // 2] for way in ways)
        yield Figure(what=f"{name}: requests/s without TLS", value=plain_rate)
        yield Figure(what=f"{name}: requests/s with TLS", value=secret_rate)
        yield Figure(what=f"{name}: with TLS, as a part", value=secret_rate / plain_rate)


def call_in_a_loop(control: Control, target: str, ca: bytes | None, rows: int) -> float:
    """Call with many callers, each in a loop, over one connection; return the calls per second."""
    return asyncio.run(_call(control, target, ca, rows))


async def _call(control: Control, target: str, ca: bytes | None, rows: int) -> float:
    open_it = grpc.aio.insecure_channel
    if ca is not None:
        open_it = partial(grpc.aio.secure_channel, credentials=grpc.ssl_channel_credentials(ca))
    request, count = encode_request(rows, CHEAP), 0
    async with open_it(target, options=channel_options()) as channel:
        method = channel.unary_unary(ENCODE)
        await method(request)

        async def caller() -> None:
            nonlocal count
            while not control.ended:
                await method(request)
                count += 1

        control.begin()
        began = time.monotonic()
        await asyncio.gather(*(caller() for _ in range(_CALLERS)))
    return count / (time.monotonic() - began)
