"""Claims about the line that is logged while requests run."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from mini_vllm.core.scheduler_output import SchedulerStats
from mini_vllm.engine.metrics.stats import IterationStats
from mini_vllm.engine.metrics.stats_logger import StatLogger, keep_ticking
from mini_vllm.sampling_params import SamplingParams

IDLE = SchedulerStats()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(
        "mini_vllm.engine.metrics.stats_logger.logger.info", lambda text, *args: said.append(text % args)
    )
    return said


def step(now: float, prompt: int = 0, generation: int = 0) -> IterationStats:
    return IterationStats(now, num_prompt_tokens=prompt, num_generation_tokens=generation)


def test_one_line_an_interval_with_rates_over_that_interval(lines: list[str]) -> None:
    stat_logger = StatLogger(100.0, interval=10.0)
    stats = SchedulerStats(
        num_running_reqs=3, num_waiting_reqs=2, kv_cache_usage=0.256, prefix_cache_queries=40, prefix_cache_hits=10
    )
    stat_logger.record(stats, step(100.0, 50, 5))
    stat_logger.record(stats, step(105.0, 50, 15))
    assert lines == []
    stat_logger.record(stats, step(110.0))
    stat_logger.record(stats, step(119.9, 0, 40))
    stat_logger.record(stats, step(120.0, 0, 40))
    assert lines == [
        f"Engine 000: Avg prompt throughput: {prompt} tokens/s, Avg generation throughput: {generation} tokens/s, "
        "Running: 3 reqs, Waiting: 2 reqs, GPU KV cache usage: 25.6%, Prefix cache hit rate: 25.0%"
        for prompt, generation in (("10.0", "2.0"), ("0.0", "8.0"))
    ]


def test_the_hit_rate_and_the_preemptions_are_those_since_the_last_line(lines: list[str]) -> None:
    stat_logger = StatLogger(0.0, interval=10.0)
    for now, queries, hits, preemptions in (
        (0.0, 100, 0, 0),
        (10.0, 100, 0, 3),
        (20.0, 200, 75, 3),
        (30.0, 200, 75, 4),
    ):
        stats = SchedulerStats(
            num_running_reqs=1, prefix_cache_queries=queries, prefix_cache_hits=hits, num_preemptions=preemptions
        )
        stat_logger.record(stats, step(now, generation=1))
    assert [line.partition("Prefix cache hit rate: ")[2] for line in lines] == ["0.0%", "75.0%", "75.0%"]
    assert ["Preemptions: 3" in lines[0], "Preemptions" in lines[1], "Preemptions: 1" in lines[2]] == [
        True,
        False,
        True,
    ]


def test_an_idle_engine_says_so_once_and_is_silent(lines: list[str]) -> None:
    stat_logger = StatLogger(0.0, interval=10.0)
    for now in (10.0, 20.0):
        stat_logger.tick(now)
    assert lines == [], "nothing ever ran"
    stat_logger.record(SchedulerStats(num_running_reqs=1), step(21.0, 8, 1))
    stat_logger.record(IDLE, step(22.0, 0, 1))
    for now in (31.0, 41.0, 51.0, 61.0):
        stat_logger.tick(now)
    assert len(lines) == 2 and "prompt throughput: 0.8 " in lines[0]
    assert "Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 0.0 tokens/s, Running: 0 reqs" in lines[1]


def test_a_pause_that_nobody_ticked_through_does_not_thin_the_rates(lines: list[str]) -> None:
    stat_logger = StatLogger(0.0, interval=10.0)
    stat_logger.record(SchedulerStats(num_running_reqs=1), step(0.0, 100, 0))
    stat_logger.record(IDLE, step(2.0, 0, 20))
    stat_logger.record(SchedulerStats(num_running_reqs=1), step(1000.0, 100, 1))
    stat_logger.record(IDLE, step(1010.0, 0, 19))
    rates = [line.split("tokens/s")[0].rpartition(": ")[2].strip() for line in lines]
    assert rates[0] == "8.3" and rates[-1] == "10.0"


def test_a_stuck_engine_is_reported_while_requests_wait(lines: list[str]) -> None:
    stat_logger = StatLogger(0.0, interval=10.0)
    stat_logger.record(SchedulerStats(num_waiting_reqs=4), step(0.0))
    for now in (10.0, 20.0, 30.0):
        stat_logger.tick(now)
    assert len(lines) == 3 and all("Waiting: 4 reqs" in line for line in lines)


def test_rejections_and_the_counters_of_a_restarted_engine_are_told(lines: list[str]) -> None:
    stat_logger = StatLogger(0.0, interval=10.0, engine_index=2)
    stat_logger.record(SchedulerStats(num_preemptions=5, prefix_cache_queries=50), step(0.0, 1))
    stat_logger.tick(10.0)
    stat_logger.record_rejection("max_num_queued_reqs")
    stat_logger.record(SchedulerStats(num_preemptions=2), step(11.0, 1))
    stat_logger.tick(20.0)
    assert lines[1].startswith("Engine 002: ") and "Preemptions: 2, Rejected: 1 reqs" in lines[1]


async def test_ticking_goes_on_until_cancelled(lines: list[str]) -> None:
    stat_logger = StatLogger(0.0, interval=0.001)
    stat_logger.record(SchedulerStats(num_running_reqs=1), step(0.0, 5))
    times = iter(range(1, 1_000_000))
    task = asyncio.create_task(keep_ticking(stat_logger, lambda: float(next(times))))
    while len(lines) < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("disable", [False, True])
def test_the_engine_logs_unless_told_not_to(make_engine: Callable[..., Any], lines: list[str], disable: bool) -> None:
    engine = make_engine(disable_log_stats=disable)
    if engine.stat_logger is not None:
        engine.stat_logger.interval = 0.0
    engine.add_request("r", [5, 6, 7], SamplingParams(max_tokens=2, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    assert (engine.stat_logger is None) is disable and bool(lines) is not disable
    processor = engine.output_processor
    assert (processor.num_prompt_tokens, processor.num_generation_tokens) == (3, 2)
