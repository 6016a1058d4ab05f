"""The waiting queue of the policies `fcfs` and `priority`, and what the scheduler asks of any.

All policies answer the same few questions, so that the scheduler never asks which one it has. Removing a
request from the middle (an abort) is cheap in all of them. The policy `fair` lives in `fair_queue.py`.
"""

import heapq
from bisect import insort_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from mini_vllm.request import Request

Order = tuple[Any, ...]
"""Places compare like tuples; the lower one is ahead."""


class RequestQueue(Protocol):
    """Requests not running, in the order in which they will be admitted.

    counts_tokens: whether `charge` does anything.
    """

    counts_tokens: bool

    def add(self, request: Request) -> None:
        """A new request joins."""

    def requeue(self, request: Request) -> None:
        """A preempted request comes back to the place it had."""

    def peek(self) -> Request:
        """The next to be admitted; IndexError when empty."""

    def pop(self) -> Request: ...

    def remove(self, request: Request) -> None:
        """It has ended, whether it waited here or ran."""

    def charge(self, request: Request, num_tokens: int) -> None:
        """A plan has given it that many tokens."""

    def pick_victim(self, running: Sequence[Request]) -> Request:
        """Which running request gives way: the one that the policy puts last."""

    def place(self, request: Request) -> Order:
        """Where it stands among all, for good: whoever has the lowest is never asked to give way to others."""

    def standing(self, request: Request) -> Order:
        """What the policy holds against it now: those with the highest give way before all others."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...


def by_arrival(request: Request) -> tuple[int, int]:
    return request.arrival_index, request.sample_index


class FCFSQueue:
    """First come, first served. The latest admitted gives way; who comes back goes ahead of all that never ran."""

    counts_tokens = False

    def __init__(self) -> None:
        self._new: OrderedDict[str, Request] = OrderedDict()
        self._back: list[Request] = []  # by arrival

    def add(self, request: Request) -> None:
        self._new[request.request_id] = request

    def requeue(self, request: Request) -> None:
        insort_left(self._back, request, key=by_arrival)

    def peek(self) -> Request:
        if self._back:
            return self._back[0]
        for request in self._new.values():
            return request
        raise IndexError("the waiting queue is empty")

    def pop(self) -> Request:
        return self._back.pop(0) if self._back else self._new.popitem(last=False)[1]

    def remove(self, request: Request) -> None:
        if self._new.pop(request.request_id, None) is None and request in self._back:
            self._back.remove(request)

    def charge(self, request: Request, num_tokens: int) -> None:
        pass

    def pick_victim(self, running: Sequence[Request]) -> Request:
        return running[-1]

    def place(self, request: Request) -> Order:
        return by_arrival(request)

    def standing(self, request: Request) -> Order:
        return ()

    def __len__(self) -> int:
        return len(self._back) + len(self._new)

    def __iter__(self) -> Iterator[Request]:
        yield from self._back
        yield from self._new.values()


class PriorityQueue:
    """Lowest number first, then earliest arrival; the last by that order gives way and comes back to its place.

    Among equals (a simulated clock, a batch added at once) it is first come, first served.
    """

    counts_tokens = False

    def __init__(self) -> None:
        self._heap: list[tuple[Order, int, Request]] = []
        self._live: dict[str, int] = {}
        self._num_pushed = 0

    def add(self, request: Request) -> None:
        self._num_pushed += 1
        self._live[request.request_id] = self._num_pushed
        heapq.heappush(self._heap, (self.place(request), self._num_pushed, request))

    def requeue(self, request: Request) -> None:
        self.add(request)

    def peek(self) -> Request:
        self._drop_removed()
        return self._heap[0][2]

    def pop(self) -> Request:
        self._drop_removed()
        request = heapq.heappop(self._heap)[2]
        del self._live[request.request_id]
        return request

    def remove(self, request: Request) -> None:
        # The heap entry stays behind without a live number and is dropped when it surfaces, or when the dead prevail.
        self._live.pop(request.request_id, None)
        if len(self._heap) > 2 * len(self._live) + 16:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)

    def charge(self, request: Request, num_tokens: int) -> None:
        pass

    def _is_live(self, entry: tuple[Order, int, Request]) -> bool:
        return self._live.get(entry[2].request_id) == entry[1]

    def _drop_removed(self) -> None:
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)

    def pick_victim(self, running: Sequence[Request]) -> Request:
        return max(reversed(running), key=lambda request: (request.priority, request.arrival_time))

    def place(self, request: Request) -> Order:
        return request.priority, request.arrival_time, *by_arrival(request)

    def standing(self, request: Request) -> Order:
        return (request.priority,)

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        for entry in sorted(self._heap):
            if self._is_live(entry):
                yield entry[2]
