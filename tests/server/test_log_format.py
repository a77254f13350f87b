"""`--log-format json`: every line is one object, whatever is in it."""

from __future__ import annotations

import io
import json
import logging
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqserve.errors import NonFiniteLatents
from vqserve_client import Client
from vqserve_server import event_log
from vqserve_server.codebooks import save_codebook
from vqserve_server.quantizers import VectorQuantizer

FIELDS = st.dictionaries(
    st.from_regex(r"[a-z_]{1,12}", fullmatch=True),
    st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.binary(max_size=9)),
    max_size=5,
)


@contextmanager
def log_of(form: str, worker: int | None = None) -> Iterator[io.StringIO]:
    """A log whose lines are read."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        event_log.write_to(stream, "info", form=form, worker=worker)
        yield stream
    finally:
        root.handlers, root.level = before


@given(fields=FIELDS, worker=st.none() | st.integers(0, 99))
def test_a_line_is_an_object_with_the_fields_of_the_event(fields: dict[str, Any], worker: int | None) -> None:
    with log_of("json", worker) as stream:
        logging.getLogger("vqserve_server.engine").warning(event_log.event("it_happened", **fields))
    [line] = stream.getvalue().splitlines()
    assert line.isascii()
    entry = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert datetime.fromisoformat(entry["time"]).tzinfo is not None
    own = {"time", "level", "logger", "event"} | ({"worker"} if worker is not None else set())
    assert entry["level"] == "warning"
    assert entry["logger"] == "vqserve_server.engine"
    assert entry["event"] == "it_happened"
    assert entry.get("worker", None) == (fields.get("worker") if worker is None else worker)
    assert set(entry) == own | set(fields)
    for key, value in fields.items():
        if key not in own:
            is_word = isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value))
            assert entry[key] == (str(value) if is_word else value)


def test_lines_of_other_packages_and_tracebacks_are_objects_too() -> None:
    with log_of("json") as stream:
        logging.getLogger("asyncio").warning("slow: %s", "two\nlines")
        try:
            raise ValueError("a \x1b[2J b")
        except ValueError:
            logging.getLogger("vqserve_server.rpc").exception(event_log.event("failed"))
    slow, failed = map(json.loads, stream.getvalue().splitlines())
    assert (slow["logger"], slow["message"]) == ("asyncio", "slow: two\nlines")
    assert failed["event"] == "failed"
    assert failed["exception"].startswith("Traceback")
    assert "\x1b" not in stream.getvalue()


def test_an_event_with_its_fields_is_the_same_text_as_before() -> None:
    text = event_log.event("codebook", of=1.5, name="a b")
    assert text == 'codebook of=1.5 name="a b"'
    assert (text.event, dict(text.fields)) == ("codebook", {"of": 1.5, "name": "a b"})


@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_line_of_a_server_is_an_object(tmp_path: Path, vqserved: Callable[..., Any], workers: str) -> None:
    torch.manual_seed(0)
    save_codebook(VectorQuantizer(16, 4), tmp_path / "book.safetensors")
    options = ("--device", "cpu", "--workers", workers, "--log-format", "json", "--log-level", "debug")
    daemon = vqserved(tmp_path, *options)
    with Client(daemon.target) as client:
        client.encode(np.zeros((1, 2, 4), np.float32))
        with pytest.raises(NonFiniteLatents) as caught:
            client.encode(np.full((1, 2, 4), np.nan, np.float32))
    code, log = daemon.stop(signal.SIGTERM)
    assert code == 0
    entries = [json.loads(line) for line in log.splitlines()]
    names = {entry.get("event") for entry in entries}
    assert {"codebook_loaded", "stopping", "served", "request_rejected"} <= names
    rejected = [entry["request_id"] for entry in entries if entry.get("event") == "request_rejected"]
    assert caught.value.request_id in rejected
    if workers == "2":
        assert {entry["worker"] for entry in entries if entry.get("event") == "served"} == {0, 1}
