"""The argument parser of both command lines."""

from __future__ import annotations

import pytest

from vqserve.arguments import Parser


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="tool")
    command = parser.add_subparsers().add_parser("make")
    command.add_argument("source", nargs="?")
    command.add_argument("--number", type=int, default=1)
    command.add_argument("--pair", nargs=2)
    command.add_argument("--many", action="append")
    command.add_argument("--quick", action="store_true")
    group = command.add_mutually_exclusive_group()
    group.add_argument("--in-a-group")
    return parser


@pytest.mark.parametrize(
    "words",
    [
        ["--number", "1", "--number", "1"],
        ["--number", "1", "--number=2"],
        ["--pair", "a", "b", "x", "--pair", "c", "d"],
        ["--in-a-group", "a", "--in-a-group", "b"],
    ],
)
def test_an_option_of_one_value_is_given_once(parser, capsys, words):
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            parser.parse_command(["make", *words])
        assert stop.value.code == 2
        flag = words[0]
        assert (
            f"argument {flag}: it is given twice, and only one value is used: give it once;" in capsys.readouterr().err
        )


def test_other_options_may_be_repeated(parser):
    words = ["make", "x", "--many", "a", "--many", "b", "--quick", "--quick", "--number", "3"]
    for _ in range(2):
        args = parser.parse_command(words)
        assert (args.source, args.many, args.quick, args.number) == ("x", ["a", "b"], True, 3)
