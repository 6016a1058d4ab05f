"""The policy `fair`: tenants take turns by how little they have been served.

This is the Virtual Token Counter of Sheng et al. (Fairness in Serving Large Language Models, OSDI 2024), twice:
between the names of tenants, and inside a name between its users, so that a name gains nothing by having many users.
A counter grows by the tokens that plans give to a tenant, divided by its weight: one for each token computed and one
more for each sampled, hence 1 for a token of a prompt, nothing for one out of the prefix cache, 2 for a decoded one.
What a preemption makes necessary again is charged again, since the device works for it again.

The lowest counter goes first. Whoever joins with nothing waiting is lifted to the lowest counter among those that
wait (or, when nobody does, to that of the last one admitted): idling earns no credit. Nothing here looks at each
waiting request: a decision costs the logarithm of the number of tenants, amortised over the charges.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence

from mini_vllm.core.request_queue import FCFSQueue, Order, by_arrival
from mini_vllm.request import Request

MAX_IDLE_COUNTERS = 4096
"""Counters kept of those who have nothing to do but were served more than others that wait. Beyond that the lowest,
who gains least by it, is forgotten."""

KeyOf = Callable[[Request], str]
_LEVELS: tuple[KeyOf, ...] = (lambda request: request.tenant.name, lambda request: request.tenant.user)


class _Member:
    """One who takes turns. served: its counter. turn: decides between equals. unfinished: ids, waiting or running."""

    __slots__ = ("in_heap", "key", "queue", "served", "turn", "unfinished", "weight")

    def __init__(self, key: str, weight: float, served: float, queue: "FairQueue | FCFSQueue") -> None:
        self.key = key
        self.weight = weight
        self.served = served
        self.queue = queue
        self.unfinished: set[str] = set()
        self.turn = 0
        self.in_heap = False


class FairQueue:
    """Members that take turns, each with a queue of its own: users of a name, or at last the requests of a user.

    The heap holds every member that has someone waiting, under what it had been served when it was put there. Counters
    only grow, so an entry that is out of date is too low, surfaces too early, and is put right then.
    """

    counts_tokens = True

    def __init__(self, weights: Mapping[str, float] | None = None, levels: Sequence[KeyOf] = _LEVELS) -> None:
        self._weights = weights or {}
        self._key_of, *self._deeper = levels
        self._members: dict[str, _Member] = {}
        self._heap: list[tuple[float, int, _Member]] = []
        self._idle: list[tuple[float, str]] = []
        self._num_waiting = 0
        self._num_turns = 0
        self._last_admitted: _Member | None = None

    # -- requests in and out -----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        member = self._member_of(request)
        if not member.queue:
            member.served = max(member.served, self._floor())
        member.queue.add(request)
        self._now_waits(member, request)

    def requeue(self, request: Request) -> None:
        member = self._member_of(request)
        member.queue.requeue(request)
        self._now_waits(member, request)

    def peek(self) -> Request:
        return self._next().queue.peek()

    def pop(self) -> Request:
        self._last_admitted = self._next()
        self._num_waiting -= 1
        return self._last_admitted.queue.pop()

    def remove(self, request: Request) -> None:
        member = self._members.get(self._key_of(request))
        if member is None:
            return
        before = len(member.queue)
        member.queue.remove(request)
        self._num_waiting -= before - len(member.queue)
        member.unfinished.discard(request.request_id)
        if not member.unfinished:
            self._retire(member)

    def charge(self, request: Request, num_tokens: int) -> None:
        member = self._member_of(request)
        member.unfinished.add(request.request_id)  # a child is first heard of when it runs
        member.served += num_tokens / member.weight
        member.queue.charge(request, num_tokens)

    # -- members -----------------------------------------------------------------------------------------

    def _member_of(self, request: Request) -> _Member:
        key = self._key_of(request)
        member = self._members.get(key)
        if member is None:
            queue = FairQueue(levels=self._deeper) if self._deeper else FCFSQueue()
            member = _Member(key, self._weights.get(key, 1.0), self._floor(), queue)
            self._members[key] = member
        return member

    def _now_waits(self, member: _Member, request: Request) -> None:
        self._num_waiting += 1
        member.unfinished.add(request.request_id)
        if not member.in_heap:
            member.in_heap = True
            self._push(member, heapq.heappush)

    def _push(self, member: _Member, push: Callable[..., object]) -> None:
        self._num_turns += 1
        member.turn = self._num_turns
        push(self._heap, (member.served, member.turn, member))

    def _next(self) -> _Member:
        """The member whose turn it is; IndexError when nobody waits."""
        while True:
            served, _, member = self._heap[0]
            if not member.queue:
                heapq.heappop(self._heap)
                member.in_heap = False
            elif served < member.served:
                self._push(member, heapq.heapreplace)
            else:
                return member

    def _floor(self) -> float:
        """What a newcomer counts as having been served."""
        if self._num_waiting:
            return self._next().served
        return self._last_admitted.served if self._last_admitted is not None else 0.0

    def _retire(self, member: _Member) -> None:
        """Forget idle counters as soon as coming back without one would bring no gain."""
        heapq.heappush(self._idle, (member.served, member.key))
        floor = self._floor()
        while self._idle and (self._idle[0][0] <= floor or len(self._idle) > MAX_IDLE_COUNTERS):
            served, key = heapq.heappop(self._idle)
            known = self._members.get(key)
            if known is not None and not known.unfinished and known.served <= served:
                del self._members[key]
        if len(self._heap) > 2 * len(self._members) + 16:  # entries of the forgotten prevail
            self._rebuild_heap()

    def _rebuild_heap(self) -> None:
        for _, _, member in self._heap:
            member.in_heap = bool(member.queue)
        self._heap = [entry for entry in self._heap if entry[2].in_heap]
        heapq.heapify(self._heap)

    # -- who gives way -----------------------------------------------------------------------------------

    def pick_victim(self, running: Sequence[Request]) -> Request:
        """The latest of the user served most, of the name served most; the earliest of all is spared.

        Counters change places all the time, arrival does not: sparing the earliest is what makes every workload end.
        """
        first = min(running, key=by_arrival)
        others = [request for request in running if request is not first] or [first]
        return max(others, key=lambda request: (self.standing(request), by_arrival(request)))

    def place(self, request: Request) -> Order:
        return by_arrival(request)

    def standing(self, request: Request) -> Order:
        member = self._members.get(self._key_of(request))
        if member is None:
            return ()
        return member.served, *member.queue.standing(request)

    # -- looking in --------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        """As it would go on if each were charged, when admitted, the tokens that it has now."""
        if self._num_waiting:
            self._next()  # puts the head's entry right, so that the first one here is the one it will be
        turns = [(m.served, m.turn, iter(m.queue), m.weight) for m in self._members.values() if m.queue]
        heapq.heapify(turns)
        while turns:
            served, turn, requests, weight = turns[0]
            request = next(requests, None)
            if request is None:
                heapq.heappop(turns)
                continue
            heapq.heapreplace(turns, (served + request.num_tokens / weight, turn, requests, weight))
            yield request
