"""One client of several servers: the load goes to who is free, and no server that goes or comes costs a result."""

from __future__ import annotations

import itertools
import logging
import pickle
import signal
import threading
import time

import pytest

from support.names import HERE, port_of
from support.waiting import eventually
from vqserve_client import Client, CodebookNotFound, DigestMismatch
from vqserve_client.resolver import resolve
from vqserve_client.target import parse_target


def until(condition, make, *, most=1_000_000):
    """Yield numbered arrays until the condition is true, and then ten more."""
    for number in range(most):
        yield number, make(number)
        if condition():
            break
    for more in range(10):
        yield number + 1 + more, make(number + 1 + more)


def served_in_order(results, codes, make):
    """Check all results; return how many there are."""
    count = 0
    for number, indices in results:
        assert number == count
        assert (indices == codes.encode(make(number))).all()
        count += 1
    return count


def test_a_list_of_targets_in_its_forms(replicas, connect, latents):
    first, second = servers = replicas(*HERE[:2])
    several = [f"localhost:{port_of(first)}", second.target]
    for target in (several, tuple(several), ",".join(several), [",".join(several)]):
        client = connect(target)
        assert client._core.config.target == ",".join(several)

        def both_answered(client=client):
            client.encode(latents(2, 4))
            return all(server.requests for server in servers)

        eventually(both_answered)
        for server in servers:
            server.requests.clear()
    with Client(several) as client, pickle.loads(pickle.dumps(client)) as copy:  # noqa: S301
        assert copy.target == client.target
        assert copy.encode(latents(2, 4)).shape == (2,)


def test_the_least_busy_server_gets_the_next_request(replicas, connect, latents, apart, monkeypatch):
    """One that is much slower gets fewer requests, by calls of their own and by streams."""
    monkeypatch.setattr("vqserve_client.transport.LARGEST_STREAMED_BYTES", 1000)
    slow, fast = replicas(*HERE[:2])

    def slowly(request, context, honest):
        time.sleep(0.05)
        return honest()

    slow.script.extend([slowly] * 100_000)
    client = connect([slow.target, fast.target])
    for shape in ((2, 4), (100, 4)):
        slow.requests.clear()
        fast.requests.clear()
        items = itertools.repeat(latents(*shape), 200)
        assert len(list(client.encode_many(items))) == 200
        # Results come in order, so that the last ones of the slow server hold up the others.
        assert 0 < len(slow.requests) < 0.8 * len(fast.requests)
    assert slow.streams
    assert fast.singles > fast.streams


def test_bytes_count_and_not_requests(replicas, connect, latents):
    first, second = servers = replicas(*HERE[:2])
    client = connect([first.target, second.target])
    pool = client._core.pool
    eventually(lambda: client.encode(latents(2, 4)).shape == (2,) and all(one.is_proven for one in _members(client)))
    large = pool.pick(1000)
    small = [pool.pick(100) for _ in range(5)]
    assert {one.target for one in small} == {server.target for server in servers} - {large.target}
    large.answered(1000)
    assert pool.pick(100) is large


def test_connections_to_one_server(streaming, connect, latents):
    client = connect(streaming.target, connections=3)
    assert client._core.pool.size == 3
    items = [latents(50, 4, seed=number) for number in range(50)]
    for item, indices in zip(items, client.encode_many(items), strict=True):
        assert (indices == streaming.codes["small"].encode(item)).all()
    eventually(lambda: client.encode(items[0]).shape == (50,) and all(one.turn for one in client._core.pool._members))


def test_more_requests_are_in_flight_at_more_servers(replicas, connect, latents, apart):
    servers = replicas(*HERE)
    for server in servers:
        server.gate.clear()
    client = connect([server.target for server in servers], window=2)
    results = client.encode_many(latents(2, 4) for _ in range(100))
    thread = threading.Thread(target=lambda: assert_length(results, 100))
    thread.start()
    # The first array alone finds out what the codebook is; with its reply all servers have work.
    eventually(lambda: any(server.active for server in servers))
    for server in servers:
        server.gate.set()
    thread.join()
    assert all(server.peak <= 6 for server in servers)
    assert all(server.requests for server in servers)


def assert_length(results, number):
    assert len(list(results)) == number


def test_one_that_is_killed_costs_no_result(vqserved, put, tmp_path, latents):
    path = tmp_path / "book.safetensors"
    codes = put(path)
    daemons = [vqserved(f"book={path}", "--device", "cpu", "--host", host) for host in HERE[:2]]
    killed = []

    def make(number):
        return latents(7, 4, seed=number % 100)

    def items():
        yield from ((number, make(number)) for number in range(500))
        daemons[0].process.kill()
        daemons[0].process.wait()
        killed.append(True)
        yield from ((number, make(number)) for number in range(500, 2000))

    with Client([daemon.target for daemon in daemons]) as client:
        assert served_in_order(client.encode_many(items()), codes, make) == 2000
    assert killed


def test_one_that_drains_costs_no_result(vqserved, put, tmp_path, latents):
    path = tmp_path / "book.safetensors"
    codes = put(path)
    made = itertools.count()
    daemons = [vqserved(f"book={path}", "--device", "cpu", "--host", host) for host in HERE[:2]]

    def make(number):
        return latents(7, 4, seed=number % 100)

    def items():
        for number in made:
            if number == 500:
                daemons[0].process.send_signal(signal.SIGTERM)
            if number > 500 and daemons[0].process.poll() is not None:
                return
            yield number, make(number)

    with Client([daemon.target for daemon in daemons], retries=0) as client:
        assert served_in_order(client.encode_many(items()), codes, make) > 500


def test_one_of_a_list_that_comes_later_takes_its_share(vqserved, put, tmp_path, latents):
    path = tmp_path / "book.safetensors"
    put(path)
    first = vqserved(f"book={path}", "--device", "cpu", "--host", HERE[0])
    port = first.target.rpartition(":")[2]
    target = [first.target, f"{HERE[1]}:{port}"]
    with Client(target) as client:

        def items():
            for number in itertools.count():
                if number == 100:
                    assert not _members(client)[1].is_proven
                    vqserved(f"book={path}", "--device", "cpu", "--host", HERE[1], "--port", port)
                if number > 100 and _members(client)[1].is_proven:
                    # One more request at least.
                    yield from (latents(7, 4) for _ in range(1000))
                    return
                yield latents(7, 4)

        assert sum(1 for _ in client.encode_many(items())) > 1100
        one, second = _members(client)
        assert abs(one.turn - second.turn) < second.turn / 2


def _members(client):
    return client._core.pool._members


def test_a_new_address_of_a_name_takes_its_share_while_a_call_runs(
    replicas, named, connect, latents, monkeypatch, apart
):
    monkeypatch.setattr("vqserve_client.pool.LOOK_UP_S", 0.2)
    old = replicas(*HERE[:2])
    names = named(*HERE[:2])
    client = connect(names.target(port_of(old[0])))
    new = []

    def make(number):
        return latents(5, 4, seed=number % 100)

    def joined():
        if not new:
            new.extend(replicas(HERE[2], port=port_of(old[0])))
            names.addresses = HERE
        return len(new[0].requests) > 20

    count = served_in_order(client.encode_many(until(joined, make)), old[0].codes["small"], make)
    assert count > 20
    # And one that the name has no longer gets nothing more.
    names.addresses = HERE[1:]
    eventually(lambda: client.encode(make(0)).shape == (5,) and client._core.pool.size == 2)
    before = len(old[0].requests)
    for _ in range(20):
        client.encode(make(0))
    assert len(old[0].requests) == before


def test_a_name_with_one_address_is_left_to_grpc(replicas, named, connect, latents):
    (server,) = replicas(HERE[0])
    names = named(HERE[0])
    client = connect(names.target(port_of(server)))
    for _ in range(3):
        assert client.encode(latents(2, 4)).shape == (2,)
    assert names.asked.acquire(timeout=60)
    assert [one.address.uri for one in _members(client)] == [client._core.config.target]


def test_a_name_that_is_lost_keeps_its_addresses(replicas, named, connect, latents, monkeypatch):
    monkeypatch.setattr("vqserve_client.pool.LOOK_UP_S", 0.05)
    servers = replicas(*HERE[:2])
    names = named(*HERE[:2])
    client = connect(names.target(port_of(servers[0])))
    eventually(lambda: client.encode(latents(2, 4)).shape == (2,) and client._core.pool.size == 2)
    names.addresses = ()
    while names.asked.acquire(blocking=False):
        pass
    eventually(lambda: client.encode(latents(2, 4)).shape == (2,) and names.asked.acquire(blocking=False))
    for _ in range(20):
        assert client.encode(latents(2, 4)).shape == (2,)
    assert client._core.pool.size == 2


def test_a_server_with_another_codebook_is_left_out_by_name(replicas, codes, connect, latents, caplog, apart):
    first, other = replicas(*HERE[:2])
    client = connect([first.target, other.target], digest=first.codes["small"].info.digest)
    other.codes["small"] = codes("small", seed=1)
    items = [latents(5, 4, seed=number) for number in range(200)]
    with caplog.at_level(logging.WARNING, "vqserve_client"):
        for item, indices in zip(items, client.encode_many(items), strict=True):
            assert (indices == first.codes["small"].encode(item)).all()
        eventually(lambda: client.encode(items[0]).shape == (5,) and other.requests)
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warned
    assert all(text.startswith(f"server {other.target} is left out of calls with digest ") for text in warned)
    assert len(warned) == len(set(warned))


def test_a_digest_that_only_the_second_server_has(replicas, codes, connect, latents):
    first, second = replicas(*HERE[:2])
    second.codes["small"] = codes("small", seed=1)
    wanted = second.codes["small"]
    client = connect([first.target, second.target])
    array = latents(9, 4)
    for _ in range(5):
        assert (client.encode(array, digest=wanted.info.digest) == wanted.encode(array)).all()
    second.codes["more"] = codes("more", seed=2)
    assert (client.encode(array, codebook="more") == second.codes["more"].encode(array)).all()
    with pytest.raises(DigestMismatch):
        client.encode(array, codebook="small", digest="f" * 64)
    with pytest.raises(CodebookNotFound):
        client.encode(array, codebook="none")


def test_without_retries_another_server_is_tried_all_the_same(replicas, connect, latents):
    (server,) = replicas(HERE[0])
    client = connect([server.target, f"{HERE[1]}:{port_of(server)}"], retries=0)
    for _ in range(20):
        assert client.encode(latents(2, 4)).shape == (2,)


def test_what_a_name_has(named, monkeypatch):
    (name,) = parse_target(named("127.0.0.9", "127.0.0.10").target(1)).addresses
    assert resolve(name) == ("127.0.0.9", "127.0.0.10")
    entries = [
        (None, None, None, "", (ip, 1)) for ip in ("fd00::1", "10.0.0.10", "fe80::1%eth0", "10.0.0.9", "fd00::1")
    ]
    monkeypatch.setattr("socket.getaddrinfo", lambda host, port, **_: entries)
    (own,) = parse_target("vq.example:1").addresses
    assert resolve(own) == ("10.0.0.9", "10.0.0.10", "fd00::1")
    monkeypatch.undo()
    silent = parse_target("dns://127.0.0.1:9/replicas.test:1").addresses[0]
    with pytest.raises(OSError):  # noqa: PT011
        resolve(silent)
