from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT64: _ClassVar[DType]
    DTYPE_UINT8: _ClassVar[DType]
    DTYPE_UINT16: _ClassVar[DType]
    DTYPE_UINT32: _ClassVar[DType]
    DTYPE_INT32: _ClassVar[DType]
    DTYPE_INT64: _ClassVar[DType]

class Layout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYOUT_UNSPECIFIED: _ClassVar[Layout]
    LAYOUT_CHANNELS_FIRST: _ClassVar[Layout]
    LAYOUT_CHANNELS_LAST: _ClassVar[Layout]

class DecodeOutput(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECODE_OUTPUT_UNSPECIFIED: _ClassVar[DecodeOutput]
    DECODE_OUTPUT_LATENTS: _ClassVar[DecodeOutput]
    DECODE_OUTPUT_CODE_ROWS: _ClassVar[DecodeOutput]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT16: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT64: DType
DTYPE_UINT8: DType
DTYPE_UINT16: DType
DTYPE_UINT32: DType
DTYPE_INT32: DType
DTYPE_INT64: DType
LAYOUT_UNSPECIFIED: Layout
LAYOUT_CHANNELS_FIRST: Layout
LAYOUT_CHANNELS_LAST: Layout
DECODE_OUTPUT_UNSPECIFIED: DecodeOutput
DECODE_OUTPUT_LATENTS: DecodeOutput
DECODE_OUTPUT_CODE_ROWS: DecodeOutput

class EncodeRequest(_message.Message):
    __slots__ = ("codebook", "expected_digest", "layout", "dtype", "shape", "index_dtype", "num_quantizers", "latents")
    CODEBOOK_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    INDEX_DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_QUANTIZERS_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    codebook: str
    expected_digest: str
    layout: Layout
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    index_dtype: DType
    num_quantizers: int
    latents: bytes
    def __init__(self, codebook: _Optional[str] = ..., expected_digest: _Optional[str] = ..., layout: _Optional[_Union[Layout, str]] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., index_dtype: _Optional[_Union[DType, str]] = ..., num_quantizers: _Optional[int] = ..., latents: _Optional[bytes] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("digest", "dtype", "shape", "stats", "indices")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    stats: ServedStats
    indices: bytes
    def __init__(self, digest: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., stats: _Optional[_Union[ServedStats, _Mapping]] = ..., indices: _Optional[bytes] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("codebook", "expected_digest", "layout", "dtype", "shape", "latent_dtype", "output", "num_quantizers", "indices")
    CODEBOOK_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    LATENT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    NUM_QUANTIZERS_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    codebook: str
    expected_digest: str
    layout: Layout
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    latent_dtype: DType
    output: DecodeOutput
    num_quantizers: int
    indices: bytes
    def __init__(self, codebook: _Optional[str] = ..., expected_digest: _Optional[str] = ..., layout: _Optional[_Union[Layout, str]] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., latent_dtype: _Optional[_Union[DType, str]] = ..., output: _Optional[_Union[DecodeOutput, str]] = ..., num_quantizers: _Optional[int] = ..., indices: _Optional[bytes] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("digest", "dtype", "shape", "stats", "latents")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    digest: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    stats: ServedStats
    latents: bytes
    def __init__(self, digest: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., stats: _Optional[_Union[ServedStats, _Mapping]] = ..., latents: _Optional[bytes] = ...) -> None: ...

class ServedStats(_message.Message):
    __slots__ = ("queue_us", "compute_us", "total_us", "batch_requests", "batch_rows")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    compute_us: int
    total_us: int
    batch_requests: int
    batch_rows: int
    def __init__(self, queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., total_us: _Optional[int] = ..., batch_requests: _Optional[int] = ..., batch_rows: _Optional[int] = ...) -> None: ...

class ListCodebooksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListCodebooksResponse(_message.Message):
    __slots__ = ("codebooks", "server")
    CODEBOOKS_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    codebooks: _containers.RepeatedCompositeFieldContainer[CodebookInfo]
    server: ServerInfo
    def __init__(self, codebooks: _Optional[_Iterable[_Union[CodebookInfo, _Mapping]]] = ..., server: _Optional[_Union[ServerInfo, _Mapping]] = ...) -> None: ...

class ServerInfo(_message.Message):
    __slots__ = ("version", "uptime_seconds", "requests", "rows", "bytes", "open_calls", "requests_per_second", "rows_per_second")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    OPEN_CALLS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    version: str
    uptime_seconds: float
    requests: int
    rows: int
    bytes: int
    open_calls: int
    requests_per_second: float
    rows_per_second: float
    def __init__(self, version: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., requests: _Optional[int] = ..., rows: _Optional[int] = ..., bytes: _Optional[int] = ..., open_calls: _Optional[int] = ..., requests_per_second: _Optional[float] = ..., rows_per_second: _Optional[float] = ...) -> None: ...

class CodebookInfo(_message.Message):
    __slots__ = ("name", "digest", "kind", "num_codes", "vocab_size", "input_dim", "code_dim", "output_dim", "num_quantizers", "layout", "stage_vocab_sizes", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_CODES_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    INPUT_DIM_FIELD_NUMBER: _ClassVar[int]
    CODE_DIM_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_DIM_FIELD_NUMBER: _ClassVar[int]
    NUM_QUANTIZERS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    STAGE_VOCAB_SIZES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    kind: str
    num_codes: int
    vocab_size: int
    input_dim: int
    code_dim: int
    output_dim: int
    num_quantizers: int
    layout: Layout
    stage_vocab_sizes: _containers.RepeatedScalarFieldContainer[int]
    version: int
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., kind: _Optional[str] = ..., num_codes: _Optional[int] = ..., vocab_size: _Optional[int] = ..., input_dim: _Optional[int] = ..., code_dim: _Optional[int] = ..., output_dim: _Optional[int] = ..., num_quantizers: _Optional[int] = ..., layout: _Optional[_Union[Layout, str]] = ..., stage_vocab_sizes: _Optional[_Iterable[int]] = ..., version: _Optional[int] = ...) -> None: ...
