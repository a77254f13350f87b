"""The codebooks on disk, loaded and fit to serve, and loaded again when they have changed."""

from vqserve_server.repository.load import Repository
from vqserve_server.repository.reload import Rescans

__all__ = ["Repository", "Rescans"]
