"""Clients of the SDK, with its defaults, in a loop."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from reliability.beside import Control
from reliability.messages import CHANNELS, CHEAP
from vqserve_client import Client

_TOKENS = 64


@dataclass
class Outcome:
    """What the callers of the SDK saw."""

    calls: int = 0
    slowest_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        return self.errors.total()


def call_in_a_loop(control: Control, target: str, clients: int, calls_per_s: float) -> Outcome:
    """Call with several clients, each from a thread of its own; an error is counted, and the loop goes on.

    Args:
        control: see Beside.
        target: as the SDK takes it.
        clients: number of clients.
        calls_per_s: of all clients together; less where a call takes longer.
    """
    outcome, lock = Outcome(), threading.Lock()
    pause_s = clients / calls_per_s
    began = threading.Barrier(clients + 1)

    latents = np.random.default_rng(0).standard_normal((_TOKENS, CHANNELS), dtype=np.float32)

    def one(client: Client) -> None:
        with client:
            client.encode(latents)
            began.wait(60)
            while not control.wait(pause_s):
                start = time.monotonic()
                error = ""
                try:
                    client.encode(latents)
                except Exception as raised:
                    error = f"{type(raised).__name__}: {str(raised)[:160]}"
                with lock:
                    outcome.calls += 1
                    outcome.slowest_s = max(outcome.slowest_s, time.monotonic() - start)
                    if error:
                        outcome.errors[error] += 1

    threads = [threading.Thread(target=one, args=(Client(target, codebook=CHEAP),)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    began.wait(60)
    control.begin()
    for thread in threads:
        thread.join()
    return outcome
