"""Places for the calls of one method, so that it is answered however many calls of other methods are open."""

from __future__ import annotations

from vqserve_server.rpc.call import Call


class Places:
    """The open calls of one method, by caller. Only the transport's thread uses it.

    If there are too many, the caller that has most of them loses its oldest: so no caller can lock out the others.
    """

    def __init__(self, most: int) -> None:
        """Make so many places."""
        self._most = most
        self._count = 0
        # Dictionaries keep the order of arrival.
        self._calls: dict[str, dict[Call, None]] = {}

    def enter(self, call: Call) -> Call | None:
        """Count a new call, and return the call that must end because there are too many."""
        self._calls.setdefault(call.caller.name, {})[call] = None
        self._count += 1
        if self._count <= self._most:
            return None
        largest = max(self._calls.values(), key=len)
        oldest = next(iter(largest))
        # It counts no longer, although it may take a moment to end.
        self.leave(oldest)
        return oldest

    def leave(self, call: Call) -> None:
        """Stop counting a call, unless it does not count already."""
        calls = self._calls.get(call.caller.name)
        if calls is None or call not in calls:
            return
        del calls[call]
        self._count -= 1
        if not calls:
            del self._calls[call.caller.name]
