"""What a process, or a thread, may have set around us changes no codebook, no digest and no token."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import pytest
import torch

from kinds import CASES, make
from vqserve_server import Tokenizer
from vqserve_server.codebooks import codebook_digest, load_codebook, save_codebook


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_tensor_type() -> Iterator[None]:
    before = torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_default_tensor_type(torch.DoubleTensor)
        try:
            yield
        finally:
            torch.set_default_tensor_type(torch.FloatTensor)
            torch.set_default_dtype(before)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def mkldnn_precision(precision: str) -> Iterator[None]:
    torch.backends.mkldnn.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def flush_denormal() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def conversion(setting: str) -> Iterator[None]:
    set_to = getattr(torch.__future__, f"set_{setting}")
    set_to(True)
    try:
        yield
    finally:
        set_to(False)


@contextmanager
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


STATES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "none": nullcontext,
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default tensor type": default_tensor_type,
    "default device meta": lambda: default_device("meta"),
    "device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "detect anomaly": torch.autograd.detect_anomaly,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "matmul precision medium": lambda: matmul_precision("medium"),
    "matmul precision high": lambda: matmul_precision("high"),
    "oneDNN in bfloat16": lambda: mkldnn_precision("bf16"),
    "deterministic algorithms": deterministic,
    "one thread": lambda: threads(1),
    "five threads": lambda: threads(5),
    "flush denormal": flush_denormal,
    "swap on conversion": lambda: conversion("swap_module_params_on_conversion"),
    "overwrite on conversion": lambda: conversion("overwrite_module_params_on_conversion"),
    "numpy raises": lambda: np.errstate(all="raise"),
    "warnings are errors": warnings_are_errors,
}


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[object]]:
    return STATES[request.param]


def answers(tokenizer: Tokenizer, latents: np.ndarray) -> tuple[object, ...]:
    indices = tokenizer.encode(latents)
    info = tokenizer.info
    tokens = np.arange(info.num_codes if info.has_stages else tokenizer.decodable)
    decoded = tokenizer.decode(np.repeat(tokens[:, None], info.num_quantizers, axis=1) if info.has_stages else tokens)
    return (info, tokenizer.weight_dtype, indices.dtype, indices.tobytes(), decoded.dtype, decoded.tobytes())


def hard_latents(channels: int) -> np.ndarray:
    """Return latents (n, channels) with ties, zeros, and numbers near float32's ends."""
    # Long enough for the searches to use threads and matrix products.
    latents = np.random.default_rng(0).normal(size=(320, channels)).astype(np.float32)
    latents[::8] = np.round(latents[::8])
    latents[1::8] = 0
    latents[2::16] *= np.float32(1e-42)
    latents[3::16] *= np.float32(1e15)
    return latents


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("kind", CASES)
def test_loaded_and_served(tmp_path, state, kind):
    quantizer = make(kind)
    path = tmp_path / "one.safetensors"
    digest = save_codebook(quantizer, path)
    latents = hard_latents(quantizer.input_dim)
    usual = Tokenizer.load(path)
    expected = answers(usual, latents)
    with state():
        codebook = load_codebook(path)
        inside = Tokenizer.load(path)
        assert answers(inside, latents) == expected
        assert answers(usual, latents) == expected
        assert codebook_digest(codebook.quantizer) == digest
        assert save_codebook(codebook.quantizer, tmp_path / "again.safetensors") == digest
    assert answers(inside, latents) == expected
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    loaded = codebook.quantizer.state_dict()
    for name, tensor in quantizer.state_dict().items():
        assert (loaded[name].dtype, loaded[name].device) == (tensor.dtype, tensor.device)
        assert torch.equal(loaded[name], tensor)
    # As any module that was loaded: it can be trained and changed.
    assert not any(tensor.is_inference() for tensor in codebook.quantizer.state_dict().values())
