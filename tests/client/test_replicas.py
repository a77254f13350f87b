"""Several servers behind one target: the load is even, and calls move from a server that goes to one that serves."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.load import Load
from support.names import HERE, port_of
from support.waiting import eventually
from vqserve_client import Client, Unavailable


def connected(client, servers, latents):
    """Call until each server has answered, so that all connections are open; then forget these calls."""

    def all_answered():
        client.encode(latents)
        return all(server.requests for server in servers)

    eventually(all_answered)
    for server in servers:
        server.requests.clear()


def test_three_clients_use_both_servers_of_a_name_evenly(replicas, named, connect, latents):
    first, second = servers = replicas(*HERE[:2])
    target = named(*HERE[:2]).target(port_of(first))
    for _ in range(3):
        client = connect(target)
        connected(client, servers, latents(2, 4))
        for _ in range(20):
            client.encode(latents(2, 4))
        # Of two that are free, the one that was not used last.
        assert abs(len(first.requests) - len(second.requests)) <= 1
        for server in servers:
            server.requests.clear()


def test_a_list_is_used_evenly(replicas, connect, latents):
    servers = replicas(*HERE)
    client = connect(",".join(server.target for server in servers))
    connected(client, servers, latents(2, 4))
    for _ in range(30):
        client.encode(latents(2, 4))
    assert [len(server.requests) for server in servers] == [10, 10, 10]


def test_a_new_server_of_a_name_is_found(replicas, named, connect, latents):
    """The name is resolved again when a connection ends, as it does at the age that the server gives it."""
    old = replicas(*HERE[:2])
    names = named(*HERE[:2])
    client = connect(names.target(port_of(old[0])))
    connected(client, old, latents(2, 4))
    (new,) = replicas(HERE[2], port=port_of(old[0]))
    names.addresses = HERE[1:]
    old[0].grpc_server.stop(None)
    # No call fails meanwhile.
    connected(client, [new], latents(2, 4))
    before = len(old[0].requests)
    for _ in range(20):
        client.encode(latents(2, 4))
    assert (len(old[0].requests), len(new.requests)) == (before, 10)


def test_a_server_that_drains_gets_no_more_calls(replicas, connect, latents):
    """It has one slow request left; the other calls go elsewhere, without a retry."""
    draining, serving = servers = replicas(*HERE[:2])
    target = f"{draining.target},{serving.target}"
    client = connect(target, retries=0)
    connected(client, servers, latents(2, 4))
    ends = threading.Event()
    draining.script.append(lambda request, context, honest: ends.wait() and honest())
    with Client(draining.target) as slow, ThreadPoolExecutor(1) as pool:
        last = pool.submit(slow.encode, latents(2, 4))
        eventually(lambda: not draining.script)
        # Sends GOAWAY at once, and then waits for the slow request.
        stopped = draining.grpc_server.stop(1 << 20)

        def moved():
            before = len(draining.requests)
            for _ in range(4):
                client.encode(latents(2, 4))
            return len(draining.requests) == before

        eventually(moved)
        ends.set()
        assert last.result().shape == (2,)
        assert stopped.wait(60)


def test_unavailable_of_one_server_is_no_error(replicas, connect, failing, latents):
    broken, serving = servers = replicas(*HERE[:2])
    client = connect(f"{broken.target},{serving.target}")
    connected(client, servers, latents(2, 4))
    broken.script.extend([failing("UNAVAILABLE")] * 3)
    # It rests after each failure.
    eventually(lambda: client.encode(latents(2, 4)).shape == (2,) and not broken.script)
    before = len(broken.requests)
    eventually(lambda: client.encode(latents(2, 4)).shape == (2,) and len(broken.requests) > before)


def test_servers_with_different_codebooks(replicas, codes, connect, latents, monkeypatch, apart):
    """As while a new codebook is rolled out: each call has one of them, and none fails."""
    monkeypatch.setattr("vqserve_client.transport.STREAM_S", 0.001)
    old, new = servers = replicas(*HERE[:2])
    new.codes["small"] = codes("small", seed=1)
    client = connect(f"{old.target},{new.target}")
    eventually(lambda: client.encode(latents(9, 4)) is not None and all(server.requests for server in servers))
    for call in range(20):
        array = latents(9, 4, seed=call)
        expected = [server.codes["small"].encode(array).tolist() for server in servers]
        assert client.encode(array).tolist() in expected
    arrays = [latents(9, 4, seed=number) for number in range(50)]
    results = [indices.tolist() for indices in client.encode_many(arrays)]
    assert results in [[server.codes["small"].encode(array).tolist() for array in arrays] for server in servers]


def test_servers_of_which_none_is_there(connect, latents):
    with pytest.raises(Unavailable, match=r"^cannot connect to the server: Connection refused; tried 2 times"):
        connect("127.0.0.1:1,127.0.0.2:1", retries=1).encode(latents(2, 4))


def test_a_long_job_on_streams_uses_all_servers(replicas, connect, latents, monkeypatch, apart):
    monkeypatch.setattr("vqserve_client.transport.STREAM_S", 0.01)
    servers = replicas(*HERE)
    client = connect(",".join(server.target for server in servers))
    connected(client, servers, latents(2, 4))
    singles = [server.singles for server in servers]
    used = threading.Event()

    def until_all_are_used():
        while not used.is_set():
            yield latents(2, 4)

    for count, _ in enumerate(client.encode_many(until_all_are_used())):
        if all(server.requests for server in servers) or count > 100_000:
            used.set()
    assert all(server.requests for server in servers)
    assert [server.singles for server in servers] == singles


def test_servers_that_hang_or_are_killed_fail_no_call(vqserved, put, tmp_path, latents):
    path = tmp_path / "book.safetensors"
    put(path)
    daemons = [vqserved(f"book={path}", "--device", "cpu", "--host", host) for host in HERE]
    target = ",".join(daemon.target for daemon in daemons)
    with Load(target, latents(4, 4)) as load:
        hung = daemons[0].process
        hung.send_signal(signal.SIGSTOP)
        try:
            load.goes_on()
        finally:
            hung.send_signal(signal.SIGCONT)
        load.goes_on()
        daemons[1].process.kill()
        load.goes_on()
        daemons[2].process.send_signal(signal.SIGTERM)
        load.goes_on()
