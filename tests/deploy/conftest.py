from __future__ import annotations

import pytest

from vqserve_tools.cli import main


@pytest.fixture
def settings(monkeypatch):
    """Return what `vqserved` with these words and variables would serve, and the settings."""

    def read(words, environment=()):
        seen = {}
        monkeypatch.setattr("vqserve_server.app.run", lambda sources, config, *, worker: seen.update(vars()) or 0)
        with monkeypatch.context() as context:
            for name, value in dict(environment).items():
                context.setenv(name, value)
            assert main(words) == 0
        return seen["sources"], seen["config"]

    return read
