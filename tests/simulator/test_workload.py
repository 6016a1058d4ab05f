"""Workloads: the load that was asked for, tokens shared on purpose alone, and nothing that depends on luck."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.core.block_pool import hash_block_tokens
from mini_vllm.engine.request_trace import RequestTraceRecorder
from mini_vllm.exceptions import ConfigError
from mini_vllm.request import Request, Tenant
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.simulator.arrivals import arrival_times
from mini_vllm.simulator.cost import TwoConstantCost
from mini_vllm.simulator.driver import simulate
from mini_vllm.simulator.lengths import Observed, parse_lengths
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.replay import TraceWorkload
from mini_vllm.simulator.workload import SimRequest, TenantMix, Workload, WorkloadOptions, make_workload

COST = TwoConstantCost(0.01, 0.0)


def all_requests(workload: Workload, service: float = 0.5) -> Iterator[tuple[SimRequest, float]]:
    """(request, when it arrived) where each is answered after `service` seconds."""
    source, busy = workload.start(), list[tuple[float, int, SimRequest]]()
    while True:
        busy.sort(key=lambda entry: entry[:2])
        if busy and busy[0][0] < source.next_time():
            finish, _, request = busy.pop(0)
            source.finished(request, finish)
        elif math.isinf(source.next_time()):
            return
        else:
            request = source.pop()
            busy.append((request.arrival + service, request.index, request))
            yield request, request.arrival


def made(**options: Any) -> list[SimRequest]:
    return [request for request, _ in all_requests(make_workload(WorkloadOptions(**options)))]


# -- arrivals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "burstiness", "variation"), [("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5)]
)
def test_gaps_vary_as_their_distribution_says(kind: str, burstiness: float, variation: float) -> None:
    times = arrival_times(kind, 20_001, 4.0, burstiness, np.random.default_rng(0))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.25)  # exactly the load on offer
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)
    assert times[0] == 0


def test_a_fixed_rate_is_a_metronome() -> None:
    assert arrival_times("fixed", 4, 2.0, 1.0, np.random.default_rng(0)).tolist() == [0, 0.5, 1.0, 1.5]


def test_another_rate_stretches_the_same_pattern() -> None:
    slow, fast = (made(num_requests=50, rate=rate, prompt_len="uniform:1,99") for rate in (1.0, 10.0))
    assert [r.arrival for r in slow] == pytest.approx([10 * r.arrival for r in fast])
    assert [r.num_prompt_tokens for r in slow] == [r.num_prompt_tokens for r in fast]


def test_a_closed_system_never_has_more_requests_than_users() -> None:
    workload = make_workload(WorkloadOptions(num_requests=200, users=5, prompt_len="10", output_len="uniform:1,30"))
    finishes, arrivals = [], []
    for request, arrival in all_requests(workload, service=1.0):
        arrivals.append(arrival)
        finishes.append(request.arrival + 1.0)
        assert sum(finish > arrival for finish in finishes) <= 5
    assert len(arrivals) == 200
    assert sorted(arrivals)[:6] == [0, 0, 0, 0, 0, 1.0]


def test_users_think() -> None:
    workload = make_workload(WorkloadOptions(num_requests=4001, users=1, think_time=3.0, prompt_len="1"))
    arrivals = [arrival for _, arrival in all_requests(workload, service=0.0)]
    assert np.diff(arrivals).mean() == pytest.approx(3.0, rel=0.05)
    assert np.diff(arrivals).std() == pytest.approx(3.0, rel=0.1)


# -- lengths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mean", "least", "most"),
    [
        ("77", 77, 77, 77),
        ("uniform:200,4000", 2100, 200, 4000),
        ("lognormal:500,1.0", 500, 1, math.inf),
        ("lognormal:500,0", 500, 500, 500),
        ("lognormal:100,1.5,300", None, 1, 300),
        ("zipf:0,9", 5, 1, 9),
        ("zipf:2,1000", None, 1, 1000),
    ],
)
def test_lengths_are_those_of_their_distribution(text: str, mean: float | None, least: int, most: float) -> None:
    values = parse_lengths("prompt_len", text).draw(np.random.default_rng(1), 100_000)
    assert values.dtype == np.int64 and values.min() >= least and values.max() <= most
    if mean is not None:
        assert values.mean() == pytest.approx(mean, rel=0.02)


def test_zipf_halves_as_its_exponent_says() -> None:
    values = parse_lengths("prompt_len", "zipf:2,1000").draw(np.random.default_rng(1), 200_000)
    assert (values == 1).mean() / (values == 2).mean() == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(
    "text",
    ["0", "-3", "1.5", "many", "uniform:5", "uniform:9,3", "lognormal:0.5,1", "lognormal:5,-1", "zipf:-1,5", "zipf:1",
     "zipf:1,99999999", "normal:3,4", "uniform:1,nan", "lognormal:inf,1"],
)  # fmt: skip
def test_lengths_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="prompt_len: "):
        parse_lengths("prompt_len", text)


def test_a_limit_that_hardly_any_value_keeps_is_refused() -> None:
    with pytest.raises(ConfigError, match="hardly any"):
        parse_lengths("prompt_len", "lognormal:100000,0.01,5").draw(np.random.default_rng(0), 10)


# -- what is shared ----------------------------------------------------------------------------------------------


def block_hashes(token_ids: list[int], size: int = 4) -> list[bytes]:
    hashes: list[bytes] = []
    for first in range(0, len(token_ids) - size + 1, size):
        hashes.append(hash_block_tokens(hashes[-1] if hashes else None, token_ids[first : first + size]))
    return hashes


@given(
    prompt=st.sampled_from(["4", "uniform:1,40"]),
    turns=st.sampled_from(["1", "uniform:1,4"]),
    users=st.sampled_from([None, 3]),
    seed=st.integers(0, 5),
)
def test_requests_share_blocks_on_purpose_alone(prompt: str, turns: str, users: int | None, seed: int) -> None:
    """Of what is not a prefix or a chat's history, no block is that of another request: prompt or answer."""
    seen: dict[bytes, object] = {}
    for request in made(num_requests=30, prompt_len=prompt, turns=turns, users=users, seed=seed, output_len="9"):
        text = request.prompt_token_ids() + [request.token_id] * request.output_len
        for block in block_hashes(text):
            assert seen.setdefault(block, request.conversation) is request.conversation


def test_a_group_shares_its_prefix_and_nothing_else() -> None:
    requests = made(num_requests=200, prompt_len="16", shared_prefix_tokens=20, num_prefix_groups=3)
    prompts = [request.prompt_token_ids() for request in requests]
    assert all(len(prompt) == 36 for prompt in prompts)
    assert len({tuple(prompt[:20]) for prompt in prompts}) == 3
    assert len({prompt[20] for prompt in prompts}) == 200


def test_popular_groups_are_as_popular_as_asked() -> None:
    requests = made(num_requests=5000, shared_prefix_tokens=4, num_prefix_groups=4, prefix_skew=1.0, prompt_len="4")
    firsts = [request.runs[0][0] for request in requests]
    counts = sorted((firsts.count(first) for first in set(firsts)), reverse=True)
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.15)


def test_a_turn_carries_the_history_as_its_prompt() -> None:
    """And comes after the answer it continues."""
    last: dict[int, SimRequest] = {}
    workload = make_workload(
        WorkloadOptions(num_requests=60, rate=2, turns="4", think_time=1.0, prompt_len="uniform:1,9", output_len="7")
    )
    count = 0
    for request, arrival in all_requests(workload):
        before = last.get(id(request.conversation))
        if before is not None:
            history = before.prompt_token_ids() + [before.token_id] * before.output_len
            assert request.prompt_token_ids()[: len(history)] == history
            assert arrival > before.arrival + 0.5
            count += 1
        last[id(request.conversation)] = request
    assert count == 45


@pytest.mark.parametrize("users", [None, 1, 7])
@pytest.mark.parametrize("turns", ["1", "5", "uniform:1,9"])
@pytest.mark.parametrize("num_requests", [1, 23])
def test_exactly_the_requests_asked_for_come(users: int | None, turns: str, num_requests: int) -> None:
    requests = made(num_requests=num_requests, users=users, turns=turns, prompt_len="1", output_len="1")
    assert sorted(request.index for request in requests) == list(range(num_requests))


def test_histories_are_found_in_the_prefix_cache() -> None:
    """10 + 7 tokens after the first turn, of which the last is not written: 16 in blocks of 4 are found."""
    options = SimulationOptions(num_gpu_blocks=100, block_size=4)
    workload = make_workload(WorkloadOptions(num_requests=2, turns="2", prompt_len="10", output_len="7"))
    result = simulate(options, workload, COST)
    assert result.requests.num_prompt_tokens.tolist() == [10, 27]
    assert result.requests.num_cached_tokens.tolist() == [0, 16]


# -- tenants, seeds ----------------------------------------------------------------------------------------------


def test_tenants_have_their_shares_and_lengths() -> None:
    mix = (TenantMix(name="a", share=3.0, users=4), TenantMix(name="b", prompt_len="5", output_len="2", priority=7))
    requests = made(num_requests=4000, tenants=mix, prompt_len="50", output_len="20")
    of_b = [request for request in requests if request.tenant == "b"]
    assert len(of_b) == pytest.approx(1000, rel=0.1)
    assert {(r.num_prompt_tokens, r.output_len, r.priority, r.user) for r in of_b} == {(5, 2, 7, "")}
    assert {r.user for r in requests if r.tenant == "a"} == {"user0", "user1", "user2", "user3"}


def test_the_seed_decides_everything() -> None:
    def rows(seed: int) -> list[tuple[Any, ...]]:
        options = {"rate": 5.0, "prompt_len": "uniform:1,500", "output_len": "zipf:1,99", "turns": "uniform:1,3"}
        requests = made(num_requests=40, seed=seed, **options)
        return [(r.index, r.arrival, r.runs, r.output_len) for r in requests]

    assert rows(1) == rows(1) != rows(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": -1.0}, "rate: must be above 0"),
        ({"rate": 0.0}, "rate: must be above 0"),
        ({"rate": math.nan}, "rate: must be above 0"),
        ({"arrivals": "poisson"}, "rate: must be above 0"),
        ({"arrivals": "weekly"}, "arrivals: must be one of"),
        ({"rate": 1.0, "users": 3}, "rate: has no meaning"),
        ({"rate": 1.0, "burstiness": 0.0}, "burstiness: must be above 0"),
        ({"burstiness": 2.0}, "burstiness: 2 only has a meaning"),
        ({"users": 0}, "users: must be at least 1"),
        ({"num_requests": 0}, "num_requests: must be at least 1"),
        ({"think_time": -1.0, "users": 1}, "think_time: must be at least 0"),
        ({"think_time": 1.0}, "think_time: has no meaning"),
        ({"shared_prefix_tokens": -1}, "shared_prefix_tokens: must be at least 0"),
        ({"num_prefix_groups": 3}, "have no meaning without shared_prefix_tokens"),
        ({"tenants": (TenantMix(name="a"), TenantMix(name="a"))}, "a name is there twice"),
        ({"trace_speed": 2.0}, "trace_speed: has no meaning without"),
        ({"trace": "x.jsonl", "rate": 2.0}, "rate: has no meaning when a trace"),
        ({"seed": -1}, "seed: must be"),
    ],
)
def test_workloads_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkloadOptions(**options)


# -- traces ------------------------------------------------------------------------------------------------------


def write_trace(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(timestamp: float, hash_ids: list[int], length: int, output: int = 3, **more: Any) -> dict[str, Any]:
    fields = {"timestamp": timestamp, "input_length": length, "output_length": output, "hash_ids": hash_ids}
    return fields | {"block_size": 8} | more


def test_a_trace_is_replayed_with_its_times_lengths_and_sharing(tmp_path: Path) -> None:
    path = write_trace(
        tmp_path / "t.jsonl",
        row(5000, [0, 1, 2], 20), row(6000, [0, 1, 3], 24, output=5, tenant=2), row(6500, [0, 4], 9, n=2, output=8),
    )  # fmt: skip
    workload = TraceWorkload.from_file(path, speed=2.0)
    first, second, third = (request for request, _ in all_requests(workload))
    assert [r.arrival for r in (first, second, third)] == [0.0, 0.5, 0.75]
    assert [r.num_prompt_tokens for r in (first, second, third)] == [20, 24, 9]
    assert (second.output_len, second.tenant, third.num_samples, third.output_len) == (5, "tenant2", 2, 4)
    prompts = [r.prompt_token_ids() for r in (first, second, third)]
    assert prompts[0][:16] == prompts[1][:16] and prompts[0][16] != prompts[1][16]
    assert prompts[0][:8] == prompts[2][:8] and prompts[0][8] != prompts[2][8]
    result = simulate(SimulationOptions(num_gpu_blocks=50, block_size=8), workload, COST)
    assert result.requests.num_cached_tokens[np.argsort(result.requests.index)].tolist() == [0, 16, 8]
    assert result.tenants == ("tenant0", "tenant2")


def test_what_our_server_records_can_be_replayed(tmp_path: Path) -> None:
    """The recorder writes what requests shared; the replay shares it again."""
    path = tmp_path / "recorded.jsonl"
    recorder = RequestTraceRecorder(path, block_size=8, clock=lambda: 100.0)
    shared = list(range(24))
    for index in range(3):
        params = SamplingParams(max_tokens=4)
        prompt = [*shared, *([500 + index] * (index + 1))]
        request = Request(str(index), prompt, params, arrival_time=100.0 + index, tenant=Tenant("key", "me"))
        recorder.record_arrival(request)
        recorder.record_finish(str(index), 4, "length")
    recorder.close()
    workload = make_workload(WorkloadOptions(trace=str(path)))
    requests = [request for request, _ in all_requests(workload)]
    assert [r.arrival for r in requests] == [0.0, 1.0, 2.0]
    assert [r.num_prompt_tokens for r in requests] == [25, 26, 27]
    result = simulate(SimulationOptions(num_gpu_blocks=50, block_size=8), workload, COST)
    assert result.requests.num_cached_tokens.tolist() == [0, 24, 24]


def test_a_limit_takes_the_first_requests_of_a_trace(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", *(row(1000 * i, [i], 8) for i in range(5)))
    assert make_workload(WorkloadOptions(trace=path, num_requests=2)).num_requests == 2


def test_a_request_aborted_before_its_first_token_is_given_one(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", row(0, [0], 8, output=0, finish_reason="abort"))
    assert [r.output_len for r, _ in all_requests(TraceWorkload.from_file(path))] == [1]


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl")
    with pytest.raises(ConfigError, match="has no requests"):
        make_workload(WorkloadOptions(trace=path))
    with pytest.raises(ConfigError, match="prompt_len: the trace .* has no requests"):
        parse_lengths("prompt_len", f"trace:{path}")


def test_lengths_from_one_trace_stay_in_pairs(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", *(row(i, [i], 8 - i, output=8 - i) for i in range(5)))
    assert isinstance(parse_lengths("prompt_len", f"trace:{path}"), Observed)
    requests = made(num_requests=50, prompt_len=f"trace:{path}", output_len=f"trace:{path}")
    assert {r.num_prompt_tokens for r in requests} == {4, 5, 6, 7, 8}
    assert all(r.num_prompt_tokens == r.output_len for r in requests)
