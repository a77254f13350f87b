"""Each setting of `vqserved serve`, once: its flag, its variable, its key in a file and its row in the docs follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from vqserve_server.config import values

MIB = 1 << 20
# Unless --metrics-port says otherwise: the port that OpenTelemetry has for Prometheus's format.
METRICS_PORT = 9464
ENV_PREFIX = "VQSERVE_"
# Settings whose plain variable belongs to the client.
_OTHER_VARIABLES = {
    "tls_cert": "server_tls_cert",
    "tls_key": "server_tls_key",
    "tls_client_ca": "server_tls_client_ca",
}
# What `--help` shows for a value, where the last word of the name does not say what it is.
_METAVARS = {
    "max_calls_per_caller": "CALLS",
    "max_concurrent_rpcs": "CALLS",
    "max_streams_per_connection": "CALLS",
}


def _setting(default: str | float | bool, help_text: str, parse: Callable[[str], Any]) -> Any:
    return field(default=default, metadata={"help": help_text, "parse": parse})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How requests are batched and how many may wait."""

    max_batch_rows: int = _setting(
        16384,
        "most rows of a batch (to decode: 4 times as many); larger requests are split",
        values.integer(1, 1 << 30),
    )
    max_batch_bytes: int = _setting(64 * MIB, "most bytes of the rows of a batch", values.integer(1024, 1 << 40))
    max_wait_us: int = _setting(
        0, "microseconds that an idle device waits for a fuller batch; 0: it starts at once", values.integer(0, 10**7)
    )
    max_queue_requests: int = _setting(1024, "most requests in the server", values.integer(1, 1 << 20))
    max_queue_rows: int = _setting(1 << 26, "most rows of all requests in the server", values.integer(1, 1 << 40))
    max_queue_bytes: int = _setting(
        1024 * MIB, "most bytes of all requests in the server and their replies", values.integer(1024, 1 << 44)
    )
    max_caller_requests: int = _setting(
        0,
        "most requests of one caller in the server; 0: three times what is left free for others",
        values.integer(0, 1 << 20),
    )
    max_caller_rows: int = _setting(0, "most rows of one caller in the server; 0: likewise", values.integer(0, 1 << 40))
    max_caller_bytes: int = _setting(
        0, "most bytes of one caller's requests and replies in the server; 0: likewise", values.integer(0, 1 << 44)
    )
    max_queue_ms: int = _setting(
        30_000,
        "most milliseconds that a new request would wait for others, by the measured speed; 0: no limit",
        values.integer(0, 86_400_000),
    )
    max_batch_ms: int = _setting(
        4, "milliseconds that a batch may take, by the measured speed; 0: no limit", values.integer(0, 60_000)
    )


@dataclass(frozen=True, kw_only=True)
class RpcConfig:
    """Where the server listens, and the limits of messages and calls."""

    host: str = _setting("127.0.0.1", "address to listen on", values.text)
    port: int = _setting(
        50051, "port to listen on; 0: a free port, which the ready line names", values.integer(0, 65535)
    )
    unix_socket: str = _setting(
        "", "socket file to listen on beside the port, for callers on this machine", values.path
    )
    max_message_bytes: int = _setting(
        64 * MIB, "most bytes of a request or a reply", values.integer(4096, (1 << 31) - 1)
    )
    max_concurrent_rpcs: int = _setting(
        512, "most open calls, streams included; health checks do not count", values.integer(1, 1 << 20)
    )
    max_calls_per_caller: int = _setting(256, "most open calls of one caller", values.integer(1, 1 << 20))
    max_streams_per_connection: int = _setting(256, "most open calls on one connection", values.integer(1, 1 << 20))
    max_connections: int = _setting(2048, "most open connections", values.integer(1, 1 << 20))
    max_metadata_bytes: int = _setting(
        16384, "most bytes of a call's metadata, its path and authority included", values.integer(1024, 1 << 20)
    )
    allow_compression: bool = _setting(
        False, "accept compressed requests, which may be a thousand times as large as on the wire", values.switch
    )
    idle_seconds: float = _setting(
        600.0, "seconds that a call may wait for its caller to send or read a message; 0: no limit", values.seconds
    )
    connection_idle_seconds: float = _setting(
        900.0, "seconds after which a connection without calls is closed; 0: no limit", values.seconds
    )
    max_connection_age_seconds: float = _setting(
        1800.0,
        "seconds after which a connection is replaced, a tenth more or less, so that clients find new servers; "
        "0: no limit",
        values.seconds,
    )
    max_connection_age_grace_seconds: float = _setting(
        0.0,
        "seconds for the calls of a connection that is replaced, after which they fail; 0: no limit",
        values.seconds,
    )


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    """Who can use the server, and how the connections are protected."""

    tls_cert: str = _setting(
        "", "file of the server's certificate and its chain, PEM: the port speaks TLS", values.path
    )
    tls_key: str = _setting("", "file of the certificate's private key, PEM, not encrypted", values.path)
    tls_client_ca: str = _setting(
        "", "file of certificates, PEM: a client needs a certificate that one of them has signed", values.path
    )
    tokens: str = _setting("", "file of the tokens that callers may use; none: a caller needs no token", values.path)
    insecure: bool = _setting(
        False, "serve other machines without TLS: whoever can reach the network can read and change it", values.switch
    )
    health_port: int = _setting(
        0, "port that answers health checks in plaintext, and nothing else; 0: none", values.integer(0, 65535)
    )

    @property
    def is_encrypted(self) -> bool:
        """Whether the port speaks TLS."""
        return bool(self.tls_cert)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics can be read."""

    metrics_host: str = _setting("127.0.0.1", "address of the metrics port", values.text)
    metrics_port: str = _setting(
        "auto", f"port that shows metrics over HTTP; auto: {METRICS_PORT} if it is free; 0: none", values.port_or_auto
    )
    sample_one_in: int = _setting(
        2048, "one encoded row in so many is sampled for codebook health; 0: none", values.integer(0, 1 << 20)
    )

    @property
    def port(self) -> int:
        """The port; 0: none."""
        return METRICS_PORT if self.metrics_port == "auto" else int(self.metrics_port)

    @property
    def samples_traffic(self) -> bool:
        """Whether rows are sampled, and somebody can read what is counted."""
        return self.port > 0 and self.sample_one_in > 0

    @property
    def is_port_required(self) -> bool:
        """Whether it is an error that the port is in use."""
        return self.metrics_port != "auto"


@dataclass(frozen=True, kw_only=True)
class TracesConfig:
    """Where the spans of requests are sent, and of how many requests."""

    trace_endpoint: str = _setting(
        "", "URL of an OpenTelemetry collector, OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces", values.url
    )
    trace_ratio: float = _setting(
        0.0, "share of the requests that begin a trace, beside those of callers that trace", values.share
    )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """All settings of `vqserved serve`."""

    rpc: RpcConfig = RpcConfig()
    access: AccessConfig = AccessConfig()
    engine: EngineConfig = EngineConfig()
    metrics: MetricsConfig = MetricsConfig()
    traces: TracesConfig = TracesConfig()
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N", values.device)
    workers: int = _setting(
        1, "processes that serve the port, each with its own codebooks and queue", values.integer(1, 1024)
    )
    devices: str = _setting(
        "", "devices for the workers in turn, for example cuda:0,cuda:1; none: --device for all", values.devices
    )
    search: str = _setting(
        "auto",
        "search backend: auto, native, triton, torch or reference; all give the same tokens",
        values.text,
    )
    drain_seconds: float = _setting(30.0, "seconds to answer accepted requests after SIGTERM or SIGINT", values.seconds)
    watchdog_seconds: float = _setting(
        30.0,
        "seconds after which a computation that has not returned is a fault, which ends the process; 0: never",
        # Below this a pause of a busy machine would be a fault.
        values.zero_or_seconds(3),
    )
    rescan_seconds: float = _setting(
        0.0,
        "seconds from one look at the codebook files to the next; what has changed is loaded; 0: only on a reload",
        values.zero_or_seconds(1),
    )
    log_level: str = _setting("info", f"one of {', '.join(values.LOG_LEVELS)}", values.one_of(values.LOG_LEVELS))
    log_format: str = _setting("text", "text, or json: one object a line", values.one_of(values.LOG_FORMATS))


@dataclass(frozen=True)
class Setting:
    """One field of the dataclasses above.

    Attributes:
        group: field of `ServeConfig` that has it; None: `ServeConfig` itself.
        name: of the field, and key in a file.
        default: its value if nothing sets it.
        help: what it means.
        parse: reads a value from a text, or raises ValueError.
    """

    group: str | None
    name: str
    default: Any
    help: str
    parse: Callable[[str], Any]

    @property
    def flag(self) -> str:
        """The flag: "--max-batch-rows"."""
        return flag(self.name)

    @property
    def variable(self) -> str:
        """The environment variable: "VQSERVE_MAX_BATCH_ROWS"."""
        return ENV_PREFIX + _OTHER_VARIABLES.get(self.name, self.name).upper()

    @property
    def metavar(self) -> str:
        """What `--help` shows for its value."""
        return "FILE" if self.is_path else _METAVARS.get(self.name, self.name.rsplit("_", 1)[-1].upper())

    @property
    def is_path(self) -> bool:
        """Whether the value is the path of a file."""
        return self.parse is values.path

    @property
    def is_port_or_auto(self) -> bool:
        """Whether the value is "auto", or a port: in a file an integer, as other ports are."""
        return self.parse is values.port_or_auto

    @property
    def shown_default(self) -> str:
        """The default, for people."""
        default = self.default
        return f"{default:g}" if isinstance(default, float) else values.written(default) or "none"

    def of(self, config: ServeConfig) -> Any:
        """Return its value."""
        return getattr(config if self.group is None else getattr(config, self.group), self.name)


GROUPS: dict[str, type] = {
    "rpc": RpcConfig,
    "access": AccessConfig,
    "engine": EngineConfig,
    "metrics": MetricsConfig,
    "traces": TracesConfig,
}
SETTINGS = tuple(
    Setting(group, each.name, each.default, each.metadata["help"], each.metadata["parse"])
    for group, cls in (*GROUPS.items(), (None, ServeConfig))
    for each in fields(cls)
    if each.name not in GROUPS
)


def flag(name: str) -> str:
    """Return the flag of a setting: "--max-batch-rows"."""
    return "--" + name.replace("_", "-")
