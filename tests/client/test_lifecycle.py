"""Closing, forking, pickling, sharing."""

from __future__ import annotations

import contextlib
import copy
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.names import name_server
from vqserve_client import AsyncClient, Client, Closed
from vqserve_client.calls import ArrayRequest
from vqserve_client.interrupts import SignalsDeferred


def test_use_after_close(tiny, connect, latents):
    client = connect(tiny.target)
    client.encode(latents(2, 4))
    client.close()
    client.close()
    for call in (
        lambda: client.encode(latents(2, 4)),
        client.codebooks,
        lambda: next(client.encode_many([latents(2, 4)])),
    ):
        with pytest.raises(Closed, match="this client is closed"):
            call()


def test_close_before_use_opens_nothing(connect):
    client = connect("127.0.0.1:1")
    client.close()
    with pytest.raises(Closed):
        client.codebooks()


def test_close_during_a_call(tiny, latents):
    tiny.gate.clear()
    client = Client(tiny.target)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.encode, latents(2, 4))
        tiny.arrived.acquire()
        client.close()
        with pytest.raises(Closed, match="during the call"):
            call.result()


def test_context_manager_closes(tiny):
    with Client(tiny.target) as client:
        assert client.codebooks()
    with pytest.raises(Closed):
        client.codebooks()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_repr(kind):
    assert repr(kind("host:1")) == f"{kind.__name__}('host:1', timeout=60)"
    client = kind("host:1", codebook="a", digest="0" * 64, timeout=1.5)
    assert repr(client) == f"{kind.__name__}('host:1', codebook='a', digest='{'0' * 64}', timeout=1.5)"


def test_repr_says_closed():
    client = Client("host:1")
    client.close()
    assert "closed" in repr(client)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"timeout": 0}, ValueError),
        ({"timeout": "1"}, TypeError),
        ({"timeout": True}, TypeError),
        ({"retries": -1}, ValueError),
        ({"retries": 1.0}, TypeError),
        ({"window": 0}, ValueError),
        ({"max_message_bytes": 10}, ValueError),
        ({"max_message_bytes": 1 << 40}, ValueError),
        ({"codebook": 3}, TypeError),
        ({"digest": "0" * 65}, ValueError),
        ({"digest": "0" * 7}, ValueError),
        ({"connections": 0}, ValueError),
        ({"connections": 257}, ValueError),
        ({"target": []}, ValueError),
        ({"target": ["host:1", 2]}, TypeError),
        ({"target": ""}, ValueError),
        ({"target": "http://host:1"}, ValueError),
        ({"target": "host"}, ValueError),
        ({"target": "host:http"}, ValueError),
        ({"target": "host:70000"}, ValueError),
        ({"target": ":50051"}, ValueError),
        ({"target": None}, TypeError),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_options_are_checked(kind, options, error):
    with pytest.raises(error, match=next(iter(options))):
        kind(**{"target": "localhost:1", **options})


@pytest.mark.parametrize("target", ["host:1", "127.0.0.1:65535", "[::1]:50051", "unix:socket", "unix:///run/socket"])
def test_targets_that_may_be(target):
    with Client(target) as client:
        assert client.target == target


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        Client("localhost:1", "codebook")  # type: ignore[misc]


def test_pickle_and_copy(tiny, connect, latents):
    original = Client(tiny.target, codebook="small", timeout=7, max_message_bytes=2048)
    expected = original.encode(latents(200, 4))
    for clone in (pickle.loads(pickle.dumps(original)), copy.copy(original), copy.deepcopy(original)):  # noqa: S301
        assert repr(clone) == repr(original)
        assert (clone.encode(latents(200, 4)) == expected).all()
        clone.close()
    assert original.encode(latents(2, 4)).shape == (2,)
    original.close()
    clone = pickle.loads(pickle.dumps(AsyncClient(tiny.target)))  # noqa: S301
    assert isinstance(clone, AsyncClient)


def test_sixteen_threads_share_a_client(tiny, latents):
    arrays = [latents(40 + seed, 4, seed=seed) for seed in range(16)]
    expected = [tiny.codes["small"].encode(array).tolist() for array in arrays]
    barrier = threading.Barrier(16)

    with Client(tiny.target, max_message_bytes=1024) as client, ThreadPoolExecutor(16) as pool:

        def work(number: int) -> bool:
            barrier.wait()
            return all(client.encode(arrays[number]).tolist() == expected[number] for _ in range(5))

        assert all(pool.map(work, range(16)))


FORK = """
import asyncio, multiprocessing, os, sys, threading
import numpy as np
from vqserve_client import AsyncClient, Client, Closed
from vqserve_client.interrupts import SignalsDeferred

target, how = sys.argv[1:]
latents = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
client, awaited = Client(target, timeout=30), AsyncClient(target, timeout=30)
expected = client.encode(latents)
generator = client.encode_many([latents] * 9)
next(generator)
asyncio.run(awaited.encode(latents))

def work():
    assert (client.encode(latents) == expected).all()
    assert (asyncio.run(awaited.encode(latents)) == expected).all()
    assert len(list(client.encode_many([latents] * 5))) == 5
    try:
        list(generator)
    except Closed as error:
        assert "fork" in str(error)
    else:
        raise AssertionError("the parent's generator went on in the child")
    return os.getpid()

def by_os_fork(count):
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            work()
            # A normal end, so that whatever was inherited is torn down here.
            sys.exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)

def by_pool(count):
    with multiprocessing.get_context("fork").Pool(count, maxtasksperchild=1) as pool:
        assert os.getpid() not in [pool.apply(work) for _ in range(count)]

def by_os_fork_under_load(count):
    stop = threading.Event()
    def load():
        while not stop.is_set():
            client.encode(latents)
    threads = [threading.Thread(target=load, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    by_os_fork(count)
    stop.set()
    for thread in threads:
        thread.join()

{"fork": by_os_fork, "pool": by_pool, "load": by_os_fork_under_load}[how](3)
assert (client.encode(latents) == expected).all()
assert len(list(generator)) == 8
print("done")
"""


def forked(target, how):
    """Run the program."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, target, how],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


@pytest.mark.parametrize("how", ["fork", "pool", "load"])
def test_fork(tiny, how):
    forked(tiny.target, how)


@pytest.mark.parametrize("how", ["fork", "load"])
def test_fork_with_several_servers(replicas, how):
    forked(",".join(server.target for server in replicas("127.0.0.1", "127.0.0.2")), how)


@pytest.mark.parametrize("how", ["fork", "load"])
def test_fork_with_the_servers_of_a_name(replicas, how):
    servers = replicas("127.0.0.1", "127.0.0.2")
    with name_server("127.0.0.1", "127.0.0.2") as names:
        forked(names.target(servers[0].target.rpartition(":")[2]), how)


def test_a_process_that_ends_without_closing(tiny):
    program = f"from vqserve_client import Client; c = Client({tiny.target!r}); print(c.codebooks()[0].name)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "small\n", "")


def test_signals_are_put_off_and_then_come():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    reached = []

    def step() -> None:
        with SignalsDeferred():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end of the step")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert reached
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ctrl_c_while_handlers_are_restored_restores_the_others(monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    came = []
    signal.signal(signal.SIGTERM, lambda *_: came.append("SIGTERM"))
    mine = signal.getsignal(signal.SIGTERM)
    plain = signal.signal

    def put_back(number, handler):
        old = plain(number, handler)
        if handler is before[0]:
            signal.raise_signal(signal.SIGINT)
        return old

    def step() -> None:
        with SignalsDeferred():
            signal.raise_signal(signal.SIGTERM)
            monkeypatch.setattr("vqserve_client.interrupts.set_handler", put_back)

    try:
        with pytest.raises(KeyboardInterrupt):
            step()
        assert came == ["SIGTERM"]
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is before[0]
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGTERM, before[1])


def test_ctrl_c_ends_a_waiting_call_and_the_client_still_works(tiny, latents):
    with Client(tiny.target) as client:
        client.codebooks()
        tiny.gate.clear()

        def interrupt() -> None:
            tiny.arrived.acquire()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            client.encode(latents(2, 4))
        thread.join()
        assert tiny.cancelled.acquire(timeout=60)
        tiny.gate.set()
        assert client.encode(latents(2, 4)).shape == (2,)


INTERRUPTED = """
import signal, sys, threading, time
import numpy as np
from vqserve_client import Client

client = Client(sys.argv[1], timeout=600)
latents = np.zeros((2, 4), np.float32)
client.encode(latents)
came = []
signal.signal(signal.SIGTERM, lambda *_: came.append("SIGTERM"))
print("ready", flush=True)
input()
try:
    client.encode(latents)
except KeyboardInterrupt:
    print(*came, "Ctrl-C")
client.close()
"""


def test_handlers_run_while_a_call_waits_and_only_one_that_raises_ends_it(tiny):
    command = [sys.executable, "-c", INTERRUPTED, tiny.target]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(process.kill)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # The server cannot tell a call that has ended from one that was cancelled.
        assert tiny.arrived.acquire(timeout=60)
        assert tiny.cancelled.acquire(timeout=60)
        tiny.gate.clear()
        process.stdin.write("\n")
        process.stdin.flush()
        assert tiny.arrived.acquire(timeout=60)
        process.send_signal(signal.SIGTERM)
        # Long enough that the signals usually come apart; nothing depends on it.
        assert not tiny.cancelled.acquire(timeout=0.5)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "SIGTERM Ctrl-C\n"
    assert tiny.cancelled.acquire(timeout=60)


def test_a_signal_before_the_wait_is_handled_in_it(tiny, monkeypatch, latents):
    """It is put off until the request has gone, and must not be put off until the reply."""
    with Client(tiny.target, timeout=600) as client:
        client.encode(latents(2, 4))
        assert tiny.cancelled.acquire(timeout=60)
        tiny.gate.clear()
        whole = ArrayRequest.message

        def interrupted(self: ArrayRequest) -> bytes:
            signal.raise_signal(signal.SIGINT)
            return whole(self)

        monkeypatch.setattr(ArrayRequest, "message", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.encode(latents(2, 4))
        assert tiny.cancelled.acquire(timeout=60)
        monkeypatch.undo()
        tiny.gate.set()
        assert client.encode(latents(2, 4)).shape == (2,)


def test_only_a_call_of_several_requests_starts_threads(tiny, latents, monkeypatch):
    with Client(tiny.target, max_message_bytes=1024) as client:
        indices = client.encode(latents(9, 4))
        started = []
        start = threading.Thread.start

        def noted(thread: threading.Thread) -> None:
            # The server, in this process, has a pool.
            if not thread.name.startswith("ThreadPool"):
                started.append(thread.name)
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", noted)
        client.encode(latents(9, 4))
        client.decode(indices)
        assert not started
        client.encode(latents(200, 4))
        assert started
