"""mosec: raw bytes over HTTP, batched by its Rust front."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from mosec import Server, Worker

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernel import INDEX_DTYPE, OPERATION, PORT, SHAPE, kernel


class Tokenize(Worker):
    def __init__(self) -> None:
        self._kernel = kernel()

    def deserialize(self, data: bytes) -> np.ndarray:
        if OPERATION == "encode":
            return np.frombuffer(data, np.float32).reshape(SHAPE)
        b, _, h, w = SHAPE
        return np.frombuffer(data, INDEX_DTYPE).reshape(b, h, w)

    def serialize(self, data: np.ndarray) -> bytes:
        return data.tobytes()

    def forward(self, data: list[np.ndarray]) -> list[np.ndarray]:
        return np.split(self._kernel(np.concatenate(data)), len(data))


if __name__ == "__main__":
    sys.argv += ["--port", str(PORT), "--address", "127.0.0.1", "--log-level", "error", "--timeout", "120000"]
    server = Server()
    server.append_worker(Tokenize, num=1, max_batch_size=16, max_wait_time=1, timeout=120)
    server.run()
