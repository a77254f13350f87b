"""Plans by their requests' heads: callers send the same head again and again."""

from __future__ import annotations

from typing import Generic

from vqserve_server.engine import LiveSet
from vqserve_server.rpc.messages import read
from vqserve_server.rpc.plan import Plan, RequestT

_MOST_PLANS = 1024
# A shape may have very many axes; such a head is not worth keeping.
_LONGEST_HEAD = 1024


class Plans(Generic[RequestT]):
    """The plans of one method for one set of codebooks; for another set there are others.

    Many threads may use it: the worst that can happen is that a head is read again.
    """

    def __init__(self, kind: type[Plan[RequestT]], *, live: LiveSet, max_message_bytes: int) -> None:
        self._kind: type[Plan[RequestT]] = kind
        self._live = live
        self._max_message_bytes = max_message_bytes
        self._by_head: dict[bytes, Plan[RequestT]] = {}
        # Where the payload of messages of a size begins, by the last one of that size.
        self._starts: dict[int, int] = {}

    def known(self, raw: bytes) -> tuple[Plan[RequestT], memoryview] | None:
        """Return the plan and the payload of a request whose head was read before.

        A head ends with the payload's length, so that a message of the same head and the same size means the same. The
        size has to be looked at: where the head ends was another message's word, and more may follow the payload.
        """
        start = self._starts.get(len(raw))
        if start is None:
            return None
        plan = self._by_head.get(raw[:start])
        if plan is None or plan.payload_bytes != len(raw) - start:
            return None
        return plan, memoryview(raw)[start:]

    def read(self, raw: bytes) -> tuple[Plan[RequestT], memoryview]:
        """Return the plan and the payload of a request.

        Raises:
            InvalidRequest: what is wrong with it.
            UnknownCodebook: no such codebook.
            DigestMismatch: the caller pinned another digest.
        """
        head, data = read(self._kind.request_type, raw)
        plan = self._kind(head, len(data), live=self._live, max_message_bytes=self._max_message_bytes)
        return plan, data

    def keep(self, raw: bytes, plan: Plan[RequestT], data: memoryview) -> None:
        """Remember the plan of a request that was read."""
        start = len(raw) - len(data)
        # Only where the payload is the message's end, and not a copy that protobuf made.
        if data.obj is not raw or start > _LONGEST_HEAD:
            return
        if len(self._by_head) >= _MOST_PLANS:
            self._by_head.clear()
            self._starts.clear()
        self._by_head[raw[:start]] = plan
        self._starts[len(raw)] = start
