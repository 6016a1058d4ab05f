"""What every step computed, request by request: batch stacks, and the spike that a long prompt puts in a decode.

The engine's own scheduler serves a few listed requests with steps of one second, so that an arrival at 0.5 is in time
for the second step and everything can be counted by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mini_vllm.core.scheduler_output import SchedulerOutput
from mini_vllm.engine.request_trace import TracedRequest
from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.cost import CostModel, StepLoad, TwoConstantCost
from mini_vllm.simulator.driver import simulate
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.replay import TraceWorkload

ONE_SECOND_STEPS = TwoConstantCost(fixed_seconds=1.0, per_token_seconds=0.0)

Listed = tuple[float, int, int]
"""(arrival in seconds, prompt tokens, output tokens)."""


@dataclass(frozen=True)
class Step:
    """tokens: of each request that computed some, by its place in the list. seconds: that the step took."""

    tokens: dict[int, int]
    seconds: float

    @property
    def total(self) -> int:
        return sum(self.tokens.values())


def serve(requests: Sequence[Listed], cost: CostModel = ONE_SECOND_STEPS, **options: Any) -> list[Step]:
    """Every step of the engine while it serves these requests, which share nothing. Arrivals must not fall.

    options: of `SimulationOptions`, for one replica. Raises `ConfigError`.
    """
    if options.get("num_replicas", 1) != 1:
        raise ConfigError(f"num_replicas: the steps of one engine are listed, got {options['num_replicas']}")
    arrivals = [arrival for arrival, _, _ in requests]
    if arrivals != sorted(arrivals):
        raise ConfigError(f"requests: must be in order of arrival, got {arrivals}")
    traced = [
        TracedRequest(1000 * arrival, prompt, output, hash_ids=(number,), block_size=prompt)
        for number, (arrival, prompt, output) in enumerate(requests)
    ]
    steps: list[Step] = []

    def note(plan: SchedulerOutput, load: StepLoad, seconds: float) -> None:
        tokens = {int(request_id): count for request_id, count in plan.num_scheduled_tokens.items()}
        steps.append(Step(tokens, seconds))

    simulate(SimulationOptions(**options), TraceWorkload(traced), cost, observe=note)
    return [step for step in steps if step.tokens]


def batch_stacks(
    prompt_lens: Sequence[int] = (11, 7), output_len: int = 4, max_num_batched_tokens: int = 8, **options: Any
) -> list[dict[int, int]]:
    """Tokens of every request in every step, all there from the start.

    By default: {0: 8}, {0: 3, 1: 5}, {0: 1, 1: 2}, {0: 1, 1: 1}, {0: 1, 1: 1}, {1: 1}. Over the steps each request
    sums to its prompt + output - 1.
    """
    listed = [(0.0, prompt_len, output_len) for prompt_len in prompt_lens]
    options = {"max_num_seqs": min(len(listed), max_num_batched_tokens)} | options
    return [step.tokens for step in serve(listed, max_num_batched_tokens=max_num_batched_tokens, **options)]


@dataclass(frozen=True)
class PrefillSpike:
    """What a decoding request lives through while a long prompt arrives.

    tokens, seconds: of each step in which it got a token, after its own prefill. first_token_steps: that the long
    prompt took until its first token.
    """

    threshold: int
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    first_token_steps: int

    @property
    def worst(self) -> int:
        return max(self.tokens)


def prefill_spike(
    threshold: int = 0,
    *,
    long_prompt_len: int = 256,
    max_tokens: int = 16,
    num_long: int = 1,
    cost: CostModel = ONE_SECOND_STEPS,
    **options: Any,
) -> PrefillSpike:
    """A request decodes; right after its own prefill, long prompts arrive that generate two tokens each.

    threshold: `long_prefill_token_threshold`, 0 for none. By default the decode's steps are 257, 2, then thirteen of 1;
    with a threshold of 32, eight of 33, then 2, then six of 1: the same tokens, no spike.
    """
    moment = 0.5 * cost.step_seconds(StepLoad.of([(0, 1)]))  # while the first step, its prefill, is under way
    listed = [(0.0, 1, max_tokens), *((moment, long_prompt_len, 2) for _ in range(num_long))]
    steps = serve(listed, cost, long_prefill_token_threshold=threshold, **options)
    decoding = [step for step in steps[1:] if 0 in step.tokens]
    return PrefillSpike(
        threshold,
        tuple(step.total for step in decoding),
        tuple(step.seconds for step in decoding),
        _steps_to_first_token(steps[1:], long_prompt_len),
    )


def _steps_to_first_token(steps: Sequence[Step], prompt_len: int) -> int:
    """Of the first long prompt, from its arrival on."""
    done = 0
    for number, step in enumerate(steps, start=1):
        done += step.tokens.get(1, 0)
        if done >= prompt_len:
            return number
    raise AssertionError("a prompt was never computed")
