"""The settings of the daemon: flags override VQSERVE_* environment variables, which override defaults.

Each field of the dataclasses below is a flag (`--max-batch-rows`) and a variable (`VQSERVE_MAX_BATCH_ROWS`);
`settings_table` is the table of docs/operations.md.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

ENV_PREFIX = "VQSERVE_"
# These belong to the client; a shell may set them for both.
CLIENT_VARIABLES = frozenset(
    ENV_PREFIX + name
    for name in (
        "TARGET",
        "CODEBOOK",
        "TRACEBACK",
        "TLS",
        "TLS_CA",
        "TLS_CERT",
        "TLS_KEY",
        "TLS_SERVER_NAME",
        "TOKEN",
        "TOKEN_FILE",
    )
)
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
    "tls_cert": "FILE",
    "tls_key": "FILE",
    "tls_client_ca": "FILE",
    "tokens": "FILE",
}
_SWITCH = {"on": True, "1": True, "true": True, "yes": True, "off": False, "0": False, "false": False, "no": False}
LOG_LEVELS = ("debug", "info", "warning", "error")
MIB = 1 << 20
# Unless --metrics-port says otherwise: the port that OpenTelemetry has for Prometheus's format.
METRICS_PORT = 9464


class ConfigError(ValueError):
    """A setting does not exist or has an invalid value; the text names it."""


def _text(text: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    return text


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise ValueError(f"must be auto, cpu, cuda or cuda:N, not {text!r}")
    return text


def _devices(text: str) -> str:
    for name in text.split(",") if text else ():
        _device(name)
    return text


def _log_level(text: str) -> str:
    if text not in LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(LOG_LEVELS)}, not {text!r}")
    return text


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86_400:
        raise ValueError(f"must be a number of seconds from 0 to 86400, not {text!r}")
    return value


def _watchdog_seconds(text: str) -> float:
    value = _seconds(text)
    # Below this a pause of a busy machine would be a fault.
    if 0 < value < 3:
        raise ValueError(f"must be 0 or from 3 to 86400 seconds, not {text!r}")
    return value


def _metrics_port(text: str) -> str:
    if text != "auto":
        _integer(0, 65535)(text)
    return text


def _switch(text: str) -> bool:
    if text.lower() not in _SWITCH:
        raise ValueError(f"must be on or off, not {text!r}")
    return _SWITCH[text.lower()]


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else -1
        if not low <= value <= high:
            raise ValueError(f"must be an integer from {low} to {high}, not {text!r}")
        return value

    return parse


def _setting(default: str | float | bool, help_text: str, parse: Callable[[str], Any]) -> Any:
    return field(default=default, metadata={"help": help_text, "parse": parse})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How requests are batched and how many may wait."""

    max_batch_rows: int = _setting(
        16384, "most rows of a batch (to decode: 4 times as many); larger requests are split", _integer(1, 1 << 30)
    )
    max_batch_bytes: int = _setting(64 * MIB, "most bytes of the rows of a batch", _integer(1024, 1 << 40))
    max_wait_us: int = _setting(
        0, "microseconds that an idle device waits for a fuller batch; 0: it starts at once", _integer(0, 10**7)
    )
    max_queue_requests: int = _setting(1024, "most requests in the server", _integer(1, 1 << 20))
    max_queue_rows: int = _setting(1 << 26, "most rows of all requests in the server", _integer(1, 1 << 40))
    max_queue_bytes: int = _setting(
        1024 * MIB, "most bytes of all requests in the server and their replies", _integer(1024, 1 << 44)
    )
    max_caller_requests: int = _setting(
        0,
        "most requests of one caller in the server; 0: three times what is left free for others",
        _integer(0, 1 << 20),
    )
    max_caller_rows: int = _setting(0, "most rows of one caller in the server; 0: likewise", _integer(0, 1 << 40))
    max_caller_bytes: int = _setting(
        0, "most bytes of one caller's requests and replies in the server; 0: likewise", _integer(0, 1 << 44)
    )
    max_queue_ms: int = _setting(
        30_000,
        "most milliseconds that a new request would wait for others, by the measured speed; 0: no limit",
        _integer(0, 86_400_000),
    )
    max_batch_ms: int = _setting(
        4, "milliseconds that a batch may take, by the measured speed; 0: no limit", _integer(0, 60_000)
    )


@dataclass(frozen=True, kw_only=True)
class RpcConfig:
    """Where the server listens, and the limits of messages and calls."""

    host: str = _setting("127.0.0.1", "address to listen on", _text)
    port: int = _setting(50051, "port to listen on; 0: a free port, which the ready line names", _integer(0, 65535))
    unix_socket: str = _setting("", "socket file to listen on beside the port, for callers on this machine", str)
    max_message_bytes: int = _setting(64 * MIB, "most bytes of a request or a reply", _integer(4096, (1 << 31) - 1))
    max_concurrent_rpcs: int = _setting(
        512, "most open calls, streams included; health checks do not count", _integer(1, 1 << 20)
    )
    max_calls_per_caller: int = _setting(256, "most open calls of one caller", _integer(1, 1 << 20))
    max_streams_per_connection: int = _setting(256, "most open calls on one connection", _integer(1, 1 << 20))
    max_connections: int = _setting(2048, "most open connections", _integer(1, 1 << 20))
    max_metadata_bytes: int = _setting(
        16384, "most bytes of a call's metadata, its path and authority included", _integer(1024, 1 << 20)
    )
    allow_compression: bool = _setting(
        False, "accept compressed requests, which may be a thousand times as large as on the wire", _switch
    )
    idle_seconds: float = _setting(
        600.0, "seconds that a call may wait for its caller to send or read a message; 0: no limit", _seconds
    )
    connection_idle_seconds: float = _setting(
        900.0, "seconds after which a connection without calls is closed; 0: no limit", _seconds
    )
    max_connection_age_seconds: float = _setting(
        1800.0,
        "seconds after which a connection is replaced, a tenth more or less, so that clients find new servers; "
        "0: no limit",
        _seconds,
    )
    max_connection_age_grace_seconds: float = _setting(
        0.0, "seconds for the calls of a connection that is replaced, after which they fail; 0: no limit", _seconds
    )


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    """Who can use the server, and how the connections are protected."""

    tls_cert: str = _setting("", "file of the server's certificate and its chain, PEM: the port speaks TLS", str)
    tls_key: str = _setting("", "file of the certificate's private key, PEM, not encrypted", str)
    tls_client_ca: str = _setting(
        "", "file of certificates, PEM: a client needs a certificate that one of them has signed", str
    )
    tokens: str = _setting("", "file of the tokens that callers may use; none: a caller needs no token", str)
    insecure: bool = _setting(
        False, "serve other machines without TLS: whoever can reach the network can read and change it", _switch
    )
    health_port: int = _setting(
        0, "port that answers health checks in plaintext, and nothing else; 0: none", _integer(0, 65535)
    )

    @property
    def is_encrypted(self) -> bool:
        """Whether the port speaks TLS."""
        return bool(self.tls_cert)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics can be read."""

    metrics_host: str = _setting("127.0.0.1", "address of the metrics port", _text)
    metrics_port: str = _setting(
        "auto", f"port that shows metrics over HTTP; auto: {METRICS_PORT} if it is free; 0: none", _metrics_port
    )

    @property
    def port(self) -> int:
        """The port; 0: none."""
        return METRICS_PORT if self.metrics_port == "auto" else int(self.metrics_port)

    @property
    def is_port_required(self) -> bool:
        """Whether it is an error that the port is in use."""
        return self.metrics_port != "auto"


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """All settings of `vqserved serve`."""

    rpc: RpcConfig = RpcConfig()
    access: AccessConfig = AccessConfig()
    engine: EngineConfig = EngineConfig()
    metrics: MetricsConfig = MetricsConfig()
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N", _device)
    workers: int = _setting(
        1, "processes that serve the port, each with its own codebooks and queue", _integer(1, 1024)
    )
    devices: str = _setting(
        "", "devices for the workers in turn, for example cuda:0,cuda:1; none: --device for all", _devices
    )
    search: str = _setting(
        "auto",
        "search backend: auto, native, triton, torch or reference; all give the same tokens",
        _text,
    )
    drain_seconds: float = _setting(30.0, "seconds to answer accepted requests after SIGTERM or SIGINT", _seconds)
    watchdog_seconds: float = _setting(
        30.0,
        "seconds after which a computation that has not returned is a fault, which ends the process; 0: never",
        _watchdog_seconds,
    )
    log_level: str = _setting("info", f"one of {', '.join(LOG_LEVELS)}", _log_level)


_GROUPS: dict[str, type] = {
    "rpc": RpcConfig,
    "access": AccessConfig,
    "engine": EngineConfig,
    "metrics": MetricsConfig,
}


def _settings() -> Iterator[tuple[str | None, Field[Any]]]:
    for group, cls in _GROUPS.items():
        for setting in fields(cls):
            yield group, setting
    for setting in fields(ServeConfig):
        if setting.name not in _GROUPS:
            yield None, setting


def flag(name: str) -> str:
    """Return the flag of a setting: "--max-batch-rows"."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """Return the environment variable of a setting: "VQSERVE_MAX_BATCH_ROWS"."""
    return ENV_PREFIX + _OTHER_VARIABLES.get(name, name).upper()


def _shown(setting: Field[Any]) -> str:
    default: Any = setting.default
    if isinstance(default, bool):
        return _spelled(default)
    return f"{default:g}" if isinstance(default, float) else str(default) or "none"


def _spelled(switch: bool) -> str:
    return "on" if switch else "off"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each setting to a parser; a flag that is not given is not in the namespace."""
    for _, setting in _settings():
        parse = setting.metadata["parse"]

        def parse_flag(text: str, parse: Callable[[str], Any] = parse) -> Any:
            try:
                return parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        help_text = f"{setting.metadata['help']} ({variable(setting.name)}; default: {_shown(setting)})"
        if isinstance(setting.default, bool):
            parser.add_argument(flag(setting.name), action="store_true", default=argparse.SUPPRESS, help=help_text)
            continue
        parser.add_argument(
            flag(setting.name),
            type=parse_flag,
            default=argparse.SUPPRESS,
            metavar=_METAVARS.get(setting.name, setting.name.rsplit("_", 1)[-1].upper()),
            help=help_text,
        )


def resolve(flags: Mapping[str, Any], environ: Mapping[str, str]) -> ServeConfig:
    """Return the settings: flags (see `add_flags`) override environment variables, which override defaults.

    Raises:
        ConfigError: a VQSERVE_* variable is unknown or has a bad value, or two settings contradict each other.
    """
    known = {variable(setting.name) for _, setting in _settings()}
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in known | CLIENT_VARIABLES:
            # The prefix would make every two names similar.
            bare = [one.removeprefix(ENV_PREFIX) for one in known]
            near = difflib.get_close_matches(name.removeprefix(ENV_PREFIX), bare, 1, cutoff=0.75)
            hint = f": did you mean {ENV_PREFIX}{near[0]}?" if near else ""
            raise ConfigError(f"unknown environment variable {name}{hint}")
    values: dict[str | None, dict[str, Any]] = {None: {}, **{group: {} for group in _GROUPS}}
    for group, setting in _settings():
        name = setting.name
        if name in flags:
            values[group][name] = flags[name]
        elif variable(name) in environ:
            try:
                values[group][name] = setting.metadata["parse"](environ[variable(name)])
            except ValueError as error:
                raise ConfigError(f"{variable(name)} {error}") from None
    config = ServeConfig(
        **{group: cls(**values[group]) for group, cls in _GROUPS.items()},
        **values[None],
    )
    if config.engine.max_queue_bytes < 2 * config.rpc.max_message_bytes:
        raise ConfigError(
            f"{flag('max_queue_bytes')} ({config.engine.max_queue_bytes}) must hold a request and its reply: "
            f"at least twice {flag('max_message_bytes')} ({config.rpc.max_message_bytes})"
        )
    _check_access(config)
    if config.rpc.unix_socket and config.workers > 1:
        raise ConfigError(f"{flag('unix_socket')} needs --workers 1: several workers cannot share a socket file")
    return config


def _check_access(config: ServeConfig) -> None:
    access = config.access
    if bool(access.tls_cert) != bool(access.tls_key):
        raise ConfigError(f"{flag('tls_cert')} and {flag('tls_key')} need each other: give both, or none")
    if access.tls_client_ca and not access.tls_cert:
        raise ConfigError(f"{flag('tls_client_ca')} needs {flag('tls_cert')} and {flag('tls_key')}")
    if access.health_port and access.health_port == config.rpc.port:
        raise ConfigError(f"{flag('health_port')} must differ from {flag('port')}, both are {config.rpc.port}")
    if config.metrics.is_port_required and config.metrics.port:
        for name, port in (("port", config.rpc.port), ("health_port", access.health_port)):
            if config.metrics.port == port:
                raise ConfigError(f"{flag('metrics_port')} must differ from {flag(name)}, both are {port}")


def environment(config: ServeConfig) -> dict[str, str]:
    """Return environment variables from which `resolve` makes the same settings."""
    values = {}
    for group, setting in _settings():
        value = getattr(config if group is None else getattr(config, group), setting.name)
        values[variable(setting.name)] = _written(value)
    return values


def _written(value: object) -> str:
    if isinstance(value, bool):
        return _spelled(value)
    return repr(value) if isinstance(value, float) else str(value)


def settings_table() -> str:
    """Return the table of docs/operations.md, in Markdown."""
    lines = ["| Flag | Environment | Default | Meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{flag(setting.name)}` | `{variable(setting.name)}` | `{_shown(setting)}` | {setting.metadata['help']} |"
        for _, setting in _settings()
    ]
    return "\n".join(lines)
