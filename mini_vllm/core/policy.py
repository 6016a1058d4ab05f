"""Who goes next and who gives way: the names of policies in the configuration, and what stands behind them."""

from collections.abc import Callable, Sequence

from mini_vllm.config import SchedulerConfig
from mini_vllm.core.fair_queue import FairQueue
from mini_vllm.core.request_queue import FCFSQueue, PriorityQueue, RequestQueue
from mini_vllm.request import Request


def least_work_victim(queue: RequestQueue, running: Sequence[Request]) -> Request:
    """Of those that the policy would rather see go, the one with the fewest computed tokens; the latest among equals.

    The first by the policy's order is spared while there is anyone else. So of all unfinished requests the very first,
    once it runs, runs to its end; whoever is first then is next, and every workload ends.
    """
    first = min(running, key=queue.place)
    others = [request for request in reversed(running) if request is not first] or [first]
    worst = max(map(queue.standing, others))
    return min((r for r in others if queue.standing(r) == worst), key=lambda r: r.num_computed_tokens)


def make_queue(config: SchedulerConfig) -> RequestQueue:
    """The waiting queue of a policy."""
    if config.policy == "fair":
        return FairQueue(config.tenant_weights)
    return PriorityQueue() if config.policy == "priority" else FCFSQueue()


def make_victim_picker(config: SchedulerConfig, queue: RequestQueue) -> Callable[[Sequence[Request]], Request]:
    """Which of the running requests gives way when the pool is full."""
    if config.preemption_policy == "least-work":
        return lambda running: least_work_victim(queue, running)
    return queue.pick_victim
