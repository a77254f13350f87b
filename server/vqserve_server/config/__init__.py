"""The settings of the daemon. No gRPC, no torch."""

from vqserve_server.config.file import CODEBOOKS, ConfigError
from vqserve_server.config.settings import (
    ENV_PREFIX,
    SETTINGS,
    AccessConfig,
    EngineConfig,
    RpcConfig,
    ServeConfig,
    TracesConfig,
    flag,
)
from vqserve_server.config.sources import CONFIG_VARIABLE, Resolved, add_flags, environment, load, resolve
from vqserve_server.config.tables import settings_file, settings_table

__all__ = [
    "CODEBOOKS",
    "CONFIG_VARIABLE",
    "ENV_PREFIX",
    "SETTINGS",
    "AccessConfig",
    "ConfigError",
    "EngineConfig",
    "Resolved",
    "RpcConfig",
    "ServeConfig",
    "TracesConfig",
    "add_flags",
    "environment",
    "flag",
    "load",
    "resolve",
    "settings_file",
    "settings_table",
]
