"""Which of the arrays of `encode_many` an error is about."""

from __future__ import annotations

from typing import Any

from vqserve_client.errors import VqserveError
from vqserve_client.lane import Lane


class Numbered:
    """A lane's arrays, numbered from 0 as they are put and as their answers are taken."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._put = self._taken = 0

    def put(self, array: object) -> None:
        """Add one more array; see Lane.put."""
        try:
            self._lane.put(array)
        except VqserveError as error:
            error.item = self._put
            raise
        self._put += 1

    def take(self) -> Any:
        """Return the next answer in order, or raise its error; see Lane.take."""
        try:
            answer = self._lane.take()
        except VqserveError as error:
            error.item = self._taken
            raise
        self._taken += 1
        return answer
