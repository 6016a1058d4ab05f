"""A first step that nobody asked for, so that the first request is not the one that pays for it.

Kernels are chosen, thread pools started and buffers touched by the first steps of an executor. `warm_up` hands it
plans of its own: neither the scheduler nor its caches, counters and records learn of them.
"""

from mini_vllm.core.scheduler_output import CachedRequestData, NewRequestData, SchedulerOutput
from mini_vllm.engine.core import EngineCore
from mini_vllm.sampling_params import SamplingParams

_REQUEST_ID = "warm-up"
_MAX_PROMPT = 64


def warm_up(core: EngineCore) -> None:
    """A short prompt and one more token, greedy and drawn. What it writes into free blocks nobody reads."""
    kv, config = core.scheduler.kv, core.scheduler.config
    room = kv.block_pool.num_usable_blocks // kv.num_groups * kv.block_size
    length = min(_MAX_PROMPT, config.max_num_batched_tokens, room - 1, core.executor.max_model_len - 2)
    if length < 1:
        return
    for params in (SamplingParams(temperature=0.0), SamplingParams(seed=0)):
        for plan in _plans(length, kv.num_groups, kv.block_size, params):
            core.run_unplanned(plan)


def _plans(length: int, num_groups: int, block_size: int, params: SamplingParams) -> list[SchedulerOutput]:
    """The prompt, a token after it, and the end. Block 0 is the null block."""
    per_group = -(-(length + 1) // block_size)
    blocks = tuple(list(range(1 + group * per_group, 1 + (group + 1) * per_group)) for group in range(num_groups))
    new = NewRequestData(_REQUEST_ID, [0] * length, length, params, blocks, num_computed_tokens=0)
    return [
        SchedulerOutput(new_reqs=[new], num_scheduled_tokens={_REQUEST_ID: length}, total_num_scheduled_tokens=length),
        SchedulerOutput(
            cached_reqs=CachedRequestData([_REQUEST_ID], [length]),
            num_scheduled_tokens={_REQUEST_ID: 1},
            total_num_scheduled_tokens=1,
        ),
        SchedulerOutput(finished_req_ids=[_REQUEST_ID]),
    ]
