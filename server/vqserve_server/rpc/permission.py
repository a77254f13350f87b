"""What an access token grants to its caller, looked up for each request: the file of tokens may have changed.

Callers without a token do not come here.
"""

from __future__ import annotations

from vqserve.errors import Overloaded
from vqserve_server.access import Codebooks, Token
from vqserve_server.engine import Caller, CallerLimits, Engine


def granted(caller: Caller, token: Token, limits: CallerLimits) -> Codebooks | None:
    """Return the codebooks that a caller may use now, and set its limits.

    Args:
        caller: who asks.
        token: its token.
        limits: where the token has none of its own.

    Returns:
        The codebooks; None: all.

    Raises:
        Unauthenticated: the token was revoked or has expired.
    """
    grant = token.check()
    if grant is not caller.grant:
        caller.grant = grant
        caller.limits = CallerLimits(
            requests=grant.max_requests or limits.requests, rows=limits.rows, bytes=grant.max_bytes or limits.bytes
        )
    return grant.codebooks


def enter_at_rate(engine: Engine, caller: Caller, token: Token, rows: int, nbytes: int) -> None:
    """Enter the admission of an engine if the token's rate allows it.

    Raises:
        Overloaded, Draining, DeviceBroken: the request was not accepted, and costs the token no rows.
    """
    rate = token.rate
    if rate is None:
        engine.admission.enter(caller, rows, nbytes)
        return
    try:
        rate.take(rows)
    except Overloaded:
        engine.stats.count_refused("caller_rate")
        raise
    try:
        engine.admission.enter(caller, rows, nbytes)
    except BaseException:
        rate.give_back(rows)
        raise
