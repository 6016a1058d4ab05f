"""The small experiments, against figures that were worked out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.cost import TwoConstantCost
from mini_vllm.simulator.driver import simulate
from mini_vllm.simulator.experiments import (
    batch_stacks,
    budget_knee,
    hockey_stick,
    kv_work,
    kv_work_curve,
    pool_sizes,
    prefill_spike,
    serve,
)
from mini_vllm.simulator.experiments.steps import ONE_SECOND_STEPS
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.workload import WorkloadOptions, make_workload

COST = TwoConstantCost(fixed_seconds=0.02, per_token_seconds=1e-4)

# --- work --------------------------------------------------------------------------------------------------------


def test_ten_tokens_after_five_cost_95_without_a_cache_and_15_with_one():
    work = kv_work(5, 10)
    assert (work.without_cache, work.with_cache, work.num_computed_by_engine) == (95, 15, 14)


def test_a_thousand_tokens_cost_about_half_a_thousand_times_more():
    work = kv_work(5, 1000)
    assert (work.without_cache, work.with_cache) == (504_500, 1005)
    assert work.ratio == pytest.approx(501.99, abs=0.01)


@given(st.integers(1, 300), st.integers(1, 300))
def test_work_is_what_a_loop_counts(prompt_len, num_new):
    work = kv_work(prompt_len, num_new)
    assert work.without_cache == sum(prompt_len + step for step in range(num_new))
    assert work.with_cache == prompt_len + num_new


def test_the_ratio_grows_towards_half_the_length():
    ratios = [work.ratio for work in kv_work_curve([10, 100, 1000, 10_000])]
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(5000, rel=0.01)


@pytest.mark.parametrize(("prompt_len", "num_new"), [(5, 10), (17, 1), (100, 33)])
def test_the_engine_computes_that_many_tokens(prompt_len, num_new):
    steps = serve([(0.0, prompt_len, num_new)])
    assert sum(step.total for step in steps) == kv_work(prompt_len, num_new).num_computed_by_engine


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_no_work_is_refused(sizes):
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        kv_work(*sizes)


# --- steps -------------------------------------------------------------------------------------------------------


def test_two_prompts_under_a_budget_of_eight_stack_as_worked_out():
    assert batch_stacks() == [{0: 8}, {0: 3, 1: 5}, {0: 1, 1: 2}, {0: 1, 1: 1}, {0: 1, 1: 1}, {1: 1}]


def test_an_ample_budget_prefills_everyone_at_once():
    assert batch_stacks(max_num_batched_tokens=64)[0] == {0: 11, 1: 7}


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    output=st.integers(1, 6),
    budget=st.integers(5, 50),
    threshold=st.sampled_from([0, 3, 16]),
)
def test_tokens_are_conserved_and_the_budget_is_kept(prompts, output, budget, threshold):
    stacks = batch_stacks(prompts, output, budget, long_prefill_token_threshold=threshold)
    assert all(sum(stack.values()) <= budget for stack in stacks)
    for request, prompt_len in enumerate(prompts):
        assert sum(stack.get(request, 0) for stack in stacks) == prompt_len + output - 1


def test_a_whole_prompt_is_one_spike_and_chunks_are_none():
    whole, chunked = prefill_spike(0), prefill_spike(32)
    assert whole.tokens == (257, 2, *[1] * 13)
    assert chunked.tokens == (*[33] * 8, 2, *[1] * 6)
    assert sum(whole.tokens) == sum(chunked.tokens) == 272
    assert len(whole.tokens) == len(chunked.tokens) == 15
    assert (whole.first_token_steps, chunked.first_token_steps) == (1, 8)


def test_in_seconds_the_spike_is_the_step_time():
    spike = prefill_spike(0, cost=COST)
    assert spike.seconds[:2] == pytest.approx([0.02 + 257e-4, 0.02 + 2e-4])


def test_a_storm_is_capped_by_the_budget_and_not_by_the_threshold():
    # the threshold is per prompt: two prompts give 2 x 32 + 1, five give 5 x 32 + 1; only the budget is for all
    assert prefill_spike(32, num_long=2).worst == 65
    assert prefill_spike(32, num_long=5).worst == 161
    assert prefill_spike(32, num_long=2, max_num_batched_tokens=40, max_num_seqs=8).worst == 40


@settings(max_examples=20, deadline=None)
@given(threshold=st.sampled_from([0, 1, 7, 64, 300]), prompt=st.integers(2, 300))
def test_the_decoding_request_gets_a_token_in_every_step(threshold, prompt):
    spike = prefill_spike(threshold, long_prompt_len=prompt)
    assert len(spike.tokens) == 15
    assert spike.first_token_steps == (1 if threshold == 0 else -(-prompt // threshold))


def test_shared_prompts_are_computed_once_and_followers_pay_for_their_tails():
    # eight prompts of 64 shared tokens and one of their own, 4 tokens each: 8 x 68 without a cache, and with one 68 +
    # 7 x 4, all within the same first step
    workload = WorkloadOptions(num_requests=8, prompt_len="1", output_len="4", shared_prefix_tokens=64)
    total = {}
    for caching in (False, True):
        options = SimulationOptions(block_size=4, enable_prefix_caching=caching)
        total[caching] = simulate(options, make_workload(workload), ONE_SECOND_STEPS).metrics()["num_tokens"]
    assert total == {False: 544, True: 96}


def test_what_cannot_be_listed_is_refused():
    with pytest.raises(ConfigError, match="in order of arrival"):
        serve([(1.0, 5, 5), (0.0, 5, 5)])
    with pytest.raises(ConfigError, match="num_replicas: the steps of one engine are listed, got 2"):
        serve([(0.0, 5, 5)], num_replicas=2)


# --- curves ------------------------------------------------------------------------------------------------------

SMALL = WorkloadOptions(num_requests=40, rate=8, prompt_len="uniform:100,600", output_len="16")


def test_a_larger_budget_needs_no_more_steps_and_gives_longer_gaps():
    points = budget_knee((64, 128, 256, 512, 1024), SMALL).points
    steps = [point.metrics["num_steps"] for point in points]
    gaps = [point.metrics["p99_itl_ms"] for point in points]
    assert steps == sorted(steps, reverse=True)
    assert gaps[-1] > 2 * gaps[0]


def test_first_tokens_wait_once_the_load_is_past_what_the_engine_serves():
    result = hockey_stick((1, 4, 64), SMALL, max_num_seqs=(4,))
    handle, bend, blade = (point.metrics["p99_ttft_ms"] for point in result.along("rate"))
    assert handle <= bend < blade
    assert blade > 5 * handle


def test_a_cramped_pool_needs_more_steps_and_preempts():
    workload = WorkloadOptions(num_requests=24, prompt_len="100", output_len="60")
    points = pool_sizes((24, 60, 400), workload).points
    steps = [point.metrics["num_steps"] for point in points]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 2 * steps[-1]
    assert points[0].metrics["num_preemptions"] > 0 == points[-1].metrics["num_preemptions"]
    assert points[0].metrics["recomputed_share"] > 0 == points[-1].metrics["recomputed_share"]
