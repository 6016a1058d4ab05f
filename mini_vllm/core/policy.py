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
    """Lowest number first, then earliest arrival. The last by that order gives way; coming back is like joining."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Request]] = []
        self._live: dict[str, int] = {}
        self._ticket = 0

    def add(self, request: Request) -> None:
        self._ticket += 1
        self._live[request.request_id] = self._ticket
        heapq.heappush(self._heap, (request.priority, request.arrival_time, self._ticket, request))

    def requeue(self, request: Request) -> None:
        self.add(request)

    def peek(self) -> Request:
        self._drop_removed()
        return self._heap[0][3]

    def pop(self) -> Request:
        self._drop_removed()
        request = heapq.heappop(self._heap)[3]
        del self._live[request.request_id]
        return request

    def remove(self, request: Request) -> None:
        # The heap entry stays behind without a live ticket and is dropped when it surfaces.
        self._live.pop(request.request_id, None)

    def _drop_removed(self) -> None:
        while self._heap and self._live.get(self._heap[0][3].request_id) != self._heap[0][2]:
            heapq.heappop(self._heap)

    def pick_victim(self, running: Sequence[Request]) -> Request:
        return max(running, key=lambda request: (request.priority, request.arrival_time))

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        for entry in sorted(self._heap):
            if self._live.get(entry[3].request_id) == entry[2]:
                yield entry[3]


def make_queue(policy: SchedulingPolicy) -> RequestQueue:
    """The waiting queue for a policy's name."""
    return PriorityQueue() if policy == "priority" else FCFSQueue()
