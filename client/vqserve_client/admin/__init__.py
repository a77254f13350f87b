"""Operates a server: what the service AdminService can do, for callers whose access token has `admin = true`."""

from vqserve_client.admin.client import (
    AdminClient,
    LiveCodebook,
    LogLevel,
    WorkerDrain,
    WorkerLogLevel,
    WorkerReload,
    WorkerStatus,
)

__all__ = ["AdminClient", "LiveCodebook", "LogLevel", "WorkerDrain", "WorkerLogLevel", "WorkerReload", "WorkerStatus"]
