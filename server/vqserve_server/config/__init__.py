"""The settings of the daemon. No gRPC, no torch."""

from vqserve_server.config.settings import ENV_PREFIX, AccessConfig, EngineConfig, RpcConfig, ServeConfig, flag
from vqserve_server.config.sources import ConfigError, add_flags, environment, resolve
from vqserve_server.config.tables import settings_table

__all__ = [
    "ENV_PREFIX",
    "AccessConfig",
    "ConfigError",
    "EngineConfig",
    "RpcConfig",
    "ServeConfig",
    "add_flags",
    "environment",
    "flag",
    "resolve",
    "settings_table",
]
