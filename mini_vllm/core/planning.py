"""Entries of the plan: made for a request the worker does not know, taken back, and laid beside their results."""

from collections.abc import Sequence

from mini_vllm.core.scheduler_output import BlockIds, ModelRunnerOutput, NewRequestData, SchedulerOutput
from mini_vllm.request import Request


def new_request_data(request: Request, block_ids: BlockIds) -> NewRequestData:
    """All that a worker needs to know; `block_ids` is the whole table."""
    return NewRequestData(
        req_id=request.request_id,
        token_ids=list(request.all_token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        sampling_params=request.sampling_params,
        block_ids=block_ids,
        num_computed_tokens=request.num_computed_tokens,
        lora_name=request.lora_request.lora_name if request.lora_request else None,
        mm_features=list(request.mm_features),
        sample_index=request.sample_index,
        all_stop_token_ids=request.all_stop_token_ids,
        bad_words_token_ids=[list(ids) for ids in request.bad_words_token_ids],
    )


def unschedule(request_id: str, plan: SchedulerOutput) -> int:
    """Take a request out of the plan. Returns the tokens it had been given there.

    Only running requests are ever preempted, so it is deltas, or a child's first row, that are taken back.
    """
    num_tokens = plan.num_scheduled_tokens.pop(request_id, 0)
    if num_tokens == 0:
        return 0
    del plan.epochs[request_id]
    plan.forks.pop(request_id, None)
    cached = plan.cached_reqs
    if request_id not in cached.req_ids:
        plan.new_reqs = [new for new in plan.new_reqs if new.req_id != request_id]
        return num_tokens
    index = cached.req_ids.index(request_id)
    del cached.req_ids[index]
    del cached.num_computed_tokens[index]
    cached.new_block_ids.pop(request_id, None)
    return num_tokens


def in_plan_order(plan: SchedulerOutput, result: ModelRunnerOutput) -> Sequence[list[int]]:
    """The tokens sampled for each entry of the plan, whatever rows the worker had them in."""
    planned = list(plan.epochs)
    if result.req_ids == planned:
        return result.sampled_token_ids
    sampled = dict(zip(result.req_ids, result.sampled_token_ids, strict=True))
    return [sampled.get(request_id, []) for request_id in planned]
