"""Schedules worked out by hand, step by step: the figures a reader of the engine can check with a pencil."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.core.scheduler_output import SchedulerOutput
from mini_vllm.request import Request
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.toy import ToyEngine


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def record_plans(engine: ToyEngine) -> list[SchedulerOutput]:
    """Every plan the scheduler makes from here on."""
    plans: list[SchedulerOutput] = []
    schedule = engine.scheduler.schedule

    def probe() -> SchedulerOutput:
        plans.append(schedule())
        return plans[-1]

    engine.scheduler.schedule = probe  # type: ignore[method-assign]
    return plans


def run(engine: ToyEngine) -> list[dict[str, int]]:
    """Step to the end; tokens by request id, a dict a step."""
    plans = record_plans(engine)
    while engine.has_unfinished_requests():
        engine.step()
        assert len(plans) < 1000
    return [dict(plan.num_scheduled_tokens) for plan in plans]


# -- two prompts under a budget of 8 -----------------------------------------------------------------------------


def test_hello_world_and_goodbye_under_a_budget_of_8() -> None:
    engine = ToyEngine(max_num_batched_tokens=8)
    a, b = engine.add_request("hello world", params(4)), engine.add_request("goodbye", params(4))
    assert run(engine) == [{a: 8}, {a: 3, b: 5}, {a: 1, b: 2}, {a: 1, b: 1}, {a: 1, b: 1}, {b: 1}]


@pytest.mark.parametrize(("budget", "num_steps"), [(1, 24), (2, 14), (4, 8), (8, 6), (16, 5), (24, 4), (2048, 4)])
def test_the_budget_changes_the_steps_and_never_the_sum(budget: int, num_steps: int) -> None:
    """Each request costs prompt + max_tokens - 1 whatever the budget: 14 + 10 = 24."""
    engine = ToyEngine(max_num_batched_tokens=budget)
    a, b = engine.add_request("hello world", params(4)), engine.add_request("goodbye", params(4))
    steps = run(engine)
    assert all(sum(step.values()) <= budget for step in steps)
    assert (sum(step.get(a, 0) for step in steps), sum(step.get(b, 0) for step in steps)) == (14, 10)
    assert len(steps) == num_steps


def test_the_example_prints_that_trace() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "examples" / "toy_trace.py")],
        capture_output=True, text=True, check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [int(row[1]) for row in rows] == [8, 8, 3, 2, 2, 1]
    assert [[cell for cell in row[2:] if cell.isdigit() or cell == "."] for row in rows] == [
        ["8", "."], ["3", "5"], ["1", "2"], ["1", "1"], ["1", "1"], [".", "1"]
    ]  # fmt: skip
    assert "B waits: token budget of the step spent (max_num_batched_tokens)" in done.stdout


# -- the life of one request ---------------------------------------------------------------------------------------


def trace_request(prompt: str, max_tokens: int = 4, **knobs: Any) -> list[tuple[str, int, int]]:
    """(status, num_computed_tokens, num_tokens) after each step: those running, then those that finished."""
    engine = ToyEngine(**knobs)
    engine.add_request(prompt, params(max_tokens))
    events: list[tuple[str, int, int]] = []
    while engine.has_unfinished_requests():
        finished = engine.step()
        seen: list[Request] = [*engine.scheduler.running, *finished]
        events += [(r.status.name, r.num_computed_tokens, r.num_tokens) for r in seen]
    return events


def test_hello_traced() -> None:
    events = trace_request("hello", 4)
    assert events[:3] == [("RUNNING", 5, 6), ("RUNNING", 6, 7), ("RUNNING", 7, 8)]
    assert events[3][0].startswith("FINISHED_LENGTH") and events[3][1:] == (8, 9)
    assert len(events) == 4, "as many steps as tokens, when the prompt fits one step"


def test_ten_tokens_with_a_threshold_of_2() -> None:
    """Computed 2, 4, 6, 8, 10; nothing is sampled before the last chunk."""
    events = trace_request("0123456789", 2, long_prefill_token_threshold=2)
    assert [(c, n) for _, c, n in events] == [(2, 10), (4, 10), (6, 10), (8, 10), (10, 11), (11, 12)]


# -- what a long prompt does to a neighbour's decode -----------------------------------------------------------------


def decode_step_costs(threshold: int, long_prompt_len: int = 256, max_tokens: int = 16) -> tuple[list[int], list[int]]:
    """Tokens in each step in which A decodes while B's long prompt comes in, and A's output."""
    engine = ToyEngine(long_prefill_token_threshold=threshold)
    a = engine.add_request("victim", params(max_tokens))
    engine.step()
    engine.add_request("B" * long_prompt_len, params(2))
    steps = run(engine)
    return [sum(step.values()) for step in steps if a in step], engine.requests[a].output_token_ids


def test_an_uncut_prompt_is_one_spike_and_a_cut_one_a_plateau() -> None:
    spike, _ = decode_step_costs(0)
    plateau, _ = decode_step_costs(32)
    assert spike == [257, 2] + [1] * 13
    assert plateau == [33] * 8 + [2] + [1] * 6
    assert len(spike) == len(plateau) == 15 and sum(spike) == sum(plateau) == 272


@pytest.mark.parametrize("threshold", [0, 16, 32, 64, 128, 256])
def test_cutting_changes_no_token_of_the_neighbour(threshold: int) -> None:
    costs, output = decode_step_costs(threshold)
    assert output == decode_step_costs(0)[1]
    assert len(costs) == 15, "it advanced in every step"


def test_a_storm_of_five_prompts_is_capped_by_the_budget_alone() -> None:
    """Two decodes, then one prompt of 256 a step at a threshold of 32: the threshold is per request."""
    engine = ToyEngine(long_prefill_token_threshold=32)
    for prompt in ("first", "second"):
        engine.add_request(prompt, params(40))
    engine.step()
    plans = record_plans(engine)
    for i in range(5):
        engine.add_request(str(i) * 256, params(2))
        engine.step()
    while engine.has_unfinished_requests():
        engine.step()
    totals = [plan.total_num_scheduled_tokens for plan in plans]
    assert totals[:14] == [34, 66, 98, 130, 162, 162, 162, 162, 131, 99, 67, 35, 3, 2]
    assert max(totals) == 5 * 32 + 2


# -- a pool that is too small ----------------------------------------------------------------------------------------


def run_cramped(prompts: list[str], num_blocks: int, max_tokens: int, **knobs: Any) -> ToyEngine:
    engine = ToyEngine(num_blocks=num_blocks, block_size=4, **knobs)
    engine.generate(prompts, params(max_tokens))
    return engine


@pytest.mark.parametrize("max_tokens", [1, 4, 8, 9])
def test_a_cramped_pool_gives_the_tokens_of_a_roomy_one(max_tokens: int) -> None:
    prompts = ["abcdefgh", "ijklmnop"]
    cramped, roomy = run_cramped(prompts, 5, max_tokens), run_cramped(prompts, 256, max_tokens)
    outputs = [[r.output_token_ids for r in engine.requests.values()] for engine in (cramped, roomy)]
    assert outputs[0] == outputs[1] and all(len(ids) == max_tokens for ids in outputs[0])
    preemptions = [sum(r.num_preemptions for r in engine.requests.values()) for engine in (cramped, roomy)]
    assert preemptions == [0 if max_tokens == 1 else 1, 0]


def test_preemption_happens_at_the_very_first_decode() -> None:
    engine = ToyEngine(num_blocks=5, block_size=4)
    a, b = engine.add_request("abcdefgh", params(9)), engine.add_request("ijklmnop", params(9))
    plans = record_plans(engine)
    engine.step()
    engine.step()
    assert [plan.preempted_req_ids for plan in plans] == [[], [b]]
    assert plans[1].num_scheduled_tokens == {a: 1}


@pytest.mark.parametrize(("max_tokens", "num_steps", "num_tokens"), [(4, 7, 30), (8, 15, 38), (9, 17, 40)])
def test_steps_and_tokens_of_the_cramped_pool(max_tokens: int, num_steps: int, num_tokens: int) -> None:
    """Without prefix caching the victim computes its prompt (and one more token) again."""
    engine = ToyEngine(num_blocks=5, block_size=4, enable_caching=False)
    for prompt in ("abcdefgh", "ijklmnop"):
        engine.add_request(prompt, params(max_tokens))
    steps = run(engine)
    assert (len(steps), sum(sum(step.values()) for step in steps)) == (num_steps, num_tokens)


def test_sweeping_the_pool_gives_a_hockey_stick_and_one_answer() -> None:
    """Four requests of 8 + 12: from 5 blocks (barely one at a time) to 50, steps only fall and tokens never change."""
    prompts = ["abcdefgh", "ijklmnop", "qrstuvwx", "yz012345"]
    num_steps, outputs = [], set()
    for num_blocks in range(6, 51):
        engine = ToyEngine(num_blocks=num_blocks, block_size=4)
        for prompt in prompts:
            engine.add_request(prompt, params(12))
        num_steps.append(len(run(engine)))
        outputs.add(tuple(tuple(r.output_token_ids) for r in engine.requests.values()))
    assert len(outputs) == 1
    assert num_steps[0] > 40 and num_steps[-1] == 12
    assert num_steps == sorted(num_steps, reverse=True)
    assert num_steps[4 * 5 + 1 - 6 :] == [12] * (50 - 20), "four requests of 5 blocks each fit from 21 on"


# -- a shared prefix ---------------------------------------------------------------------------------------------------


def run_and_count(prompts: list[str], **knobs: Any) -> tuple[list[dict[str, int]], list[list[int]]]:
    engine = ToyEngine(block_size=4, **knobs)
    for prompt in prompts:
        engine.add_request(prompt, params(4))
    steps = run(engine)
    return steps, [r.output_token_ids for r in engine.requests.values()]


def total(steps: list[dict[str, int]]) -> int:
    return sum(sum(step.values()) for step in steps)


def test_a_shared_prefix_is_computed_once() -> None:
    prompts = ["S" * 64 + str(i) for i in range(8)]
    without, outputs_without = run_and_count(prompts, enable_caching=False)
    with_cache, outputs_with = run_and_count(prompts)
    assert (total(without), total(with_cache)) == (544, 96)
    assert list(with_cache[0].values()) == [65, 1, 1, 1, 1, 1, 1, 1]
    assert total(without) - total(with_cache) == 7 * 64
    assert outputs_with == outputs_without


def test_prompts_that_share_nothing_save_nothing() -> None:
    prompts = [str(i) * 65 for i in range(8)]
    assert total(run_and_count(prompts)[0]) == total(run_and_count(prompts, enable_caching=False)[0]) == 544


def test_identical_prompts_of_whole_blocks_leave_one_block_to_compute() -> None:
    """64 tokens of 64 would be cached; a hit never covers the last one, so followers compute 4."""
    steps, _ = run_and_count(["S" * 64] * 3)
    assert list(steps[0].values()) == [64, 4, 4]


def test_each_turn_of_a_chat_pays_for_what_is_new() -> None:
    engine = ToyEngine(block_size=4)
    history, paid = "", []
    for turn in range(5):
        history += f"<question {turn}>"  # 12 bytes
        rid = engine.add_request(history, params(4))
        paid.append(sum(sum(step.values()) for step in run(engine)))
        history += engine.tokenizer.decode(engine.requests[rid].output_token_ids)
    # 12 new tokens and 3 decodes a turn; the last answer token was never computed, and whole blocks are found.
    assert paid[0] == 15 and all(15 <= cost <= 15 + 4 + 1 for cost in paid[1:])
