"""All of a client but the waiting: its calls are generators of steps (see requests.py)."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from vqserve.codebook_info import CodebookInfo
from vqserve.errors import CodebookNotFound, DigestMismatch, InvalidArgument, VqserveError
from vqserve_client.arrays import ArrayInput, indices_input, joined, latents_input
from vqserve_client.calls import ArrayCall
from vqserve_client.catalogue import Catalogue, ListRequest, Pin, WrongDigest
from vqserve_client.config import DEFAULT_MAX_MESSAGE_BYTES, CallOptions, ClientConfig, client_config
from vqserve_client.forms import DecodeForm, EncodeForm, Form
from vqserve_client.pool import Pool
from vqserve_client.requests import Deadline, Exchange, Steps, Window
from vqserve_client.retries import RetryPolicy
from vqserve_client.server_info import ServerInfo
from vqserve_client.tls import Tls
from vqserve_client.tracing import TRACING, Span
from vqserve_client.transport import Sender

Wake = Callable[[], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operation:
    """Encode or decode: how the caller's array is read, and the class of its requests' form."""

    read: Callable[[object], ArrayInput]
    form: type[Form]


ENCODE = Operation(latents_input, EncodeForm)
DECODE = Operation(indices_input, DecodeForm)
# Forms that are remembered.
_MOST_FORMS = 256


class Core:
    """One client's configuration, connections and cached list of codebooks."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self.pool = Pool(config)
        self._policy = RetryPolicy(config.retries)
        # Replaced as a whole, so that threads need no lock for it.
        self._catalogue: Catalogue | None = None

    def pin(self, options: CallOptions) -> Pin:
        """Return the pin of one call.

        The client's digest belongs to the client's codebook: a call that names another codebook is not checked by it.
        """
        config = self.config
        own_digest = config.digest if options.codebook in {None, config.codebook} else None
        return Pin(options.codebook or config.codebook, options.digest or own_digest, target=config.target)

    def deadline(self, options: CallOptions) -> Deadline:
        """Return the end of a call that begins now."""
        return Deadline(self.config.timeout if options.timeout is None else options.timeout)

    def codebooks(self, options: CallOptions, sender: Sender) -> Steps[list[CodebookInfo]]:
        """Request the list of codebooks."""
        return list((yield from self._ask(options, sender)).catalogue.codebooks)

    def server_info(self, options: CallOptions, sender: Sender) -> Steps[ServerInfo | None]:
        """Request what the server says about itself."""
        return (yield from self._ask(options, sender)).server

    def _ask(self, options: CallOptions, sender: Sender) -> Steps[ListRequest]:
        exchange = Exchange(
            self.pool,
            policy=self._policy,
            deadline=self.deadline(options),
            window=Window(1),
            sender=sender,
        )
        return (yield from self._list(exchange))

    def convert_one(self, operation: Operation, array: object, options: CallOptions, sender: Sender) -> Steps[Any]:
        """Encode or decode one array, by calls of its own."""
        source = operation.read(array)
        results = yield from self.convert(
            operation,
            [source if options.batched else source.with_batch_axis()],
            options,
            pin=self.pin(options),
            deadline=self.deadline(options),
            window=Window(self.pool.window),
            sender=sender,
        )
        return results[0]

    def convert(
        self,
        operation: Operation,
        inputs: Sequence[ArrayInput],
        options: CallOptions,
        *,
        pin: Pin,
        deadline: Deadline,
        window: Window,
        sender: Sender,
    ) -> Steps[list[Any]]:
        """Encode or decode arrays that join, as one."""
        source = inputs[0] if len(inputs) == 1 else joined(inputs)
        # A process that does not trace pays for no call here.
        span = Span(operation.form.method, self.config.target) if TRACING in sys.modules else None
        exchange = Exchange(
            self.pool,
            policy=self._policy,
            deadline=deadline,
            window=window,
            sender=sender,
            trace=() if span is None else span.metadata,
        )
        try:
            while True:
                info = pin.info or pin.choose_remembered(self._catalogue)
                if info is None:
                    info = yield from self._choose(pin, exchange)
                try:
                    call = ArrayCall(source, self.form(operation, source, info, options), pin)
                except InvalidArgument:
                    # The array may fit the codebook that the server has now.
                    if not pin.may_be_outdated():
                        raise
                    continue
                try:
                    yield from exchange.run(call.requests(), info.name, info.digest)
                except (WrongDigest, DigestMismatch, CodebookNotFound) as error:
                    pin.reconsider(info, error)
                else:
                    results = call.results(inputs)
                    break
        except BaseException as error:
            if span is not None:
                span.fail(error)
            raise
        if span is not None:
            span.end(codebook=info.name, digest=info.digest, arrays=len(inputs), requests=exchange.sent)
        return results

    def form(self, operation: Operation, source: ArrayInput, info: CodebookInfo, options: CallOptions) -> Form:
        """Return the form of an array's requests, made once for arrays of one shape and type.

        Raises:
            InvalidArgument: the array does not fit the codebook.
        """
        catalogue = self._catalogue
        forms: dict[tuple[object, ...], Form] = {} if catalogue is None else catalogue.forms
        # A form has its codebook: while it is remembered, no other object has the same id.
        key = (operation.form, id(info), options, source.array.shape, source.dtype, source.device is None)
        form = forms.get(key)
        if form is None:
            form = operation.form(source, info, options, config=self.config)
            if form.is_clear(source):
                if len(forms) >= _MOST_FORMS:
                    forms.clear()
                forms[key] = form
        return form

    def _choose(self, pin: Pin, exchange: Exchange) -> Steps[CodebookInfo]:
        """Pin a codebook of the servers' lists: the first list that has one decides."""
        asked: set[str] = set()
        while True:
            request = yield from self._list(exchange, asked)
            try:
                return pin.choose(request.catalogue)
            except (CodebookNotFound, DigestMismatch):
                if request.connection is not None:
                    asked.add(request.connection.address.uri)
                if not self.pool.has_other(asked):
                    raise

    def _list(self, exchange: Exchange, asked: Collection[str] = ()) -> Steps[ListRequest]:
        request = ListRequest(self.config.target)
        request.avoid = asked
        yield from exchange.run(iter((request,)), None)
        self._catalogue = request.catalogue
        if request.connection is not None:
            self.pool.has_codebooks(request.connection, [info.digest for info in request.catalogue.codebooks])
        return request


class ClientBase:
    """Base of both clients."""

    def __init__(
        self,
        target: str | Sequence[str] = "localhost:50051",
        *,
        codebook: str | None = None,
        digest: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        window: int = 4,
        connections: int = 1,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        tls: bool | Tls | None = None,
        token: str | None = None,
        token_file: str | PathLike[str] | None = None,
        metadata: Mapping[str, str | bytes] | None = None,
        insecure: bool = False,
    ) -> None:
        self._core = Core(
            client_config(
                target,
                codebook=codebook,
                digest=digest,
                timeout=timeout,
                retries=retries,
                window=window,
                connections=connections,
                max_message_bytes=max_message_bytes,
                tls=tls,
                token=token,
                token_file=token_file,
                metadata=metadata,
                insecure=insecure,
            )
        )

    @property
    def target(self) -> str:
        """The server's address, or those of several servers with commas between them."""
        return self._core.config.target

    def __repr__(self) -> str:
        config = self._core.config
        named = "".join(
            f", {key}={value!r}"
            for key, value in (("codebook", config.codebook), ("digest", config.digest))
            if value is not None
        )
        closed = ", closed" if self._core.pool.closed else ""
        return f"{type(self).__name__}({config.target!r}{named}, timeout={config.timeout:g}{closed})"

    def __getstate__(self) -> ClientConfig:
        return self._core.config

    def __setstate__(self, config: ClientConfig) -> None:
        self._core = Core(config)


def without_frames(error: VqserveError) -> VqserveError:
    """Return an error of this package without its frames and without the errors behind it: its traceback is short.

    Raise it outside the block that caught it. Python then sets its context to the error that the caller handles, if
    there is one. The whole traceback is logged at debug level. VQSERVE_TRACEBACK=full leaves the error as it is.
    """
    logger.debug("a call failed", exc_info=error)
    if os.environ.get("VQSERVE_TRACEBACK") == "full":
        return error
    error.__cause__ = error.__context__ = None
    error.__suppress_context__ = False
    return error.with_traceback(None)
