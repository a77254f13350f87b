"""The packages of the extras `server` and `trace`; without them the client still works."""

EXTRAS = {
    "server": frozenset({"einops", "grpc_reflection", "prometheus_client", "torch"}),
    "trace": frozenset({"opentelemetry"}),
}


def missing_package(error: Exception) -> str | None:
    """Return what to install if an import failed for lack of an extra; None: the error is another one."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = (error.name or "").partition(".")[0]
    missing = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    return missing and f"{package} is not installed: pip install 'vqserve[{missing}]'"
