"""Errors as values: fields, positions, texts for both kinds of reader."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqserve import errors
from vqserve.errors import (
    COMMAND_LINE,
    CodebookNotFound,
    InvalidOption,
    InvalidShape,
    NonFiniteLatents,
    TokenBeyondRange,
    escape,
    of_file,
    quoted,
    rows_placed,
)


def test_a_text_is_spelled_for_its_reader() -> None:
    error = InvalidShape(
        "{where} are odd: {option} or {suggestion}, see {timeout=}",
        array="latents",
        option="num_quantizers",
        suggestion={"layout": "channels_last", "num_quantizers": 3},
    )
    assert error.message == ('latents are odd: num_quantizers or layout="channels_last" num_quantizers=3, see timeout=')
    assert error.statement(COMMAND_LINE) == (
        "latents are odd: --num-quantizers or --layout channels_last --num-quantizers 3, see --timeout"
    )


def test_a_text_from_outside_is_not_filled_in() -> None:
    error = InvalidOption("{option} is {suggestion}", option="layout", suggestion={"layout": "{where}{timeout=}"})
    assert error.message == 'layout is layout="{where}{timeout=}"'
    assert InvalidOption("{0} {x!r} {__class__} {").message == "{0} {x!r} {__class__} {"


@given(grid=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_a_row_becomes_a_position_once(grid: list[int], data: st.DataObject) -> None:
    row = data.draw(st.integers(0, int(np.prod(grid)) - 1))
    start = data.draw(st.integers(0, row))
    with pytest.raises(TokenBeyondRange) as caught, rows_placed((99,)), rows_placed(grid, start):
        raise TokenBeyondRange("{where} is far", array="tokens", row=row - start)
    position = tuple(int(i) for i in np.unravel_index(row, grid))
    assert (caught.value.position, caught.value.row) == (position, None)
    assert caught.value.message == f"token {list(position)} is far"


def test_a_part_s_position_is_shifted_as_a_value() -> None:
    error = InvalidShape("{where}", array="indices", position=(1, 2))
    assert error.shifted((10, 20)).position == (11, 22)
    assert error.position == (1, 2)
    assert error.shifted((10,)) is error


def test_a_file_s_name_goes_before_what_is_wrong_in_it() -> None:
    with pytest.raises(InvalidShape, match=r"^z.npy: latents\[3\] x$"), of_file("other"), of_file("z.npy"):
        raise InvalidShape("{where} x", array="latents", position=(3,))
    with pytest.raises(InvalidOption, match=r"^device$"), of_file("z.npy"):
        raise InvalidOption("{option}", option="device")


def test_all_fields_pickle() -> None:
    fields = {
        "code": "X",
        "target": "a:1",
        "codebook": "b",
        "digest": "d",
        "request_id": "r",
        "item": 3,
        "array": "latents",
        "position": (1, 2),
        "row": 4,
        "option": "layout",
        "suggestion": {"layout": "x"},
        "path": "p",
    }
    error = errors.Overloaded("{where}", retry_after_s=0.5, **fields)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert vars(again) == {"template": "{where}", "retry_after_s": 0.5, **fields}
    assert str(again) == str(error)


def test_nothing_but_the_standard_library_is_imported() -> None:
    program = "import sys, vqserve.errors; print({'numpy', 'grpc', 'google', 'torch', 'threading'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"


@pytest.mark.parametrize(
    "text", ["{where}", "{option}{suggestion}", "{{where}", "{timeout=}", "{x} {where", "{{{option}}}"]
)
def test_text_from_outside_is_no_template(text):
    assert CodebookNotFound(f"no {escape(text)} here").message == f"no {text} here"
    assert InvalidOption(f"{{option}} is {quoted(text)}", option="layout").message == f"layout is {text!r}"


def test_the_repr_shows_the_message_and_not_the_template():
    error = NonFiniteLatents("{where} is nan", array="latents", position=(0, 3))
    assert repr(error) == "NonFiniteLatents('latents[0, 3] is nan')"
