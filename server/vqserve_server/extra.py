"""The packages of the extra `server`; without them the client still works."""

_PACKAGES = frozenset({"einops", "grpc_reflection", "prometheus_client", "torch"})


def missing_package(error: Exception) -> str | None:
    """Return what to install if an import failed for lack of the extra; None: the error is another one."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _PACKAGES:
        return f"{error.name} is not installed: pip install 'vqserve[server]'"
    return None
