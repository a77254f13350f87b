from vqserve.v1 import tokenizer_pb2 as _tokenizer_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "error", "pid", "server", "log_level", "codebooks")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    LOG_LEVEL_FIELD_NUMBER: _ClassVar[int]
    CODEBOOKS_FIELD_NUMBER: _ClassVar[int]
    worker: int
    error: str
    pid: int
    server: _tokenizer_pb2.ServerInfo
    log_level: str
    codebooks: _containers.RepeatedCompositeFieldContainer[LiveCodebook]
    def __init__(self, worker: _Optional[int] = ..., error: _Optional[str] = ..., pid: _Optional[int] = ..., server: _Optional[_Union[_tokenizer_pb2.ServerInfo, _Mapping]] = ..., log_level: _Optional[str] = ..., codebooks: _Optional[_Iterable[_Union[LiveCodebook, _Mapping]]] = ...) -> None: ...

class LiveCodebook(_message.Message):
    __slots__ = ("name", "digest", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    version: int
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerReload]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerReload, _Mapping]]] = ...) -> None: ...

class WorkerReload(_message.Message):
    __slots__ = ("worker", "error", "loaded", "unchanged", "removed", "rejected", "skipped", "problems", "codebooks")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    CODEBOOKS_FIELD_NUMBER: _ClassVar[int]
    worker: int
    error: str
    loaded: int
    unchanged: int
    removed: int
    rejected: int
    skipped: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    codebooks: _containers.RepeatedCompositeFieldContainer[LiveCodebook]
    def __init__(self, worker: _Optional[int] = ..., error: _Optional[str] = ..., loaded: _Optional[int] = ..., unchanged: _Optional[int] = ..., removed: _Optional[int] = ..., rejected: _Optional[int] = ..., skipped: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ..., codebooks: _Optional[_Iterable[_Union[LiveCodebook, _Mapping]]] = ...) -> None: ...

class SetLogLevelRequest(_message.Message):
    __slots__ = ("level",)
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    level: str
    def __init__(self, level: _Optional[str] = ...) -> None: ...

class SetLogLevelResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerLogLevel]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerLogLevel, _Mapping]]] = ...) -> None: ...

class WorkerLogLevel(_message.Message):
    __slots__ = ("worker", "error", "previous")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    worker: int
    error: str
    previous: str
    def __init__(self, worker: _Optional[int] = ..., error: _Optional[str] = ..., previous: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerDrain]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerDrain, _Mapping]]] = ...) -> None: ...

class WorkerDrain(_message.Message):
    __slots__ = ("worker", "error", "requests", "drain_seconds")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    worker: int
    error: str
    requests: int
    drain_seconds: float
    def __init__(self, worker: _Optional[int] = ..., error: _Optional[str] = ..., requests: _Optional[int] = ..., drain_seconds: _Optional[float] = ...) -> None: ...
