"""The tree of errors, the table, and the page that shows them."""

from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path

import grpc
import pytest

import vqserve.errors
import vqserve_client
from vqserve.errors import COMMAND_LINE, Overloaded, VqserveError
from vqserve_client import Client, errors
from vqserve_client.status import ERROR_OF_CODE, RETRIED, Failure

KINDS = sorted({kind for _, kind in inspect.getmembers(errors, inspect.isclass)}, key=lambda kind: kind.__name__)
DOCS = Path(__file__).parents[2] / "docs"
PAGE, ERRORS_PAGE = DOCS / "client.md", DOCS / "errors.md"


def test_every_status_is_mapped():
    assert set(ERROR_OF_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}
    assert set(RETRIED) == {errors.Overloaded, errors.Unavailable, errors.Cancelled}


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_public_and_of_the_family(kind):
    assert issubclass(kind, VqserveError)
    assert getattr(vqserve_client, kind.__name__) is kind
    assert kind.__doc__


@pytest.mark.parametrize("kind", KINDS)
def test_errors_pickle_with_all_their_fields(kind):
    options = {"retry_after_s": 0.5} if kind is errors.Overloaded else {}
    error = kind("what", code="INTERNAL", target="host:1", codebook="a", request_id="id", **options)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is kind
    assert vars(again) == vars(error)
    assert str(again) == str(error)
    assert str(error).startswith("what (server host:1, codebook 'a', request id)")


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = re.findall(r"^(\W*)(\w+)(?: \(also a (\w+)\))?$", vqserve.errors.__doc__.split("\n\n")[1], re.MULTILINE)
    tree = {}
    path = []
    for prefix, name, also in drawn:
        path[len(prefix) // 4 :] = [name]
        tree[name] = {*path[-2:-1], *([also] if also else [])}
    assert tree.pop("VqserveError") == set()
    del path
    kinds = [kind for _, kind in inspect.getmembers(vqserve.errors, inspect.isclass) if issubclass(kind, VqserveError)]
    real = {kind.__name__: {base.__name__ for base in kind.__bases__} for kind in kinds}
    del real["VqserveError"]
    assert tree == real


def test_a_failure_without_words():
    failure = Failure(grpc.StatusCode.INTERNAL, "", {})
    assert "INTERNAL" in str(failure.error(target="host:1", codebook=None, request_id="id"))


# The second where a deadline passes while a large request is still on its way.
@pytest.mark.parametrize("details", ["Deadline Exceeded", "Stream removed (Deadline Exceeded)"])
def test_a_deadline_of_grpc_has_the_sdks_text(details):
    failure = Failure(grpc.StatusCode.DEADLINE_EXCEEDED, details, {})
    error = failure.error(target="there", codebook=None, request_id="one")
    assert error.message == "the server did not answer in time"
    assert "allow more time with timeout=" in str(error)


def test_a_hostile_server_s_words_are_cut_and_cannot_steer_a_terminal():
    failure = Failure(grpc.StatusCode.INTERNAL, "\x1b[2Jboom\n" + "x" * 100_000, {})
    text = str(failure.error(target="host:1", codebook=None, request_id="id"))
    assert "boom" in text
    assert text.isprintable()
    assert len(text) < 3000


def test_the_page_shows_every_error_with_its_statuses():
    rows = re.findall(r"^\| `([A-Z]\w+)` \| ([^|]*) \|", ERRORS_PAGE.read_text(), re.MULTILINE)
    shown = {name: re.findall(r"[A-Z]+(?:_[A-Z]+)*", codes) for name, codes in rows}
    assert shown.keys() == {kind.__name__ for kind in KINDS} - {"VqserveError"}
    for code, kind in ERROR_OF_CODE.items():
        assert code.name in shown[kind.__name__]
    for kind in KINDS:
        if kind is not VqserveError and kind is not errors.ProtocolError:
            assert (shown[kind.__name__] or [None])[0] == kind.default_code


def test_the_page_shows_the_options_and_their_defaults():
    text = PAGE.read_text()
    for name, parameter in inspect.signature(Client).parameters.items():
        default = "64 MiB" if name == "max_message_bytes" else repr(parameter.default)
        assert f"| `{name}` | {f'`{default}`' if default != '64 MiB' else default} |" in text, name


def test_the_pages_python_runs(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        # The one with TLS has a server of its own in tests/test_docs.py.
        if "vq.example" in block:
            continue
        source = block.replace("localhost:50051", tiny.target).replace('"demo"', '"small"')
        exec(compile(source, str(PAGE), "exec"), {})  # noqa: S102


def test_a_text_without_its_fields_has_its_advice_once():
    details = f"the queue is full: {Overloaded.hint}"
    failure = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, details, {})
    error = failure.error(target="there", codebook=None, request_id="one")
    assert error.message == details
    assert str(error).count(Overloaded.hint) == 1


def test_only_who_cannot_be_reached_may_not_be_running():
    texts = {
        "failed to connect to all addresses; last error: UNKNOWN: connect: Connection refused (111)": True,
        "Socket closed": True,
        "the call was idle for 0.4 s: make another one": False,
    }
    for details, is_gone in texts.items():
        error = Failure(grpc.StatusCode.UNAVAILABLE, details, {}).error(target="there", codebook=None, request_id="one")
        assert ("is the server running" in str(error)) is is_gone


@pytest.mark.parametrize(
    ("details", "says"),
    [
        (
            "Stream removed (CLIENT: Received message larger than max (2000 vs. 1500))",
            "a reply of 2000 bytes is larger than the client's limit of 1500 bytes: set a larger --max-message-bytes",
        ),
        (
            "CLIENT: Sent message larger than max (2000 vs. 1500)",
            "a request of 2000 bytes is larger than the client's limit of 1500 bytes: set a larger --max-message-bytes",
        ),
        (
            "SERVER: Received message larger than max (2000 vs. 1500)",
            "a request of 2000 bytes is larger than the server's limit of 1500 bytes: set --max-message-bytes 1500 "
            "in the client, or start the server with a larger --max-message-bytes",
        ),
        (
            "Received message larger than max (2000 vs. 1500)",
            "a message of 2000 bytes is larger than the limit of client or server, 1500 bytes: "
            "set a larger --max-message-bytes on both",
        ),
    ],
)
def test_which_limit_a_message_exceeds(details, says):
    failure = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, details, {})
    error = failure.error(target=None, codebook=None, request_id=None)
    assert type(error) is errors.MessageTooLarge
    assert error.text(COMMAND_LINE) == says


def test_a_foreign_text_is_no_template():
    failure = Failure(grpc.StatusCode.NOT_FOUND, "the {where} details {timeout=}", {})
    assert failure.error(target="there", codebook=None, request_id="one").message == "the {where} details {timeout=}"
