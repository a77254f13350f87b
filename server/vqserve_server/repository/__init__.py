"""The codebooks on disk, loaded and fit to serve, and loaded again when they have changed."""

from vqserve_server.repository.repository import Repository
from vqserve_server.repository.rescans import Rescans

__all__ = ["Repository", "Rescans"]
