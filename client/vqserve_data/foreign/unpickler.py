"""An interpreter of pickles from strangers that makes data of them, and runs nothing.

Python's own unpickler imports what a pickle names, calls it, and sets attributes of the result. Here a name becomes a
`Global`, each call becomes an `Instance` that records it, and no attribute of any value is read or set. So there is no
list of harmless functions to keep either. All protocols up to 5 are read.

Work and memory are linear in the length of the pickle: each instruction makes at most one value besides the bytes in
its argument, and none copies, hashes or compares a value that is already there, except for short strings as keys.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import TypeAlias

from vqserve_data.foreign.pickle_machine import Machine
from vqserve_data.foreign.pickled_values import Bag, Global, Instance, PersistentId, PickleError, Table

Instruction: TypeAlias = Callable[[Machine], None]

# The longest integers in use are states of random number generators, far below.
_MAX_INTEGER_BYTES = 256
_STOP = ord(".")
# Names of modules in Python 2, which pickles of protocols below 3 use too.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


# Values that come with the instruction.


def _constant(value: object) -> Instruction:
    return lambda machine: machine.push(value)


def _fresh(make: Callable[[], object]) -> Instruction:
    return lambda machine: machine.push(make())


def _integer(width: int, *, signed: bool = False) -> Instruction:
    return lambda machine: machine.push(int.from_bytes(machine.take(width), "little", signed=signed))


def _long_integer(width: int) -> Instruction:
    def read(machine: Machine) -> None:
        length = machine.take_length(width)
        if length > _MAX_INTEGER_BYTES:
            raise PickleError(f"has an integer of {length} bytes")
        machine.push(int.from_bytes(machine.take(length), "little", signed=True))

    return read


def _integer_in_decimal(machine: Machine) -> None:
    line = machine.take_number()
    # False and True of protocol 0 are written as no integer is.
    machine.push(line == b"01" if line in (b"00", b"01") else int(line.removesuffix(b"L")))


def _binary_float(machine: Machine) -> None:
    machine.push(struct.unpack(">d", machine.take(8))[0])


def _bytes(width: int) -> Instruction:
    return lambda machine: machine.push(machine.take(machine.take_length(width)))


def _text(width: int) -> Instruction:
    return lambda machine: machine.push(_decoded(machine.take(machine.take_length(width))))


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _text_in_a_line(machine: Machine) -> None:
    machine.push(machine.take_line().decode("raw-unicode-escape"))


def _quoted_text(machine: Machine) -> None:
    line = machine.take_line()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError
    machine.push(_text_or_bytes(codecs.escape_decode(line[1:-1])[0]))


def _string(width: int) -> Instruction:
    return lambda machine: machine.push(_text_or_bytes(machine.take(machine.take_length(width))))


def _text_or_bytes(data: bytes) -> str | bytes:
    # Strings of Python 2 are both.
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


# Tuples, and what is added to containers.


def _tuple(size: int) -> Instruction:
    def build(machine: Machine) -> None:
        last = [machine.pop() for _ in range(size)]
        machine.push(tuple(reversed(last)))

    return build


def _collect(make: Callable[[list[object]], object]) -> Instruction:
    return lambda machine: machine.push(make(machine.pop_mark()))


def _table_of(values: list[object]) -> Table:
    table = Table()
    _put_all(table, values)
    return table


def _put_all(table: Table, values: list[object]) -> None:
    for key, value in zip(values[::2], values[1::2], strict=True):
        table.put(key, value)


def _set_entries(machine: Machine, values: list[object]) -> None:
    target = machine.top()
    if isinstance(target, Instance):
        target.table = target.table or Table()
        target = target.table
    if not isinstance(target, Table):
        raise ValueError
    _put_all(target, values)


def _set_entry(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    _set_entries(machine, [key, value])


def _append_all(machine: Machine, values: list[object]) -> None:
    target = machine.top()
    if isinstance(target, Instance):
        target.elements = target.elements or []
        target = target.elements
    if not isinstance(target, list):
        raise ValueError
    target.extend(values)


def _add_all(machine: Machine, values: list[object]) -> None:
    target = machine.top()
    if not isinstance(target, Bag):
        raise ValueError
    target.members.extend(values)


# Names and calls, which are recorded.


def _name(module: object, name: object) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError
    return Global(_RENAMED.get(module, module), name)


def _global(machine: Machine) -> None:
    module, name = _decoded(machine.take_line()), _decoded(machine.take_line())
    machine.push(_name(module, name))


def _global_from_stack(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push(_name(module, name))


def _extension(width: int) -> Instruction:
    return lambda machine: machine.push(Global("copyreg", f"extension {machine.take_length(width)}"))


def _call(machine: Machine) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.push(Instance(function, arguments))


def _call_with_keywords(machine: Machine) -> None:
    machine.pop()
    _call(machine)


def _call_of_marked(machine: Machine) -> None:
    function, *arguments = machine.pop_mark()
    machine.push(Instance(function, tuple(arguments)))


def _call_of_named(machine: Machine) -> None:
    function = _name(_decoded(machine.take_line()), _decoded(machine.take_line()))
    machine.push(Instance(function, tuple(machine.pop_mark())))


def _set_state(machine: Machine) -> None:
    state, target = machine.pop(), machine.top()
    # Attributes of a dictionary or a list are of no use here.
    if isinstance(target, Instance):
        target.state = state


def _refer(machine: Machine, value: object) -> None:
    reference = PersistentId(value)
    machine.persistent_ids.append(reference)
    machine.push(reference)


def _begin(machine: Machine) -> None:
    protocol = machine.take_length(1)
    if protocol > 5:
        raise PickleError(f"is a pickle of protocol {protocol}, which is newer than protocol 5")


# Every instruction of every protocol except STOP and NEXT_BUFFER, whose data is never in a file.
_INSTRUCTIONS: dict[int, Instruction] = {
    ord(code): instruction
    for code, instruction in {
        # Protocol and frames: a frame says how much to read at once.
        b"\x80": _begin,
        b"\x95": Machine.skip_frame,
        # Constants and numbers.
        b"N": _constant(None),
        b"\x88": _constant(True),
        b"\x89": _constant(False),
        b"I": _integer_in_decimal,
        b"L": _integer_in_decimal,
        b"J": _integer(4, signed=True),
        b"K": _integer(1),
        b"M": _integer(2),
        b"\x8a": _long_integer(1),
        b"\x8b": _long_integer(4),
        b"F": lambda machine: machine.push(float(machine.take_number())),
        b"G": _binary_float,
        # Text and bytes.
        b"S": _quoted_text,
        b"T": _string(4),
        b"U": _string(1),
        b"V": _text_in_a_line,
        b"X": _text(4),
        b"\x8c": _text(1),
        b"\x8d": _text(8),
        b"B": _bytes(4),
        b"C": _bytes(1),
        b"\x8e": _bytes(8),
        b"\x96": _bytes(8),
        b"\x98": lambda machine: None,
        # Containers.
        b")": _constant(()),
        b"\x85": _tuple(1),
        b"\x86": _tuple(2),
        b"\x87": _tuple(3),
        b"t": _collect(tuple),
        b"]": _fresh(list),
        b"l": _collect(list),
        b"a": lambda machine: _append_all(machine, [machine.pop()]),
        b"e": lambda machine: _append_all(machine, machine.pop_mark()),
        b"}": _fresh(Table),
        b"d": _collect(_table_of),
        b"s": _set_entry,
        b"u": lambda machine: _set_entries(machine, machine.pop_mark()),
        b"\x8f": _fresh(Bag),
        b"\x90": lambda machine: _add_all(machine, machine.pop_mark()),
        b"\x91": _collect(Bag),
        # The stack.
        b"(": Machine.mark,
        b"0": Machine.discard,
        b"1": lambda machine: machine.pop_mark() and None,
        b"2": lambda machine: machine.push(machine.top()),
        # The memo.
        b"p": lambda machine: machine.memoize(int(machine.take_number())),
        b"q": lambda machine: machine.memoize(machine.take_length(1)),
        b"r": lambda machine: machine.memoize(machine.take_length(4)),
        b"\x94": Machine.memoize,
        b"g": lambda machine: machine.recall(int(machine.take_number())),
        b"h": lambda machine: machine.recall(machine.take_length(1)),
        b"j": lambda machine: machine.recall(machine.take_length(4)),
        # Names, calls and references.
        b"c": _global,
        b"\x93": _global_from_stack,
        b"\x82": _extension(1),
        b"\x83": _extension(2),
        b"\x84": _extension(4),
        b"R": _call,
        b"\x81": _call,
        b"\x92": _call_with_keywords,
        b"o": _call_of_marked,
        b"i": _call_of_named,
        b"b": _set_state,
        b"P": lambda machine: _refer(machine, machine.take_line()),
        b"Q": lambda machine: _refer(machine, machine.pop()),
    }.items()
}


def load(machine: Machine) -> object:
    """Return what the next pickle describes.

    Raises:
        PickleError: it is damaged, or larger than a limit.
    """
    machine.begin()
    try:
        while (code := machine.next_code()) != _STOP:
            _INSTRUCTIONS[code](machine)
        return machine.pop()
    # What is not on the stack or in the input, an unknown instruction, a value that is not what it should be.
    except (IndexError, KeyError, ValueError, struct.error):
        raise PickleError("is damaged: the description of its tensors cannot be read") from None
