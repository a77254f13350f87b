"""Loads the codebooks on disk, and reloads them when their files have changed."""

from vqserve_server.repository.load import Repository
from vqserve_server.repository.reload import Reloader

__all__ = ["Reloader", "Repository"]
