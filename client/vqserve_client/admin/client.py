"""The calls of AdminService, and what each process of a server answers to them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self

import grpc

from vqserve.errors import VqserveError
from vqserve.text import printable
from vqserve.v1 import admin_pb2 as pb
from vqserve.v1 import admin_pb2_grpc
from vqserve_client.channel import Connection, gate
from vqserve_client.config import client_config
from vqserve_client.server_info import ServerInfo
from vqserve_client.status import Failure, text_metadata
from vqserve_client.tls import Tls

LogLevel = Literal["debug", "info", "warning", "error"]
_LONGEST_TEXT = 2000
_Stub: Any = admin_pb2_grpc.AdminServiceStub


@dataclass(frozen=True, kw_only=True)
class LiveCodebook:
    """One name that a server serves.

    Attributes:
        name: name in requests.
        digest: of the codebook.
        version: that the name means; None: the codebook has no versions.
    """

    name: str
    digest: str
    version: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """What one process of a server did.

    Attributes:
        worker: number of the process, from 0.
        error: why it did nothing; the other fields then mean nothing. None: it did.
    """

    worker: int
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class WorkerStatus(_Worker):
    """The state of one process of a server.

    Attributes:
        worker: number of the process, from 0.
        error: why it did not answer; the other fields then mean nothing. None: it did.
        pid: its process id, where it runs.
        server: version, uptime and load; None: it did not answer.
        log_level: of its log.
        codebooks: what it serves.
    """

    pid: int = 0
    server: ServerInfo | None = None
    log_level: str = ""
    codebooks: tuple[LiveCodebook, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WorkerReload(_Worker):
    """What a reload did in one process of a server.

    Attributes:
        worker: number of the process, from 0.
        error: why it did not reload; the other fields then mean nothing. None: it did.
        loaded: codebooks that are new or have changed.
        unchanged: codebooks that have not changed.
        removed: codebooks whose file is gone.
        rejected: files that cannot be used; what they replace is served still.
        skipped: files and folders that are no codebooks.
        problems: why files were rejected or skipped, and certificates or access tokens not used: the first hundred, and
            how many more there are.
        codebooks: what it serves now.
    """

    loaded: int = 0
    unchanged: int = 0
    removed: int = 0
    rejected: int = 0
    skipped: int = 0
    problems: tuple[str, ...] = ()
    codebooks: tuple[LiveCodebook, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WorkerLogLevel(_Worker):
    """What became of the log of one process of a server.

    Attributes:
        worker: number of the process, from 0.
        error: why the level did not change. None: it did.
        previous: the level before.
    """

    previous: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkerDrain(_Worker):
    """What one process of a server has left to do before it ends.

    Attributes:
        worker: number of the process, from 0.
        error: why it did not say. None: it did.
        requests: requests that it still has to answer.
        drain_seconds: that it may take for them.
    """

    requests: int = 0
    drain_seconds: float = 0.0


class AdminClient:
    """Operates one server. Its calls wait; in asyncio, use `asyncio.to_thread`.

    Nothing is tried again: a caller should know what happened. Each method returns one entry for each process of the
    server, by number.

    Args:
        target: HOST:PORT or unix:PATH, of one server: a name of several would reach any of them.
        timeout: seconds for a call; a reload takes as long as the codebooks take to load.
        tls: see Client.
        token: see Client; its entry on the server must have `admin = true`.
        token_file: see Client.
        insecure: see Client.

    Raises:
        TypeError: for an option of the wrong type.
        ValueError: for an option with an invalid value.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        timeout: float = 60.0,
        tls: bool | Tls | None = None,
        token: str | None = None,
        token_file: str | PathLike[str] | None = None,
        insecure: bool = False,
    ) -> None:
        config = client_config(target, timeout=timeout, tls=tls, token=token, token_file=token_file, insecure=insecure)
        self._timeout = config.timeout
        self._connection = Connection(config)

    def status(self) -> list[WorkerStatus]:
        """Return what each process serves, and how busy it is.

        Raises:
            VqserveError: see errors.py.
        """
        return [
            WorkerStatus(
                **_worker(entry),
                pid=entry.pid,
                server=ServerInfo.of(entry.server) if entry.HasField("server") else None,
                log_level=_shown(entry.log_level),
                codebooks=_codebooks(entry.codebooks),
            )
            for entry in self._call("Status", pb.StatusRequest()).workers
        ]

    def reload(self) -> list[WorkerReload]:
        """Load the codebooks, certificates and access tokens that have changed; return when all is done.

        Raises:
            VqserveError: see errors.py.
        """
        numbers = ("loaded", "unchanged", "removed", "rejected", "skipped")
        return [
            WorkerReload(
                **_worker(entry),
                **{name: getattr(entry, name) for name in numbers},
                problems=tuple(map(_shown, entry.problems)),
                codebooks=_codebooks(entry.codebooks),
            )
            for entry in self._call("Reload", pb.ReloadRequest()).workers
        ]

    def set_log_level(self, level: LogLevel) -> list[WorkerLogLevel]:
        """Change the level of the log until the server ends.

        Raises:
            VqserveError: see errors.py.
        """
        reply = self._call("SetLogLevel", pb.SetLogLevelRequest(level=level))
        return [WorkerLogLevel(**_worker(entry), previous=_shown(entry.previous)) for entry in reply.workers]

    def drain(self) -> list[WorkerDrain]:
        """Stop the server as SIGTERM does: it answers what it has accepted, and ends; return before that.

        Raises:
            VqserveError: see errors.py.
        """
        reply = self._call("Drain", pb.DrainRequest())
        return [
            WorkerDrain(**_worker(entry), requests=entry.requests, drain_seconds=entry.drain_seconds)
            for entry in reply.workers
        ]

    def close(self) -> None:
        """Close the connection. Closing twice is fine."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, name: str, request: Any) -> Any:
        request_id = secrets.token_hex(8)
        method = getattr(_Stub(self._connection.channel()), name)
        gate.enter()
        try:
            timeout = None if self._timeout == math.inf else self._timeout
            return method(request, timeout=timeout, metadata=self._connection.metadata(request_id))
        except grpc.RpcError as error:
            failure: Any = error
            raise _error(failure, self._connection, request_id) from None
        finally:
            gate.leave()


def _error(error: Any, connection: Connection, request_id: str) -> VqserveError:
    metadata = text_metadata(error.trailing_metadata())
    failure = Failure(error.code(), error.details() or "", metadata, is_encrypted=connection.is_encrypted)
    found = failure.error(target=connection.target, codebook=None, request_id=request_id)
    if found.code == "PERMISSION_DENIED":
        found.hint = "`vqserved token NAME --admin` makes a token that may operate the server"
    if found.code == "UNIMPLEMENTED":
        found.hint = "the server is older than these calls, or this is its port for health checks"
    return found


def _worker(entry: Any) -> dict[str, Any]:
    return {"worker": entry.worker, "error": _shown(entry.error) or None}


def _codebooks(entries: Iterable[Any]) -> tuple[LiveCodebook, ...]:
    return tuple(
        LiveCodebook(name=_shown(entry.name), digest=_shown(entry.digest), version=entry.version or None)
        for entry in entries
    )


def _shown(text: str) -> str:
    return printable(text, _LONGEST_TEXT)
