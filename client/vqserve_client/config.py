"""The options of a client and of a call, checked when they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from os import PathLike
from typing import Any, ParamSpec

from vqserve import payload
from vqserve.dtypes import latent_dtype_name
from vqserve.errors import InvalidOption
from vqserve.layout import Layout, parse_layout
from vqserve.types import LatentDType, LayoutName, OnError, OutputName
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.validation import (
    check_batched,
    check_call,
    check_digest_form,
    check_name,
    check_on_error,
    check_output,
    check_timeout,
)
from vqserve_client.identity import (
    AUTHORIZATION,
    Metadata,
    check_secrecy,
    check_token,
    check_token_file,
    checked_metadata,
    token_of,
)
from vqserve_client.target import Target, parse_target
from vqserve_client.tls import Tls, tls_of

DEFAULT_MAX_MESSAGE_BYTES = 64 << 20
# Room for the envelope and a row of a small codebook; gRPC takes the limit as a C int.
_MESSAGE_BYTES = range(1 << 10, 1 << 31)
# Each has a thread of gRPC while it is used.
_MOST_CONNECTIONS = 256
_OUTPUTS: dict[str, int] = {"latents": pb.DECODE_OUTPUT_LATENTS, "code_rows": pb.DECODE_OUTPUT_CODE_ROWS}


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """One client's options; see Client for what they mean."""

    target: str
    codebook: str | None = None
    digest: str | None = None
    timeout: float = 60.0
    retries: int = 3
    window: int = 4
    connections: int = 1
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    token_file: str | None = None
    metadata: Metadata = field(default=(), repr=False)
    insecure: bool = False
    address: Target = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", parse_target(self.target))
        check_name("codebook", self.codebook)
        check_digest_form(self.digest)
        object.__setattr__(self, "timeout", check_timeout(self.timeout))
        _check_integer("retries", self.retries, range(1 << 31))
        _check_integer("window", self.window, range(1, 1 << 31))
        _check_integer("connections", self.connections, range(1, _MOST_CONNECTIONS + 1))
        _check_integer("max_message_bytes", self.max_message_bytes, _MESSAGE_BYTES)
        self._check_access()

    def _check_access(self) -> None:
        if self.tls is not None:
            self.tls.check()
        check_token(self.token)
        check_token_file(self.token_file)
        has_token = self.token is not None or self.token_file is not None
        is_authorized = AUTHORIZATION in dict(self.metadata)
        if has_token and is_authorized:
            raise InvalidOption("{option} must not have 'authorization' beside a token", option="metadata")
        if has_token or is_authorized:
            check_secrecy(self.address, is_encrypted=self.tls is not None, insecure=self.insecure)


def client_config(
    target: str | Sequence[str],
    *,
    tls: bool | Tls | None = None,
    token: str | None = None,
    token_file: str | PathLike[str] | None = None,
    metadata: Mapping[str, str | bytes] | None = None,
    **options: Any,
) -> ClientConfig:
    """Return the options of a client, with those of the environment for TLS and token where none are given.

    Args:
        target: see Client.
        tls: see Client.
        token: see Client.
        token_file: see Client.
        metadata: see Client.
        options: the other fields of ClientConfig.

    Raises:
        InvalidOption: an option has a value that is not allowed.
        TypeError: an option is of another type.
    """
    token, path = token_of(token, token_file)
    return ClientConfig(
        target=parse_target(target).text,
        tls=tls_of(tls),
        token=token,
        token_file=path,
        metadata=checked_metadata(metadata),
        **options,
    )


P = ParamSpec("P")


@dataclass(frozen=True, eq=False)
class CallOptions:
    """The options of one call; for codebook, digest and timeout, None stands for the client's own.

    Calls with the same options share one object, so that what depends on options is found by it.
    """

    codebook: str | None = None
    digest: str | None = None
    timeout: float | None = None
    layout: Layout | None = None
    num_quantizers: int | None = None
    dtype: int = pb.DTYPE_FLOAT32
    output: int = pb.DECODE_OUTPUT_LATENTS
    batched: bool = True
    on_error: OnError = "raise"


def _remembered(parse: Callable[P, CallOptions]) -> Callable[P, CallOptions]:
    """Return the function, which checks options that were given before no more."""
    # Typed: True is not 1, for example.
    remembered = lru_cache(256, typed=True)(parse)

    @wraps(parse)
    def options(*args: P.args, **kwargs: P.kwargs) -> CallOptions:
        try:
            return remembered(*args, **kwargs)  # type: ignore[arg-type]
        except TypeError:
            # An option of a wrong type, which may have no hash: the error is about the option.
            return parse(*args, **kwargs)

    return options


@_remembered
def call_options(
    *,
    layout: LayoutName | Layout | None = None,
    num_quantizers: int | None = None,
    codebook: str | None = None,
    digest: str | None = None,
    timeout: float | None = None,
    dtype: int = pb.DTYPE_FLOAT32,
    output: int = pb.DECODE_OUTPUT_LATENTS,
    batched: bool = True,
    on_error: OnError = "raise",
) -> CallOptions:
    """Return the options of a call, checked here so that `encode_many` raises before it begins.

    Args:
        layout: see Client.encode.
        num_quantizers: see Client.encode.
        codebook: see Client.encode.
        digest: see Client.encode.
        timeout: see Client.encode.
        dtype: wire type of decoded latents.
        output: wire value of the output of decode.
        batched: see Client.encode.
        on_error: see Client.encode_many.

    Raises:
        InvalidOption: an option has none of its values.
        TypeError: codebook, digest, timeout or batched is of another type.
    """
    check_batched(batched)
    check_on_error(on_error)
    check_call(codebook=codebook, digest=digest, timeout=timeout, num_quantizers=num_quantizers)
    parsed = None if layout is None else parse_layout(layout)
    return CallOptions(codebook, digest, timeout, parsed, num_quantizers, dtype, output, batched, on_error)


@_remembered
def decode_options(
    *,
    layout: LayoutName | Layout | None = None,
    dtype: LatentDType = "float32",
    output: OutputName = "latents",
    num_quantizers: int | None = None,
    codebook: str | None = None,
    digest: str | None = None,
    timeout: float | None = None,
    batched: bool = True,
    on_error: OnError = "raise",
) -> CallOptions:
    """Return the options of a decode call; see call_options.

    Raises:
        InvalidOption, TypeError: as for call_options.
    """
    check_output(output)
    return call_options(
        layout=layout,
        num_quantizers=num_quantizers,
        codebook=codebook,
        digest=digest,
        timeout=timeout,
        dtype=payload.dtype_of_name(latent_dtype_name(dtype)),
        output=_OUTPUTS[output],
        batched=batched,
        on_error=on_error,
    )


def _check_integer(what: str, value: int, allowed: range) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an integer, not {value!r}")
    if value not in allowed:
        raise InvalidOption(f"{{option}} must be from {allowed.start} to {allowed.stop - 1}, not {value}", option=what)
