"""The stack, the memo and the input of an interpreter of pickles."""

from __future__ import annotations

from vqserve_data.foreign.pickled_values import PersistentId, PickleCutOff, PickleError

# The pickle of thousands of tensors is below 2 MiB.
MAX_PICKLE_BYTES = 16 << 20
# About 40 instructions describe a tensor. Besides its argument, an instruction makes at most 200 bytes of memory.
MAX_INSTRUCTIONS = 1 << 21
# The longest integers in use are states of random number generators and version numbers, far below.
_MAX_DIGITS = 600

_ABSENT = object()


class Machine:
    """State of an interpreter of pickles that follow each other in `data`.

    What is not on the stack or in the memo is an IndexError; the end of the input is a PickleCutOff.

    Attributes:
        position: where the next pickle begins.
        instructions: number of instructions that were interpreted.
        persistent_ids: references to what is outside of the pickles, in order.
    """

    def __init__(self, data: bytes) -> None:
        self.position = 0
        self.instructions = 0
        self.persistent_ids: list[PersistentId] = []
        self._data = data
        self._stack: list[object] = []
        # Stacks below the marks.
        self._below: list[list[object]] = []
        self._memo: list[object] = []
        self._memoized = 0

    def begin(self) -> None:
        """Forget what the last pickle left."""
        self._stack, self._below, self._memo, self._memoized = [], [], [], 0

    # Input.

    def next_code(self) -> int:
        """Return the code of the next instruction.

        Raises:
            PickleError: there were MAX_INSTRUCTIONS already.
        """
        self.instructions += 1
        if self.instructions > MAX_INSTRUCTIONS:
            raise PickleError(f"has a description of more than {MAX_INSTRUCTIONS} instructions: no model's has as many")
        if self.position == len(self._data):
            raise PickleCutOff
        code = self._data[self.position]
        self.position += 1
        return code

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        end = self.position + size
        if end > len(self._data):
            raise PickleCutOff
        data = self._data[self.position : end]
        self.position = end
        return data

    def take_length(self, width: int) -> int:
        """Return the next unsigned integer of `width` bytes."""
        return int.from_bytes(self.take(width), "little")

    def take_line(self) -> bytes:
        """Return the bytes up to the next end of a line."""
        end = self._data.find(b"\n", self.position)
        if end < 0:
            raise PickleCutOff
        line = self._data[self.position : end]
        self.position = end + 1
        return line

    def take_number(self) -> bytes:
        """Return the next line, which must be as short as a number is."""
        line = self.take_line()
        if len(line) > _MAX_DIGITS:
            raise PickleError(f"has a number of {len(line)} digits")
        return line

    def skip_frame(self) -> None:
        """Check the announcement of the next bytes, which are not read at once."""
        if self.take_length(8) > len(self._data) - self.position:
            raise PickleCutOff

    # The stack.

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def pop(self) -> object:
        """Take the last value from the stack."""
        return self._stack.pop()

    def top(self) -> object:
        """Return the last value on the stack."""
        return self._stack[-1]

    def mark(self) -> None:
        """Begin a stack above the present one."""
        self._below.append(self._stack)
        self._stack = []

    def pop_mark(self) -> list[object]:
        """End the stack that the last mark began, and return it."""
        values, self._stack = self._stack, self._below.pop()
        return values

    def discard(self) -> None:
        """Remove the last value, or the last mark if nothing is above it."""
        if self._stack or not self._below:
            self._stack.pop()
        else:
            self.pop_mark()

    # The memo.

    def memoize(self, index: int | None = None) -> None:
        """Keep the last value under a number; None: the next free one."""
        if index is None:
            index = self._memoized
        # Numbers are given in order, so that none is larger than the number of instructions.
        if not 0 <= index <= self.instructions:
            raise IndexError
        # A list, because numbers of a stranger's choice can make a dictionary very slow.
        self._memo.extend([_ABSENT] * (index + 1 - len(self._memo)))
        self._memoized += self._memo[index] is _ABSENT
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        """Put what was kept under a number on the stack."""
        value = self._memo[index] if index >= 0 else _ABSENT
        if value is _ABSENT:
            raise IndexError
        self._stack.append(value)
