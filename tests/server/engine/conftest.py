"""Engines with fake tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from vqserve_server.config import EngineConfig
from vqserve_server.engine import Engine


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Start an engine: start(fake, threads=2, max_batch_rows=10)."""
    with ExitStack() as stack:

        def make(
            *tokenizers: Any, threads: int | None = None, on_broken: Callable[[], None] = lambda: None, **config: int
        ) -> Engine:
            engine = Engine(tokenizers, EngineConfig(**config), threads=threads, on_broken=on_broken)

            def end() -> None:
                for tokenizer in tokenizers:
                    tokenizer.release()
                assert engine.stop()

            stack.callback(end)
            engine.start()
            return engine

        yield make
