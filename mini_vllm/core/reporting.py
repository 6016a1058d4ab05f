"""What the scheduler says about requests: their news, and why they wait."""

from collections.abc import Iterable

from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.request_queue import RequestQueue
from mini_vllm.core.scheduler_output import EngineCoreOutput
from mini_vllm.request import LAST_UNFINISHED, Request, WaitingReason

_blank = object.__new__

DEFERRED = frozenset((WaitingReason.RULE, WaitingReason.GRAMMAR, WaitingReason.REMOTE_KVS))
"""Reasons that are not for want of room. Only the head of the queue can have one; those behind wait for the head."""


def news_of(request: Request, new_token_ids: list[int]) -> EngineCoreOutput:
    """What there is to say about a request now. Its times come with the first news.

    There is one for every token. So only what is said is set, and is all that is sent: `__init__` would set everything.
    """
    news = _blank(EngineCoreOutput)
    news.request_id = request.request_id
    news.new_token_ids = new_token_ids
    if request.status > LAST_UNFINISHED:
        news.finish_reason = request.finish_reason
        news.stop_reason = request.stop_reason
        news.error = request.error
    if request.num_cached_tokens > 0:
        news.num_cached_tokens = request.num_cached_tokens
    if request.num_preemptions:
        news.num_preemptions = request.num_preemptions
    if not request.times_told:
        request.times_told = True
        news.times = times_of(request)
    return news


def times_of(request: Request) -> tuple[float, float | None]:
    """When it was queued and first admitted."""
    assert request.queued_time is not None, f"{request.request_id} was never queued"
    return request.queued_time, request.scheduled_time


def outgrown(request: Request, kv: KVCacheManager) -> str:
    """Why a request can not go on, or not begin, in a pool of that size."""
    needed, there = kv.num_blocks_for(request.num_tokens), kv.block_pool.num_usable_blocks
    return (
        f"the request has {request.num_tokens} tokens and needs {needed} KV cache blocks of "
        f"{kv.block_size} tokens, but the whole pool has {there}"
    )


def note_head(waiting: RequestQueue, reason: WaitingReason, detail: str = "") -> None:
    """Remember why the head of the queue waits; those behind it wait for it."""
    if not waiting:
        return
    head = waiting.peek()
    if head.waiting_reason is not reason or head.waiting_detail != detail:
        head.waiting_reason, head.waiting_detail = reason, detail


def waiting_reasons(waiting: Iterable[Request]) -> dict[str, str]:
    """Why each waiting request waits, in queue order. Only the head's reason and a preemption are its own."""
    reasons: dict[str, str] = {}
    for position, request in enumerate(waiting):
        if position == 0 or request.waiting_reason is WaitingReason.PREEMPTED:
            reasons[request.request_id] = reason_of(request)
        else:
            reasons[request.request_id] = str(WaitingReason.BEHIND_HEAD)
    return reasons


def reason_of(request: Request) -> str:
    return f"{request.waiting_reason}: {request.waiting_detail}" if request.waiting_detail else request.waiting_reason
