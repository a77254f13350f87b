"""Where the settings come from: flags override VQSERVE_* variables, which override a file, which overrides defaults."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vqserve_server.config import values
from vqserve_server.config.file import CODEBOOKS, ConfigError, SettingsFile, near, read_file
from vqserve_server.config.settings import ENV_PREFIX, GROUPS, SETTINGS, ServeConfig, flag

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


# Names the file. It is no setting: it cannot be in the file.
CONFIG_FLAG, CONFIG_VARIABLE = "--config", ENV_PREFIX + "CONFIG"


@dataclass(frozen=True)
class Resolved:
    """The settings, and where they come from.

    Attributes:
        config: the settings.
        codebooks: files and folders to serve; empty: the demo codebook.
        origins: what sets a setting, by its name, and the codebooks: a flag, a variable or a file. Without what has its
            default.
    """

    config: ServeConfig
    codebooks: tuple[str, ...]
    origins: Mapping[str, str]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each setting to a parser; a flag that is not given is not in the namespace."""
    parser.add_argument(
        CONFIG_FLAG,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help=f"TOML file of settings and codebooks; flags and variables override it ({CONFIG_VARIABLE})",
    )
    for setting in SETTINGS:

        def parse_flag(text: str, parse: Callable[[str], Any] = setting.parse) -> Any:
            try:
                return parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        help_text = f"{setting.help} ({setting.variable}; default: {setting.shown_default})"
        if isinstance(setting.default, bool):
            parser.add_argument(setting.flag, action="store_true", default=argparse.SUPPRESS, help=help_text)
            continue
        parser.add_argument(
            setting.flag,
            type=parse_flag,
            default=argparse.SUPPRESS,
            metavar=setting.metavar,
            help=help_text,
        )


def load(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Resolved:
    """Return the settings, and where they come from.

    Args:
        flags: see `add_flags`; "sources": the codebooks of the command line.
        environ: environment variables.

    Raises:
        ConfigError: a variable, a key of the file or a value is wrong, or two settings contradict each other.
    """
    _check_variables(environ)
    path = flags.get("config", environ.get(CONFIG_VARIABLE))
    file = read_file(path) if path else SettingsFile("")
    found: dict[str | None, dict[str, Any]] = {None: {}, **{group: {} for group in GROUPS}}
    origins = {}
    for setting in SETTINGS:
        name, variable = setting.name, setting.variable
        if name in flags:
            value, origins[name] = flags[name], setting.flag
        elif variable in environ:
            try:
                value, origins[name] = setting.parse(environ[variable]), variable
            except ValueError as error:
                raise ConfigError(f"{variable} {error}") from None
        elif name in file.settings:
            value, origins[name] = file.settings[name], file.path
        else:
            continue
        found[setting.group][name] = value
    config = ServeConfig(**{group: cls(**found[group]) for group, cls in GROUPS.items()}, **found[None])
    _check_together(config)
    named = tuple(flags.get("sources", ()))
    if named or file.codebooks:
        origins[CODEBOOKS] = "the command line" if named else file.path
    return Resolved(config, named or file.codebooks, origins)


def resolve(flags: Mapping[str, Any], environ: Mapping[str, str]) -> ServeConfig:
    """Return the settings; see `load`."""
    return load(flags, environ).config


def _check_variables(environ: Mapping[str, str]) -> None:
    # Without the prefix, which would make every two names similar.
    known = {variable.removeprefix(ENV_PREFIX): variable for variable in (CONFIG_VARIABLE, *_variables())}
    for name in environ:
        bare = name.removeprefix(ENV_PREFIX)
        if name.startswith(ENV_PREFIX) and bare not in known and name not in CLIENT_VARIABLES:
            meant = near(bare, known)
            hint = f": did you mean {known[meant]}?" if meant else ""
            raise ConfigError(f"unknown environment variable {name}{hint}")


def _variables() -> list[str]:
    return [setting.variable for setting in SETTINGS]


def _check_together(config: ServeConfig) -> None:
    if config.engine.max_queue_bytes < 2 * config.rpc.max_message_bytes:
        raise ConfigError(
            f"{flag('max_queue_bytes')} ({config.engine.max_queue_bytes}) must hold a request and its reply: "
            f"at least twice {flag('max_message_bytes')} ({config.rpc.max_message_bytes})"
        )
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
    if config.rpc.unix_socket and config.workers > 1:
        raise ConfigError(f"{flag('unix_socket')} needs --workers 1: several workers cannot share a socket file")


def environment(config: ServeConfig) -> dict[str, str]:
    """Return environment variables from which `resolve` makes the same settings."""
    return {setting.variable: values.written(setting.of(config)) for setting in SETTINGS}
