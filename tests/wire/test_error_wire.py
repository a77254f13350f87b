"""Errors on the wire: what is written is read again, and nothing that a stranger writes does harm."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqserve import errors
from vqserve.error_wire import KINDS, MAX_BYTES, read, reason_of, written
from vqserve.errors import COMMAND_LINE, PYTHON, VqserveError

NAMES = st.from_regex(r"[a-z_]{1,20}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
)
FIELDS = (
    "message",
    "array",
    "position",
    "option",
    "suggestion",
    "codebook",
    "digest",
    "path",
    "target",
    "item",
    "hint",
)


@given(
    kind=st.sampled_from(list(KINDS.values())),
    template=st.text(max_size=3000),
    array=st.none() | st.sampled_from(errors.ARRAY_NAMES),
    position=st.none() | st.lists(st.integers(0, (1 << 63) - 1), min_size=1, max_size=5),
    option=st.none() | NAMES,
    suggestion=st.dictionaries(NAMES, st.text(max_size=20) | st.integers(-100, 100), max_size=3),
    codebook=st.none() | st.text(max_size=300),
)
def test_what_is_written_is_short_ascii_and_read_again(
    kind, template, array, position, option, suggestion, codebook
) -> None:
    error = kind(
        template,
        array=array,
        position=position,
        option=option,
        suggestion=suggestion,
        codebook=codebook,
        path="/secret",
        request_id="secret",
    )
    entry = written(error)
    assert len(entry) <= MAX_BYTES
    assert all(" " <= char <= "~" for char in entry)
    assert "secret" not in entry
    again = read(entry, code=error.code)
    assert type(again) is kind
    assert (again.array, again.position) == (error.array, error.position)
    if "message" in json.loads(entry) and template.isprintable() and 0 < len(template) <= 1000:
        assert again.template == template


@given(
    reason=st.sampled_from([*KINDS, "start_error", "codebook_file_error", "", "x"]) | JSON,
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON),
    code=st.sampled_from(["INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "UNAVAILABLE"]),
)
def test_fields_of_any_kind_do_no_harm(reason, fields, code) -> None:
    error = read(json.dumps({"reason": reason, **fields}), code=code)
    if error is None:
        return
    assert error.code == code == type(error).default_code
    assert (error.path, error.target, error.item, error.request_id) == (None, None, None, None)
    for spelling in (PYTHON, COMMAND_LINE):
        text = error.text(spelling)
        assert text.isprintable()
        assert len(text) < 20_000
    shifted = error.shifted([1] * len(error.position or ()))
    assert isinstance(shifted.placed((3, 4)).text(), str)


@given(entry=st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_an_entry_or_none(entry) -> None:
    for code in ("INVALID_ARGUMENT", "INTERNAL"):
        assert read(entry, code=code) is None or entry.startswith("{")


@pytest.mark.parametrize(
    "entry",
    [None, "", "null", "[]", "1e999", "{", '{"reason": 3}', '{"reason": []}', "[" * 5000, "9" * 4000, "{}" * 5000],
)
def test_what_is_no_entry(entry) -> None:
    assert read(entry, code="INVALID_ARGUMENT") is None


def test_a_reason_belongs_to_its_status() -> None:
    entry = written(errors.InvalidShape("x"))
    assert type(read(entry, code="INVALID_ARGUMENT")) is errors.InvalidShape
    assert read(entry, code="NOT_FOUND") is None


def test_an_error_that_no_caller_may_see_has_no_entry() -> None:
    for kind in (errors.StartError, errors.CodebookFileError, errors.ForeignCheckpointError, VqserveError):
        assert written(kind("/secret/path")) is None


def test_reasons() -> None:
    assert reason_of(errors.NonFiniteLatents) == "non_finite_latents"
    assert KINDS["token_beyond_range"] is errors.TokenBeyondRange


@pytest.mark.parametrize("hint", ["", "send {suggestion}", "é"])
def test_a_hint_of_its_own_is_sent(hint) -> None:
    for kind in (errors.MessageTooLarge, errors.NonFiniteLatents):
        error = kind("{where}", array="latents", suggestion={"layout": "x"}, hint=hint)
        again = read(written(error), code="INVALID_ARGUMENT")
        assert (again.hint, str(again)) == (hint, str(error))
    assert "hint" not in json.loads(written(errors.NonFiniteLatents("x", hint=errors.NonFiniteLatents.hint)))


def test_what_is_too_long_keeps_its_position() -> None:
    entry = written(errors.NonFiniteLatents("é" * 900, array="latents", position=(1, 2)))
    again = read(entry, code="INVALID_ARGUMENT")
    assert (again.template, again.array, again.position) == ("", "latents", (1, 2))
