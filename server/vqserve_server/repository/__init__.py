"""The codebooks on disk, loaded and fit to serve, and loaded again when they have changed."""

from vqserve_server.repository.load import Repository
from vqserve_server.repository.reload import Reloader

__all__ = ["Reloader", "Repository"]
