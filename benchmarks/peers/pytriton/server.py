"""PyTriton: Triton Inference Server with a Python function behind it, by gRPC."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernel import INDEX_DTYPE, OPERATION, PORT, SHAPE, kernel


def main() -> None:
    size, channels, height, width = SHAPE
    latents = Tensor(name="latents", dtype=np.float32, shape=(channels, height, width))
    indices = Tensor(name="indices", dtype=INDEX_DTYPE, shape=(height, width))
    given, made = (latents, indices) if OPERATION == "encode" else (indices, latents)
    compute = kernel()

    @batch
    def tokenize(**arrays: np.ndarray) -> dict[str, np.ndarray]:
        return {made.name: compute(arrays[given.name])}

    config = TritonConfig(
        grpc_address="127.0.0.1", grpc_port=PORT, http_address="127.0.0.1", http_port=PORT + 1, metrics_port=PORT + 2
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="tokenize",
            infer_func=tokenize,
            inputs=[given],
            outputs=[made],
            config=ModelConfig(max_batch_size=16 * size, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()


if __name__ == "__main__":
    main()
