"""One array on its way to the server and back: cut into requests, every reply checked before it is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vqserve import payload
from vqserve.errors import InvalidArgument, VqserveError
from vqserve_client.arrays import Array, ArrayInput, Cut, cut_text, of_whole, store
from vqserve_client.catalogue import Pin
from vqserve_client.forms import Form
from vqserve_client.requests import Request


class ArrayCall:
    """An array's encoding or decoding.

    Attributes:
        source: the caller's array.
        form: what its requests have in common with those for other arrays of its shape and type.
        pin: the codebook of the call.
        array: the array that is cut and sent.
    """

    def __init__(self, source: ArrayInput, form: Form, pin: Pin) -> None:
        """Check the values that cannot be sent.

        Raises:
            InvalidArgument: there is one.
        """
        self.source = source
        self.form = form
        self.pin = pin
        self.array = form.sent(source)
        self._out: Array | None = None

    def requests(self) -> Iterator[ArrayRequest]:
        """Yield the requests, in order."""
        for cut in self.form.cuts:
            yield ArrayRequest(self, cut)

    def results(self, inputs: Sequence[ArrayInput]) -> list[Any]:
        """Return the result for each of the caller's arrays, as its own kind.

        Args:
            inputs: the arrays that `source` is, or was joined from.
        """
        out, dtype = self.form.empty() if self._out is None else self._out, self.form.reply_dtype
        if len(inputs) == 1:
            return [self.source.to_caller(out, dtype)]
        results, start = [], 0
        for one in inputs:
            stop = start + len(one.array)
            # A copy: a caller that stores or pickles one result must not hold the memory of all of them.
            results.append(one.to_caller(out[start:stop].copy(), dtype))
            start = stop
        return results

    def place(self, cut: Cut | None) -> Array:
        """Return the part of the result that belongs to a cut of the grid; memory is allocated on first use."""
        if self._out is None:
            self._out = self.form.empty()
        return self._out if cut is None else self._out[self.form.result_cut(cut)]


class ArrayRequest(Request):
    """The request for one cut of an array's grid."""

    def __init__(self, call: ArrayCall, cut: Cut | None) -> None:
        self._call = call
        self._cut = cut
        self.method = call.form.method

    def explain(self, error: VqserveError) -> VqserveError:
        """Return an error of the server with its position counted in the caller's array."""
        source, form = self._call.source, self._call.form
        if self._cut is None:
            return source.of_caller(error)
        cut = form.source_cut(self._cut)
        whole = of_whole(error, array=cut, grid=self._cut)
        if whole is not error or not isinstance(error, InvalidArgument):
            return source.of_caller(whole)
        part = cut_text(cut if source.batched else cut[1:])
        return error.noted(f"in the part {form.name}{part}, from whose start positions count")

    def message(self) -> bytes:
        """Return the message to send."""
        call, form = self._call, self._call.form
        part = call.array if self._cut is None else call.array[form.source_cut(self._cut)]
        return b"".join((form.head(part.shape), payload.view(part, call.source.dtype)))

    def accept(self, reply: bytes) -> None:
        """Check the reply and store it in its place."""
        call = self._call
        form, place = call.form, call.place(self._cut)
        store(form.checked(reply, place.shape, call.pin), form.reply_dtype, place)
