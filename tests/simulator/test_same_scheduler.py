"""The claim the simulator stands on: its plans are those of the real engine, plan for plan.

The bundled model serves a workload whose arrivals are given by step index; the simulator serves the same with steps of
one second. Everything in every plan is compared but the values of tokens, which nobody predicts.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import SchedulerOutput
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.builder import build_core
from mini_vllm.engine.core import EngineCore
from mini_vllm.executor.uniproc import UniProcExecutor
from mini_vllm.request import Request
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.simulator.driver import simulate
from mini_vllm.simulator.executor import PredictingExecutor
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.workload import SimRequest
from tests.core.harness import fake_result, make_request, make_scheduler
from tests.simulator.sim import Listed, UnitCost

Snapshot = tuple[Any, ...]
VOCABULARY = 1000


def snapshot(plan: SchedulerOutput) -> Snapshot:
    """All of a plan but the values of tokens."""
    new = [(n.req_id, len(n.token_ids), n.num_prompt_tokens, n.block_ids, n.num_computed_tokens) for n in plan.new_reqs]
    cached = plan.cached_reqs
    deltas = list(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    blocks = {request_id: [list(group) for group in ids] for request_id, ids in cached.new_block_ids.items()}
    scheduled = list(plan.num_scheduled_tokens.items())
    ends = list(plan.finished_req_ids), list(plan.preempted_req_ids), list(plan.block_copies)
    return plan.step_id, scheduled, plan.total_num_scheduled_tokens, new, deltas, blocks, dict(plan.epochs), *ends


def recorded(patch: pytest.MonkeyPatch, executor: type) -> list[Snapshot]:
    """Snapshots of the plans that executors of this class will get."""
    plans: list[Snapshot] = []
    execute = executor.execute_model

    def record(self: Any, plan: SchedulerOutput) -> Any:
        plans.append(snapshot(plan))
        return execute(self, plan)

    patch.setattr(executor, "execute_model", record)
    return plans


def real_tokens(request: SimRequest) -> list[int]:
    """The same prompt for a real vocabulary: equal runs are equal text, others are not."""
    token_ids: list[int] = []
    for token_id, count in request.runs:
        rng = random.Random(token_id)
        token_ids += [rng.randrange(10, VOCABULARY) for _ in range(count)]
    return token_ids


@pytest.fixture(scope="module")
def executor() -> Iterator[Callable[[EngineArgs], UniProcExecutor]]:
    made: list[UniProcExecutor] = []

    def make(args: EngineArgs) -> UniProcExecutor:
        made.append(UniProcExecutor(args.create_engine_config()))
        return made[-1]

    yield make
    for each in made:
        each.shutdown()


def serve(core: EngineCore, workload: Listed) -> None:
    """The real engine, arrivals by step index."""
    waiting = [workload.request(index) for index in range(workload.num_requests)]
    step = 0
    while waiting or core.has_unfinished_requests():
        while waiting and waiting[0].arrival <= step:
            sim = waiting.pop(0)
            params = SamplingParams(temperature=0.0, max_tokens=sim.output_len, ignore_eos=True)
            core.add_request(
                Request(str(sim.index), real_tokens(sim), params, arrival_time=sim.arrival, priority=sim.priority)
            )
        if core.has_unfinished_requests():
            core.step()
        step += 1


def bursts(rng: random.Random, count: int, longest: int, outputs: int, *, groups: int = 0) -> Listed:
    """Random lengths, arrivals in clumps and after pauses, prompts of a group beginning alike."""
    rows, arrival = [], 0
    for index in range(count):
        arrival += rng.choice((0, 0, 1, 3, 40 if index == count // 2 else 2))
        prefix = ((5000 + rng.randrange(groups), 40),) if groups else ()
        rows.append((float(arrival), (*prefix, (index + 1, rng.randint(1, longest))), rng.randint(1, outputs)))
    return Listed(rows, [rng.randrange(3) for _ in range(count)])


CASES: dict[str, tuple[Listed, dict[str, Any]]] = {
    "continuous batching": (bursts(random.Random(1), 16, 60, 20), {"max_num_seqs": 5}),
    "chunked prefill": (
        bursts(random.Random(2), 12, 150, 12),
        {"max_num_batched_tokens": 48, "long_prefill_token_threshold": 20, "max_num_seqs": 8},
    ),
    "prefix sharing": (bursts(random.Random(3), 16, 30, 12, groups=2), {"max_num_seqs": 6}),
    "no caching": (
        bursts(random.Random(3), 16, 30, 12, groups=2),
        {"max_num_seqs": 6, "enable_prefix_caching": False},
    ),
    "preemption": (bursts(random.Random(4), 16, 40, 40), {"num_gpu_blocks": 14}),
    "preemption among shared prefixes": (bursts(random.Random(5), 16, 30, 40, groups=2), {"num_gpu_blocks": 16}),
    "the least work gives way, by priority": (
        bursts(random.Random(6), 16, 40, 40, groups=1),
        {"num_gpu_blocks": 16, "preemption_policy": "least-work", "scheduling_policy": "priority"},
    ),
    "a starved budget": (bursts(random.Random(7), 16, 30, 16), {"max_num_batched_tokens": 7}),
}


def both(
    name: str,
    executor: Callable[[EngineArgs], UniProcExecutor],
    patch: pytest.MonkeyPatch,
    sabotage: Callable[[], None] = lambda: None,
) -> tuple[list[Snapshot], list[Snapshot], int]:
    workload, changes = CASES[name]
    options = SimulationOptions(**{"num_gpu_blocks": 200, "block_size": 8, "max_model_len": 256} | changes)
    real = recorded(patch, UniProcExecutor)
    blocks = options.num_gpu_blocks
    args = EngineArgs(
        dtype="float32",
        num_threads=1,
        num_gpu_blocks_override=blocks,
        max_model_len=min(256, (blocks - 1) * 8),
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        long_prefill_token_threshold=options.long_prefill_token_threshold,
        enable_prefix_caching=options.enable_prefix_caching,
        scheduling_policy=options.scheduling_policy,
        preemption_policy=options.preemption_policy,
    )
    core = build_core(args.create_engine_config(), executor(args))
    serve(core, workload)
    simulated = recorded(patch, PredictingExecutor)
    sabotage()
    result = simulate(options, workload, UnitCost())
    assert result.replicas[0].num_preemptions == core.scheduler.num_preemptions
    assert result.replicas[0].prefix_cache_hits == core.scheduler.kv.prefix_cache_hits
    return real, simulated, core.scheduler.num_preemptions


@pytest.mark.parametrize("name", CASES)
def test_plans_are_those_of_the_real_engine(
    name: str, executor: Callable[[EngineArgs], UniProcExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, simulated, preemptions = both(name, executor, monkeypatch)
    assert len(simulated) == len(real)
    for expected, got in zip(real, simulated, strict=True):
        assert got == expected
    assert (preemptions > 0) == ("num_gpu_blocks" in CASES[name][1])


def test_another_scheduler_would_be_noticed(
    executor: Callable[[EngineArgs], UniProcExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken control: in the simulation alone, long chunks are one token shorter from the fourth second on."""
    clamp = Scheduler._clamp

    def shorter(self: Scheduler, request: Request, start: int, budget: int) -> tuple[int, str]:
        count, why = clamp(self, request, start, budget)
        return (count - 1 if self.clock() > 3.0 and count > 8 else count), why

    real, simulated, _ = both(
        "continuous batching", executor, monkeypatch, lambda: monkeypatch.setattr(Scheduler, "_clamp", shorter)
    )
    assert simulated[:3] == real[:3] and simulated != real


def test_results_are_taken_in_the_order_of_the_plan_not_of_the_workers_rows() -> None:
    """Who ends first in a step frees its blocks first, so the order decides which blocks others get."""
    orders = []
    for turned in (False, True):
        scheduler = make_scheduler(num_blocks=32)
        for name in ("a", "b", "c"):
            scheduler.add_request(make_request(name, 5, max_tokens=1))
        plan = scheduler.schedule()
        result = fake_result(scheduler, plan)
        if turned:
            result.req_ids.reverse()
            result.sampled_token_ids.reverse()
        news = scheduler.update_from_output(plan, result)
        free = [block.block_id for block in scheduler.kv.block_pool.free_queue.get_all_free_blocks()]
        orders.append(([item.request_id for item in news], scheduler.schedule().finished_req_ids, free))
    assert orders[0] == orders[1]
    assert orders[0][0] == ["a", "b", "c"]
