"""Who goes next and who gives way: the waiting queue of each scheduling policy.

Both policies answer the same few questions, so that the scheduler never asks which one it has. Removing a
request from the middle (an abort) is cheap in both.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

from mini_vllm.config import SchedulingPolicy
from mini_vllm.request import Request


class RequestQueue(Protocol):
    """Requests not running, in the order in which they will be admitted."""

    def add(self, request: Request) -> None:
        """A new request joins."""

    def requeue(self, request: Request) -> None:
        """A preempted request comes back to the place it had."""

    def peek(self) -> Request:
        """The next to be admitted; IndexError when empty."""

    def pop(self) -> Request: ...

    def remove(self, request: Request) -> None: ...

    def pick_victim(self, running: Sequence[Request]) -> Request:
        """Which running request gives way."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...


class FCFSQueue:
    """First come, first served. The latest admitted gives way and comes back to the front, so order is kept."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request

    def requeue(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._requests.move_to_end(request.request_id, last=False)

    def peek(self) -> Request:
        for request in self._requests.values():
            return request
        raise IndexError("the waiting queue is empty")

    def pop(self) -> Request:
        return self._requests.popitem(last=False)[1]

    def remove(self, request: Request) -> None:
        self._requests.pop(request.request_id, None)

    def pick_victim(self, running: Sequence[Request]) -> Request:
        return running[-1]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())


class PriorityQueue:
    """Lowest number first, then earliest arrival; the last by that order gives way and comes back to its place.

    Among equals (a simulated clock, a batch added at once) it is first come, first served.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Request]] = []
        self._live: dict[str, int] = {}
        self._last_ticket = 0
        self._first_ticket = 0

    def add(self, request: Request) -> None:
        self._last_ticket += 1
        self._push(request, self._last_ticket)

    def requeue(self, request: Request) -> None:
        self._first_ticket -= 1  # ahead of its equals, none of which has run since
        self._push(request, self._first_ticket)

    def _push(self, request: Request, ticket: int) -> None:
        self._live[request.request_id] = ticket
        heapq.heappush(self._heap, (request.priority, request.arrival_time, ticket, request))

    def peek(self) -> Request:
        self._drop_removed()
        return self._heap[0][3]

    def pop(self) -> Request:
        self._drop_removed()
        request = heapq.heappop(self._heap)[3]
        del self._live[request.request_id]
        return request

    def remove(self, request: Request) -> None:
        # The heap entry stays behind without a live ticket and is dropped when it surfaces, or when the dead prevail.
        self._live.pop(request.request_id, None)
        if len(self._heap) > 2 * len(self._live) + 16:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)

    def _is_live(self, entry: tuple[int, float, int, Request]) -> bool:
        return self._live.get(entry[3].request_id) == entry[2]

    def _drop_removed(self) -> None:
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)

    def pick_victim(self, running: Sequence[Request]) -> Request:
        return max(reversed(running), key=lambda request: (request.priority, request.arrival_time))

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        for entry in sorted(self._heap):
            if self._is_live(entry):
                yield entry[3]


def make_queue(policy: SchedulingPolicy) -> RequestQueue:
    """The waiting queue for a policy's name."""
    return PriorityQueue() if policy == "priority" else FCFSQueue()
