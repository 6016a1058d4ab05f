"""Which replica a request goes to. A router sees what a real one could: what it sent where, and what came back.

`round-robin` takes turns. `least-loaded` takes the replica with the fewest tokens queued and running (prompts plus what
was generated so far). `prefix-aware` takes the one that was sent the longest part of this prompt before, unless that
one has much more to do than another.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from mini_vllm.core.block_pool import BlockHash, extend_block_hashes
from mini_vllm.exceptions import ConfigError
from mini_vllm.request import Request
from mini_vllm.simulator.options import SimulationOptions

MAX_IMBALANCE = 1.5
"""Times the least load, plus the prompt, that a replica may have and still be preferred for its prefixes."""


class Loaded(Protocol):
    """load: tokens of the requests that are queued or running there."""

    load: int


class Router(Protocol):
    def choose(self, request: Request, replicas: Sequence[Loaded]) -> int:
        """The position of the replica that gets this request."""


def make_router(options: SimulationOptions) -> Router:
    if options.routing == "round-robin":
        return RoundRobin()
    if options.routing == "least-loaded":
        return LeastLoaded()
    if not options.enable_prefix_caching:
        raise ConfigError("routing: 'prefix-aware' has no meaning with enable_prefix_caching=False")
    return PrefixAware(options.num_replicas, options.block_size, options.num_gpu_blocks)


class RoundRobin:
    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, replicas: Sequence[Loaded]) -> int:
        chosen = self._next
        self._next = (chosen + 1) % len(replicas)
        return chosen


class LeastLoaded:
    """The first among equals."""

    def choose(self, request: Request, replicas: Sequence[Loaded]) -> int:
        return min(range(len(replicas)), key=lambda place: replicas[place].load)


class PrefixAware:
    """Remembers the hashes of the prompt blocks sent to each replica, the newest `capacity` of each."""

    def __init__(self, num_replicas: int, block_size: int, capacity: int) -> None:
        self._sent: list[OrderedDict[BlockHash, None]] = [OrderedDict() for _ in range(num_replicas)]
        self._block_size = block_size
        self._capacity = capacity

    def choose(self, request: Request, replicas: Sequence[Loaded]) -> int:
        num_blocks = (request.num_tokens - 1) // self._block_size
        hashes = extend_block_hashes(request, num_blocks, self._block_size)
        chosen = self._pick(request, replicas, hashes)
        sent = self._sent[chosen]
        for block_hash in reversed(hashes):  # the beginning, which most others share, is forgotten last
            sent[block_hash] = None
            sent.move_to_end(block_hash)
        while len(sent) > self._capacity:
            sent.popitem(last=False)
        return chosen

    def _pick(self, request: Request, replicas: Sequence[Loaded], hashes: Sequence[BlockHash]) -> int:
        loads = [replica.load for replica in replicas]
        matches = [self._match(place, hashes) for place in range(len(replicas))]
        best = max(range(len(replicas)), key=lambda place: (matches[place], -loads[place]))
        if matches[best] and loads[best] <= MAX_IMBALANCE * min(loads) + request.num_tokens:
            return best
        return loads.index(min(loads))

    def _match(self, place: int, hashes: Sequence[BlockHash]) -> int:
        sent = self._sent[place]
        return next((index for index, block_hash in enumerate(hashes) if block_hash not in sent), len(hashes))
