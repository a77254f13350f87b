"""The options of a client and of a call, checked when they are given."""

from __future__ import annotations

from dataclasses import dataclass, field

from vqserve import payload
from vqserve.dtypes import latent_dtype_name
from vqserve.errors import InvalidOption
from vqserve.layout import Layout, parse_layout
from vqserve.types import LatentDType, LayoutName, OutputName
from vqserve.v1 import tokenizer_pb2 as pb
from vqserve.validation import check_call, check_digest_form, check_name, check_output, check_timeout
from vqserve_client.target import Target, parse_target

DEFAULT_MAX_MESSAGE_BYTES = 64 << 20
# Room for the envelope and a row of a small codebook; gRPC takes the limit as a C int.
_MESSAGE_BYTES = range(1 << 10, 1 << 31)
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
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    address: Target = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", parse_target(self.target))
        check_name("codebook", self.codebook)
        check_digest_form(self.digest)
        object.__setattr__(self, "timeout", check_timeout(self.timeout))
        _check_integer("retries", self.retries, range(1 << 31))
        _check_integer("window", self.window, range(1, 1 << 31))
        _check_integer("max_message_bytes", self.max_message_bytes, _MESSAGE_BYTES)


@dataclass(frozen=True)
class CallOptions:
    """The options of one call; for codebook, digest and timeout, None stands for the client's own."""

    codebook: str | None = None
    digest: str | None = None
    timeout: float | None = None
    layout: Layout | None = None
    num_quantizers: int | None = None
    dtype: int = pb.DTYPE_FLOAT32
    output: int = pb.DECODE_OUTPUT_LATENTS


def call_options(
    *,
    layout: LayoutName | Layout | None = None,
    num_quantizers: int | None = None,
    codebook: str | None = None,
    digest: str | None = None,
    timeout: float | None = None,
    dtype: int = pb.DTYPE_FLOAT32,
    output: int = pb.DECODE_OUTPUT_LATENTS,
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

    Raises:
        InvalidOption: an option has none of its values.
        TypeError: codebook, digest or timeout is of another type.
    """
    check_call(codebook=codebook, digest=digest, timeout=timeout, num_quantizers=num_quantizers)
    parsed = None if layout is None else parse_layout(layout)
    return CallOptions(codebook, digest, timeout, parsed, num_quantizers, dtype, output)


def decode_options(
    *,
    layout: LayoutName | Layout | None = None,
    dtype: LatentDType = "float32",
    output: OutputName = "latents",
    num_quantizers: int | None = None,
    codebook: str | None = None,
    digest: str | None = None,
    timeout: float | None = None,
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
    )


def _check_integer(what: str, value: int, allowed: range) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an integer, not {value!r}")
    if value not in allowed:
        raise InvalidOption(f"{{option}} must be from {allowed.start} to {allowed.stop - 1}, not {value}", option=what)
