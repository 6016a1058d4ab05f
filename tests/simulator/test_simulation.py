"""What comes out of a simulation, checked against arithmetic by hand and against counts made another way."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.bench.metrics import RequestTimeline, request_metrics
from mini_vllm.exceptions import ConfigError, InvalidParameterError
from mini_vllm.simulator.cost import CostModel, StepLoad, TwoConstantCost
from mini_vllm.simulator.driver import Replica, simulate
from mini_vllm.simulator.executor import PredictingExecutor
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.results import SLO, LatencyHistogram, SimulationResult
from mini_vllm.simulator.workload import Workload, WorkloadOptions, make_workload
from tests.simulator.sim import Listed, UnitCost, own

COST = TwoConstantCost(0.01, 0.0001)


def options(**changes: Any) -> SimulationOptions:
    return SimulationOptions(**{"num_gpu_blocks": 400, "block_size": 8} | changes)


def run(workload: Workload | WorkloadOptions, cost: CostModel = COST, **changes: Any) -> SimulationResult:
    made = make_workload(workload) if isinstance(workload, WorkloadOptions) else workload
    return simulate(options(**changes), made, cost)


def columns(result: SimulationResult) -> dict[str, list[float]]:
    order = result.requests.index.argsort()
    return {name: column[order].tolist() for name, column in vars(result.requests).items()}


# -- times by hand -----------------------------------------------------------------------------------------------


def test_times_are_those_of_the_steps() -> None:
    """20 tokens, then one each: the second request comes in the middle of the second step and joins the third."""
    result = run(Listed([(0.0, ((1, 20),), 4), (0.013, ((2, 30),), 2)]))
    first = 0.01 + 20 * 0.0001
    second = first + 0.0101
    third = second + 0.01 + 31 * 0.0001
    fourth = third + 0.0102
    table = columns(result)
    assert table["first_token"] == pytest.approx([first, third])
    assert table["scheduled"] == pytest.approx([0.0, second])
    assert table["finish"] == pytest.approx([fourth, fourth])
    assert result.replicas[0].num_steps == 4
    assert result.duration == pytest.approx(fourth)
    assert result.itl.count == 3 + 1
    assert result.itl.mean == pytest.approx((second - first + third - second + 2 * (fourth - third)) / 4)


def test_idle_time_is_jumped_over() -> None:
    result = run(Listed([(0.0, ((1, 4),), 1), (1e6, ((2, 4),), 1)]))
    assert result.replicas[0].num_steps == 2
    assert columns(result)["first_token"] == pytest.approx([0.0104, 1e6 + 0.0104])
    assert result.metrics()["utilisation"] == pytest.approx(0.0208 / result.duration)


def test_an_arrival_at_the_end_of_a_step_is_in_time_for_the_next() -> None:
    result = run(Listed([(0.0, ((1, 4),), 3), (1.0, ((2, 4),), 1)]), UnitCost())
    assert columns(result)["first_token"] == [1.0, 2.0]


def test_requests_that_arrive_together_share_their_first_step() -> None:
    result = run(Listed([(5.0, runs, 1) for runs in own(4, 4, 4)]), UnitCost())
    assert result.replicas[0].num_steps == 1


# -- no wall clock -----------------------------------------------------------------------------------------------


def test_no_wall_clock_reaches_simulated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run while every clock of the machine jumps about."""
    workload = WorkloadOptions(num_requests=60, rate=30, prompt_len="uniform:1,100", output_len="uniform:1,20")
    before = columns(run(workload, num_gpu_blocks=60))
    jumps = itertools.count(start=1e9, step=12345.678)
    for name in ("time", "monotonic", "perf_counter", "process_time"):
        monkeypatch.setattr(time, name, lambda: next(jumps))
    for name in ("time_ns", "monotonic_ns", "perf_counter_ns"):
        monkeypatch.setattr(time, name, lambda: int(next(jumps) * 1e9))
    assert columns(run(workload, num_gpu_blocks=60)) == before


def test_a_slow_cost_model_changes_nothing() -> None:
    class Slow(TwoConstantCost):
        def step_seconds(self, load: StepLoad) -> float:
            time.sleep(0.002)
            return super().step_seconds(load)

    workload = WorkloadOptions(num_requests=10, rate=30, prompt_len="20", output_len="5")
    assert columns(run(workload, Slow(0.01, 0.0001))) == columns(run(workload))


# -- counts made another way -------------------------------------------------------------------------------------

mixes = st.builds(
    WorkloadOptions,
    num_requests=st.integers(1, 25),
    rate=st.sampled_from([1.0, 20.0, 300.0]),
    prompt_len=st.sampled_from(["1", "8", "uniform:1,90", "lognormal:30,1.0,90"]),
    output_len=st.sampled_from(["1", "2", "uniform:1,60"]),
    turns=st.sampled_from(["1", "uniform:1,3"]),
    shared_prefix_tokens=st.sampled_from([0, 5, 24]),
    seed=st.integers(0, 10),
)


class Watch:
    """Every token of every request with its time, from the engine's own outputs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.times: dict[str, list[float]] = {}
        take = Replica.take_outputs

        def watched(replica: Replica) -> Any:
            for news in replica.outputs:
                self.times.setdefault(news.request_id, []).extend([replica.clock.now] * len(news.new_token_ids))
            return take(replica)

        patch.setattr(Replica, "take_outputs", watched)


@given(
    workload=mixes,
    num_gpu_blocks=st.sampled_from([70, 90, 400]),
    max_num_seqs=st.sampled_from([1, 4, 64]),
    budget=st.sampled_from([5, 64, 2048]),
)
def test_figures_are_those_of_the_benchmark_over_the_same_tokens(
    workload: WorkloadOptions, num_gpu_blocks: int, max_num_seqs: int, budget: int
) -> None:
    """Latencies, inter-token ones included, and the recompute tax, against every single token's time."""
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        result = run(workload, num_gpu_blocks=num_gpu_blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    table, timelines = columns(result), []
    for place, index in enumerate(table["index"]):
        times = watch.times[str(int(index))]
        lengths = int(table["num_prompt_tokens"][place]), table["arrival"][place]
        timelines.append(RequestTimeline(str(index), *lengths, times, [1] * len(times), "length"))
    expected, got = request_metrics(timelines, result.duration), result.metrics()
    for name, value in expected.items():
        tolerance = 0.006 if "_itl_" in name and not name.startswith(("mean", "std")) else 1e-9
        least = 1e-4 if name == "std_itl_ms" else 1e-9  # of a sum of squares
        assert got[name] == (None if value is None else pytest.approx(value, rel=tolerance, abs=least)), name
    _check_counters(result)


def _check_counters(result: SimulationResult) -> None:
    table, replica = result.requests, result.replicas[0]
    distinct = (table.num_prompt_tokens + table.num_output_tokens - 1 - table.num_cached_tokens).sum()
    assert replica.num_tokens - distinct == replica.num_recomputed_tokens
    assert replica.num_preemptions == table.num_preemptions.sum()
    line = replica.timeline
    assert line.steps.sum() == replica.num_steps
    assert line.prefill_tokens.sum() + line.decode_tokens.sum() == replica.num_tokens
    assert line.preemptions.sum() == replica.num_preemptions
    assert line.seconds.sum() == pytest.approx(replica.busy_seconds)


def test_preemptions_are_taxed() -> None:
    workload = WorkloadOptions(num_requests=30, prompt_len="uniform:1,60", output_len="uniform:20,60", seed=3)
    result = run(workload, num_gpu_blocks=24, enable_prefix_caching=False)
    metrics = result.metrics()
    assert metrics["num_preemptions"] > 5
    assert metrics["num_recomputed_tokens"] > 100
    assert 0 < metrics["recomputed_share"] < 1
    _check_counters(result)


def test_hits_of_requests_and_of_tokens_are_kept_apart() -> None:
    """Two prompts of 40 begin with the same 24: one of two requests hits, 24 of 80 tokens."""
    rows = [(0.0, ((9000, 24), (1, 16)), 1), (5.0, ((9000, 24), (2, 16)), 1)]
    metrics = run(Listed(rows)).metrics()
    assert metrics["request_prefix_hit_rate"] == 0.5
    assert metrics["token_prefix_hit_rate"] == 24 / 80


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    result = run(Listed([(0.0, ((1, 20),), 4), (0.0, ((2, 20),), 1), (0.001, ((3, 500),), 1)]))
    ttft = result.requests.ttft * 1e3
    order = result.requests.index.argsort()
    assert ttft[order].tolist() == pytest.approx([14.0, 14.0, 14.0 - 1.0 + 60.1])
    assert result.num_good(SLO(ttft_ms=15)) == 2
    assert result.num_good(SLO(ttft_ms=100)) == 3
    assert result.num_good(SLO(ttft_ms=100, tpot_ms=11)) == 2  # a single token keeps any TPOT
    assert result.num_good(SLO(e2el_ms=14.5)) == 1
    metrics = result.metrics(SLO(ttft_ms=15))
    assert metrics["request_goodput"] == pytest.approx(2 / result.duration)
    assert metrics["slo_attainment"] == pytest.approx(2 / 3)


# -- the shape of the records ------------------------------------------------------------------------------------


def test_a_timeline_stays_small_and_keeps_its_sums() -> None:
    workload = WorkloadOptions(num_requests=200, rate=20, prompt_len="16", output_len="uniform:1,40")
    small, large = run(workload, timeline_points=7), run(workload, timeline_points=100_000)
    assert len(small.timeline) <= 8 < len(large.timeline) == large.replicas[0].num_steps
    for name in ("seconds", "steps", "prefill_tokens", "decode_tokens"):
        assert getattr(small.timeline, name).sum() == pytest.approx(getattr(large.timeline, name).sum())
    mean = [(r.timeline.running * r.timeline.seconds).sum() for r in (small, large)]
    assert mean[0] == pytest.approx(mean[1])
    assert small.timeline.max_kv_cache_usage.max() == large.timeline.max_kv_cache_usage.max()


@given(st.lists(st.tuples(st.floats(1e-6, 100.0), st.integers(1, 50)), min_size=1, max_size=40))
def test_histogram_percentiles_are_half_a_percent_exact(entries: list[tuple[float, int]]) -> None:
    histogram = LatencyHistogram()
    for seconds, count in entries:
        histogram.add(seconds, count)
    values = np.sort(np.repeat([seconds for seconds, _ in entries], [count for _, count in entries]))
    assert histogram.mean == pytest.approx(values.mean())
    for rank in (0, 50, 90, 99, 100):
        assert histogram.percentile(rank) == pytest.approx(float(np.percentile(values, rank)), rel=0.0051)


def test_nothing_is_kept_of_requests_that_have_ended() -> None:
    made: list[Replica] = []
    init = Replica.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replica, "__init__", lambda self, *args: (init(self, *args), made.append(self))[0])
        run(WorkloadOptions(num_requests=40, prompt_len="30", output_len="uniform:1,60"), num_gpu_blocks=30)
    replica = made[0]
    assert not replica.live and not replica.executor.tokens and replica.load == 0
    assert not replica.executor._in_prompt and not replica.executor._left_when_lost
    assert not replica.core.scheduler.requests and len(replica.executor.gaps._missed) == 0


def test_step_records_tell_simulated_time() -> None:
    result = run(Listed([(2.0, ((1, 20),), 4)]), step_records=3)
    records = result.replicas[0].step_records
    assert [record.step_id for record in records] == [2, 3, 4]
    assert records[0].start_time == pytest.approx(2.012)
    assert records[0].duration == pytest.approx(0.0101)


# -- policies and replicas ---------------------------------------------------------------------------------------


def spread(result: SimulationResult) -> list[int]:
    return [replica.num_requests for replica in result.replicas]


def test_round_robin_takes_turns() -> None:
    result = run(WorkloadOptions(num_requests=31, rate=10, prompt_len="16", output_len="8"), num_replicas=3)
    assert spread(result) == [11, 10, 10]
    assert len(result.requests) == 31


def test_the_least_loaded_replica_gets_the_next() -> None:
    rows = [(0.0, ((1, 900),), 500), *((0.1 + i / 10, runs, 1) for i, runs in enumerate(own(*[10] * 6, first=10)))]
    assert spread(run(Listed(rows), num_replicas=2, routing="least-loaded")) == [1, 6]
    assert spread(run(Listed(rows), num_replicas=2, routing="round-robin")) == [4, 3]


def test_a_router_sees_no_future() -> None:
    """While the first step is under way its request is a load, though the simulation has computed its end."""
    rows = [(0.0, ((1, 30),), 1), (0.001, ((2, 20),), 1), (0.002, ((3, 20),), 1), (9.0, ((4, 20),), 1)]
    result = run(Listed(rows), num_replicas=2, routing="least-loaded")
    assert columns(result)["replica"] == [0, 1, 1, 0]


def test_prefix_aware_routing_finds_more_and_falls_back_to_load() -> None:
    workload = WorkloadOptions(
        num_requests=120, rate=8, prompt_len="16", output_len="8", shared_prefix_tokens=160, num_prefix_groups=6
    )
    hits = {}
    for routing in ("round-robin", "least-loaded", "prefix-aware"):
        result = run(workload, num_replicas=3, routing=routing, num_gpu_blocks=80)
        hits[routing] = result.metrics()["token_prefix_hit_rate"]
        assert min(spread(result)) > 0
    assert hits["prefix-aware"] > max(hits["round-robin"], hits["least-loaded"]) + 0.05
    one_group = WorkloadOptions(num_requests=60, prompt_len="16", output_len="30", shared_prefix_tokens=160)
    assert min(spread(run(one_group, num_replicas=3, routing="prefix-aware"))) > 0  # all at once: load decides


def test_fair_scheduling_reaches_the_tenants() -> None:
    from mini_vllm.simulator.workload import TenantMix

    mix = (TenantMix(name="heavy", share=9.0), TenantMix(name="light"))
    workload = WorkloadOptions(num_requests=120, prompt_len="40", output_len="20", tenants=mix)
    worst = {}
    for policy in ("fcfs", "fair"):
        result = run(workload, scheduling_policy=policy, max_num_seqs=4)
        worst[policy] = result.by_tenant()["light"]["mean_ttft_ms"]
    assert worst["fair"] < 0.5 * worst["fcfs"]


def test_several_samples_of_a_prompt_share_it() -> None:
    from mini_vllm.simulator.workload import SimRequest

    class Samples(Listed):
        def request(self, index: int) -> SimRequest:
            request = super().request(index)
            request.num_samples = 3
            return request

    result = run(Samples([(0.0, ((1, 40),), 5), (0.0, ((2, 40),), 5)]))
    assert result.requests.num_output_tokens.tolist() == [15, 15]
    assert result.replicas[0].num_prefill_tokens == 80
    assert result.replicas[0].num_tokens == 80 + 2 * 3 * 4


# -- what cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 64}, r"max_model_len: request 1 has 60 \+ 5 = 65 tokens .* but the context is 64"),
        ({"num_gpu_blocks": 8}, r"request 1 has 60 \+ 5 = 65 tokens .* needs 8 KV .* 8 tokens, .* whole pool has 7"),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_the_arithmetic(changes: dict[str, Any], message: str) -> None:
    prompts: Sequence[tuple[float, Any, int]] = [(0.0, ((1, 30),), 5), (0.0, ((2, 60),), 5)]
    with pytest.raises(InvalidParameterError, match=message):
        run(Listed(prompts), **changes)


def test_a_request_that_just_fits_is_served() -> None:
    """60 + 5 tokens: the last one is never written, so 64 slots do."""
    assert len(run(Listed([(0.0, ((1, 60),), 5)]), num_gpu_blocks=9, max_model_len=65).requests) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_replicas": 0}, "num_replicas: must be at least 1"),
        ({"num_gpu_blocks": 1}, "num_gpu_blocks: must be at least 2"),
        ({"routing": "random"}, "routing: must be one of round-robin"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"num_replicas": 2, "routing": "prefix-aware", "enable_prefix_caching": False}, "routing: 'prefix-aware'"),
    ],
)
def test_engine_arguments_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(WorkloadOptions(num_requests=1), **changes)


def test_an_empty_workload_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to simulate"):
        run(Listed([]))


def test_the_simulated_device_has_no_worker() -> None:
    from mini_vllm.simulator.executor import LogicalClock

    with pytest.raises(NotImplementedError, match="'profile'"):
        PredictingExecutor(options(), COST, LogicalClock()).collective_rpc("profile")


# -- around the steps --------------------------------------------------------------------------------------------


def test_time_outside_the_engine_comes_on_top_of_each_request() -> None:
    """A lone request waits as much longer for its first token, and its tokens come as far apart as before."""
    workload = WorkloadOptions(num_requests=1, rate=1, prompt_len="20", output_len="5")
    plain, far = (run(workload, request_latency_ms=latency).metrics() for latency in (0.0, 250.0))
    assert far["median_ttft_ms"] == pytest.approx(plain["median_ttft_ms"] + 250)
    assert far["median_e2el_ms"] == pytest.approx(plain["median_e2el_ms"] + 250)
    assert far["median_tpot_ms"] == pytest.approx(plain["median_tpot_ms"])
    with pytest.raises(ConfigError, match="request_latency_ms: must be at least 0, got -1"):
        SimulationOptions(request_latency_ms=-1.0)


def test_what_adding_requests_takes_delays_the_next_step() -> None:
    """Two arrive at once: half a second each before the first step, of ten tokens' prompts a millisecond more."""

    class Slow(TwoConstantCost):
        def add_seconds(self, num_prompt_tokens: int) -> float:
            return 0.5 + 1e-4 * num_prompt_tokens

    workload = WorkloadOptions(num_requests=2, arrivals="at-once", prompt_len="10", output_len="3")
    plain, slow = (run(workload, kind(0.01, 0.0)).metrics() for kind in (TwoConstantCost, Slow))
    assert slow["median_ttft_ms"] == pytest.approx(plain["median_ttft_ms"] + 1002)
    assert slow["median_tpot_ms"] == pytest.approx(plain["median_tpot_ms"])
