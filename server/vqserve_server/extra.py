"""The packages of the extras `server` and `trace`; without them the client still works."""

import importlib.util

EXTRAS = {
    "server": frozenset({"einops", "grpc_reflection", "prometheus_client", "torch"}),
    "trace": frozenset({"opentelemetry"}),
}


def check_server_extra() -> None:
    """Check that torch is installed, without importing it: a server that does not need it may at its next reload.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")


def missing_package(error: Exception) -> str | None:
    """Return what to install if an import failed for lack of an extra; None: the error is another one."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = (error.name or "").partition(".")[0]
    missing = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    return missing and f"{package} is not installed: pip install 'vqserve[{missing}]'"
