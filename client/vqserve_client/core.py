"""What a client does, as steps (see exchange.py): all of it but the waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vqserve.codebook_info import CodebookInfo
from vqserve_client.arrays import Given, given_indices, given_latents, joined
from vqserve_client.calls import ArrayCall, DecodeCall, EncodeCall, Options
from vqserve_client.catalogue import ListPart, Pin, WrongDigest
from vqserve_client.channel import Connection
from vqserve_client.config import ClientConfig, check_digest, check_name, check_timeout
from vqserve_client.errors import CodebookNotFound, DigestMismatch, InvalidArgument
from vqserve_client.requests import Budget, Deadline, Exchange, RetryPolicy, Steps
from vqserve_client.transport import Sender, Unary

Wake = Callable[[], None]


@dataclass(frozen=True)
class Operation:
    """Encode or decode: how the caller's array is read, and what becomes of it."""

    read: Callable[[object], Given]
    call: type[ArrayCall]


ENCODE = Operation(given_latents, EncodeCall)
DECODE = Operation(given_indices, DecodeCall)


@dataclass(frozen=True)
class CallOptions:
    """What may be said on every call, checked; None: the client's own."""

    codebook: str | None = None
    digest: str | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        check_name("codebook", self.codebook)
        check_digest(self.digest)
        if self.timeout is not None:
            check_timeout(self.timeout)


class Core:
    """One client's configuration, connection and memory of what is served."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self.connection = Connection(config)
        # Replaced as a whole, so that threads need no lock for it.
        self._catalogue: tuple[CodebookInfo, ...] | None = None

    def described(self, kind: str) -> str:
        """Return the client's repr."""
        named = "".join(
            f", {key}={value!r}"
            for key, value in (("codebook", self.config.codebook), ("digest", self.config.digest))
            if value is not None
        )
        closed = ", closed" if self.connection.closed else ""
        return f"{kind}({self.config.target!r}{named}, timeout={self.config.timeout:g}{closed})"

    def pin(self, call: CallOptions) -> Pin:
        """Return the pin of one call.

        The client's digest belongs to the client's codebook: a call that names another is not held to it.
        """
        own_digest = self.config.digest if call.codebook in {None, self.config.codebook} else None
        return Pin(call.codebook or self.config.codebook, call.digest or own_digest, target=self.config.target)

    def deadline(self, call: CallOptions) -> Deadline:
        """Return the end of a call that begins now."""
        return Deadline(self.config.timeout if call.timeout is None else call.timeout)

    def exchange(self, deadline: Deadline, budget: Budget, sender: Sender) -> Exchange:
        """Return what the requests of one call have in common."""
        policy = RetryPolicy(self.config.retries)
        return Exchange(self.connection, policy=policy, deadline=deadline, budget=budget, sender=sender)

    def unary(self, wake: Wake) -> Sender:
        """Return what sends requests as calls of their own."""
        return Unary(self.connection, wake)

    def codebooks(self, call: CallOptions, wake: Wake) -> Steps[list[CodebookInfo]]:
        """Ask what is served."""
        return list((yield from self._listed(self.exchange(self.deadline(call), Budget(1), self.unary(wake)))))

    def turn_one(
        self, operation: Operation, array: object, asked: Options, call: CallOptions, wake: Wake
    ) -> Steps[Any]:
        """Encode or decode one array, by calls of its own."""
        answers = yield from self.turn(
            operation,
            [operation.read(array)],
            asked,
            pin=self.pin(call),
            deadline=self.deadline(call),
            budget=Budget(self.config.window),
            sender=self.unary(wake),
        )
        return answers[0]

    def turn(
        self,
        operation: Operation,
        givens: Sequence[Given],
        asked: Options,
        *,
        pin: Pin,
        deadline: Deadline,
        budget: Budget,
        sender: Sender,
    ) -> Steps[list[Any]]:
        """Encode or decode arrays that join, as one."""
        given = joined(givens)
        exchange = self.exchange(deadline, budget, sender)
        while True:
            info = yield from self._resolved(pin, exchange)
            try:
                call = operation.call(given, info, asked, pin=pin, config=self.config)
            except InvalidArgument:
                # Perhaps it fits the codebook that the server has by now.
                if not pin.doubt():
                    raise
                continue
            try:
                yield from exchange.run(call.parts(), info.name)
            except (WrongDigest, DigestMismatch, CodebookNotFound) as error:
                pin.reconsider(info, error)
            else:
                return call.results(givens)

    def _listed(self, exchange: Exchange) -> Steps[tuple[CodebookInfo, ...]]:
        part = ListPart(self.config.target)
        yield from exchange.run(iter((part,)), None)
        self._catalogue = part.codebooks
        return part.codebooks

    def _resolved(self, pin: Pin, exchange: Exchange) -> Steps[CodebookInfo]:
        """Return the pin's codebook, from memory if it is there and fits."""
        if pin.info is not None:
            return pin.info
        if self._catalogue is not None and not pin.refreshed:
            try:
                return pin.choose(self._catalogue, remembered=True)
            except (CodebookNotFound, DigestMismatch):
                pin.refresh()
        return pin.choose((yield from self._listed(exchange)))
