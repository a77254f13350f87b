"""Where the settings come from: flags override VQSERVE_* environment variables, which override defaults."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from vqserve_server.config import values
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


class ConfigError(ValueError):
    """A setting does not exist or has an invalid value; the text names it."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each setting to a parser; a flag that is not given is not in the namespace."""
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


def resolve(flags: Mapping[str, Any], environ: Mapping[str, str]) -> ServeConfig:
    """Return the settings: flags (see `add_flags`) override environment variables, which override defaults.

    Raises:
        ConfigError: a VQSERVE_* variable is unknown or has a bad value, or two settings contradict each other.
    """
    _check_variables(environ)
    found: dict[str | None, dict[str, Any]] = {None: {}, **{group: {} for group in GROUPS}}
    for setting in SETTINGS:
        if setting.name in flags:
            found[setting.group][setting.name] = flags[setting.name]
        elif setting.variable in environ:
            try:
                found[setting.group][setting.name] = setting.parse(environ[setting.variable])
            except ValueError as error:
                raise ConfigError(f"{setting.variable} {error}") from None
    config = ServeConfig(**{group: cls(**found[group]) for group, cls in GROUPS.items()}, **found[None])
    _check_together(config)
    return config


def _check_variables(environ: Mapping[str, str]) -> None:
    known = {setting.variable for setting in SETTINGS}
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in known | CLIENT_VARIABLES:
            # The prefix would make every two names similar.
            bare = [one.removeprefix(ENV_PREFIX) for one in known]
            near = difflib.get_close_matches(name.removeprefix(ENV_PREFIX), bare, 1, cutoff=0.75)
            hint = f": did you mean {ENV_PREFIX}{near[0]}?" if near else ""
            raise ConfigError(f"unknown environment variable {name}{hint}")


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
    if config.rpc.unix_socket and config.workers > 1:
        raise ConfigError(f"{flag('unix_socket')} needs --workers 1: several workers cannot share a socket file")


def environment(config: ServeConfig) -> dict[str, str]:
    """Return environment variables from which `resolve` makes the same settings."""
    return {setting.variable: values.written(setting.of(config)) for setting in SETTINGS}
