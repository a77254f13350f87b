"""Faults of a device in a real server of one process: what its callers see, and that it never stays and seems well."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.faults import Faults
from vqserve.errors import DeviceBroken, Overloaded, ServerError, Unavailable
from vqserve_client import Client

LATENTS = np.random.default_rng(0).standard_normal((700, 4)).astype(np.float32)


@pytest.fixture
def daemon(vqserved: Callable[..., Any], tmp_path: Path, tokenizer: Any, faults: Faults) -> Any:
    return vqserved(tmp_path / "book.safetensors", "--watchdog-seconds", 4, **faults.environ)


def ends(daemon: Any) -> str:
    """Wait until the process has ended by itself, with 1, and return its log."""
    _, log = daemon.process.communicate()
    assert daemon.process.returncode == 1, log
    assert log.splitlines()[-1] == "vqserved: error: the device failed; the log has the reason"
    return log


def test_a_computation_that_does_not_return(daemon: Any, faults: Faults) -> None:
    with Client(daemon.target, retries=0) as client:
        client.encode(LATENTS)
        faults.put("hang")
        with pytest.raises(DeviceBroken, match="the device does not answer"):
            client.encode(LATENTS)
    log = ends(daemon)
    assert "CRITICAL device_hung codebook=book rows=700 requests=1 seconds=4" in log
    # The log shows where.
    assert "in stand_still" in log


def test_a_device_that_hangs_while_nobody_asks(daemon: Any, faults: Faults) -> None:
    faults.put("hang")
    assert "device_hung codebook=book rows=16" in ends(daemon)
    assert faults.has_happened()


def test_a_device_that_computes_garbage(daemon: Any, faults: Faults) -> None:
    faults.put("garbage")
    assert "CRITICAL device_wrong codebook=book wrong_rows=" in ends(daemon)


def test_a_device_on_which_everything_fails(daemon: Any, faults: Faults) -> None:
    faults.put("failing")
    with Client(daemon.target, retries=0) as client, pytest.raises(ServerError):
        client.encode(LATENTS)
    assert "CRITICAL canary_failed codebook=book times=3" in ends(daemon)


@pytest.mark.parametrize("drain_seconds", [0, 3600])
def test_a_lost_device(
    vqserved: Callable[..., Any], tmp_path: Path, tokenizer: Any, faults: Faults, drain_seconds: int
) -> None:
    daemon = vqserved(tmp_path / "book.safetensors", "--drain-seconds", drain_seconds, **faults.environ)
    with grpc.insecure_channel(daemon.target) as channel, Client(daemon.target, retries=0) as client:
        states = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        # A stream that neither sends nor ends does not hold it up.
        idle = channel.stream_stream("/vqserve.v1.TokenizerService/EncodeStream")(iter(threading.Event().wait, None))
        faults.put("sticky")
        with pytest.raises(DeviceBroken):
            client.encode(LATENTS)
        assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
        log = ends(daemon)
        assert idle.code() is not grpc.StatusCode.OK
    assert "CRITICAL device_failed" in log
    assert "an illegal memory access" in log


def test_a_stuck_transport(daemon: Any, faults: Faults) -> None:
    faults.put("hang_transport")
    with grpc.insecure_channel(daemon.target) as channel:
        # Kept: a call that nobody holds is cancelled.
        check = health_pb2_grpc.HealthStub(channel).Check.future(health_pb2.HealthCheckRequest())
        _, log = daemon.process.communicate()
        assert check.code() is not grpc.StatusCode.OK
    assert daemon.process.returncode == 1
    assert "CRITICAL thread_hung thread=vqserve-grpc" in log
    assert "in stand_still" in log


def test_a_stuck_event_loop(daemon: Any, faults: Faults) -> None:
    faults.put("hang_loop")
    daemon.process.send_signal(signal.SIGHUP)
    _, log = daemon.process.communicate()
    assert daemon.process.returncode == 1
    assert "CRITICAL thread_hung thread=MainThread" in log


def test_a_long_queue_is_no_hang(daemon: Any, tokenizer: Any, faults: Faults) -> None:
    """Its callers wait for longer than a computation may take."""
    faults.put("slow", 0.7)
    expected = tokenizer.encode(LATENTS[:5])
    with Client(daemon.target) as client, ThreadPoolExecutor(12) as pool:
        # Of each thread in turn, and each in a batch of its own: of two precisions.
        found = list(
            pool.map(lambda number: client.encode(LATENTS[:5].astype((np.float32, np.float64)[number % 2])), range(24))
        )
    for indices in found:
        np.testing.assert_array_equal(indices, expected)
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_too_little_memory(daemon: Any, tokenizer: Any, faults: Faults) -> None:
    faults.put("out_of_memory", 100)
    with Client(daemon.target, retries=0) as client:
        np.testing.assert_array_equal(client.encode(LATENTS), tokenizer.encode(LATENTS))
        faults.put("out_of_memory", 20)
        with pytest.raises(Overloaded, match="too little memory"):
            client.encode(LATENTS)
        # What is small enough goes on.
        np.testing.assert_array_equal(client.encode(LATENTS[:20]), tokenizer.encode(LATENTS[:20]))
        faults.clear()
        np.testing.assert_array_equal(client.encode(LATENTS), tokenizer.encode(LATENTS))
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    assert "WARNING out_of_memory codebook=book rows=700 retried_rows=350" in log


def test_a_server_that_was_stopped_for_long_goes_on(daemon: Any, tokenizer: Any) -> None:
    """As by `docker pause`, or under a debugger."""
    daemon.process.send_signal(signal.SIGSTOP)
    threading.Event().wait(6)
    daemon.process.send_signal(signal.SIGCONT)
    with Client(daemon.target) as client:
        np.testing.assert_array_equal(client.encode(LATENTS), tokenizer.encode(LATENTS))
    assert daemon.stop(signal.SIGTERM)[0] == 0


def test_a_hang_that_nobody_looks_for(
    vqserved: Callable[..., Any], tmp_path: Path, tokenizer: Any, faults: Faults
) -> None:
    daemon = vqserved(tmp_path / "book.safetensors", "--watchdog-seconds", 0, "--drain-seconds", 0.5, **faults.environ)
    faults.put("hang")
    with Client(daemon.target, timeout=6, retries=0) as client:
        with pytest.raises((TimeoutError, Unavailable)):
            client.encode(LATENTS)
        assert daemon.process.poll() is None
    assert daemon.stop(signal.SIGTERM)[0] == 0
