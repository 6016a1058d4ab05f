"""Claims about the line that is logged while requests run."""

from collections.abc import Callable
from typing import Any

import pytest

from mini_vllm.core.scheduler_output import SchedulerStats
from mini_vllm.engine.stats_logger import StatLogger
from mini_vllm.sampling_params import SamplingParams


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr("mini_vllm.engine.stats_logger.logger.info", lambda text, *args: said.append(text % args))
    return said


def test_one_line_an_interval_with_rates_over_that_interval(lines: list[str]) -> None:
    stat_logger = StatLogger(100.0, interval=10.0)
    stats = SchedulerStats(
        num_running_reqs=3, num_waiting_reqs=2, kv_cache_usage=0.256, prefix_cache_queries=40, prefix_cache_hits=10
    )
    stat_logger.record(stats, 50, 5, 105.0)
    assert lines == []
    stat_logger.record(stats, 100, 20, 110.0)
    stat_logger.record(stats, 100, 60, 119.9)
    stat_logger.record(stats, 100, 100, 120.0)
    assert lines == [
        f"Avg prompt throughput: {prompt} tokens/s, Avg generation throughput: {generation} tokens/s, "
        "Running: 3 reqs, Waiting: 2 reqs, GPU KV cache usage: 25.6%, Prefix cache hit rate: 25.0%"
        for prompt, generation in (("10.0", "2.0"), ("0.0", "8.0"))
    ]


@pytest.mark.parametrize("disable", [False, True])
def test_the_engine_logs_unless_told_not_to(make_engine: Callable[..., Any], lines: list[str], disable: bool) -> None:
    engine = make_engine(disable_log_stats=disable)
    if engine.stat_logger is not None:
        engine.stat_logger.interval = 0.0
    engine.add_request("r", [5, 6, 7], SamplingParams(max_tokens=2, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    assert (engine.stat_logger is None) is disable and len(lines) == (0 if disable else 2)
    processor = engine.output_processor
    assert (processor.num_prompt_tokens, processor.num_generation_tokens) == (3, 2)
