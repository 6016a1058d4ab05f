"""Claims about what is counted: each prompt, token, step and end once, with the times of the core's clock."""

from collections.abc import Callable
from typing import Any

import pytest

from mini_vllm.core.scheduler_output import EngineCoreOutput, ModelRunnerOutput, SchedulerStats
from mini_vllm.engine.metrics.prometheus import PrometheusStatLogger, new_registry
from mini_vllm.engine.metrics.stats import IterationStats, record_all
from mini_vllm.engine.output_processor import OutputProcessor
from mini_vllm.outputs import RequestOutput
from mini_vllm.request import Request
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams
from tests.engine.metrics_table import Scrape
from tests.text.test_detokenizer import BYTE_LEVEL


class Metered:
    """An `LLMEngine` with metrics, which are read after every step and must never fall."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.registry = new_registry()
        self.outputs: dict[str, RequestOutput] = {}
        engine.stat_logger = PrometheusStatLogger("tiny", engine.max_model_len, self.registry)

    def add(self, request_id: str, prompt: list[int], **params: Any) -> None:
        defaults = {"ignore_eos": True, "temperature": 0.0, "output_kind": RequestOutputKind.FINAL_ONLY}
        self.engine.add_request(request_id, prompt, SamplingParams(**defaults | params))

    def step(self) -> None:
        before = self.scrape()
        for output in self.engine.step():
            self.outputs[output.request_id] = output
        assert before.falls(self.scrape()) == []

    def run(self) -> Scrape:
        while self.engine.has_unfinished_requests():
            self.step()
        self.step()  # the core forgets those that the shell has ended
        return self.scrape()

    def scrape(self) -> Scrape:
        return Scrape(self.registry)

    def usage(self) -> tuple[int, int]:
        """What callers were told: tokens of prompts and of completions."""
        outputs = self.outputs.values()
        completions = [len(c.token_ids) for output in outputs for c in output.outputs]
        return sum(len(output.prompt_token_ids) for output in outputs), sum(completions)


@pytest.fixture
def metered(make_engine: Callable[..., Any]) -> Callable[..., Metered]:
    return lambda **kwargs: Metered(make_engine(**kwargs))


def reasons(scrape: Scrape) -> dict[str, int]:
    samples = scrape.families["vllm:request_success"].samples
    return {sample.labels["finished_reason"]: int(sample.value) for sample in samples if sample.value}


# -- an engine --------------------------------------------------------------------------------------------------------


def test_every_counter_of_a_plain_run_is_exact(metered: Callable[..., Metered]) -> None:
    run = metered()
    shared = list(range(10, 50))
    run.add("first", shared, max_tokens=4)
    run.run()
    run.add("again", shared, max_tokens=3)
    run.add("other", list(range(60, 90)), max_tokens=1)
    scrape = run.run()
    assert run.outputs["again"].num_cached_tokens == 32, "two of the three blocks of 16 are full"
    assert scrape["vllm:prompt_tokens_total"] == 110 and scrape["vllm:generation_tokens_total"] == 8
    assert run.usage() == (110, 8)
    assert (scrape["vllm:prefix_cache_queries_total"], scrape["vllm:prefix_cache_hits_total"]) == (110, 32)
    assert scrape["vllm:prompt_tokens_cached_total"] == 32
    by_source = {s: scrape.value("vllm:prompt_tokens_by_source_total", source=s) for s in ("local_compute", "local_cache_hit")}  # fmt: skip  # noqa: E501
    assert by_source == {"local_compute": 78, "local_cache_hit": 32}
    assert scrape.value("vllm:prompt_tokens_cached_by_source_total", source="device") == 32
    assert reasons(scrape) == {"length": 3} and scrape["vllm:num_preemptions_total"] == 0
    assert scrape.histogram("vllm:request_prompt_tokens") == (3, 110)
    assert scrape.histogram("vllm:request_generation_tokens") == (3, 8)
    assert scrape.histogram("vllm:request_prefill_kv_computed_tokens") == (3, 78)
    assert scrape.histogram("vllm:request_params_max_tokens") == (3, 8)
    assert scrape.histogram("vllm:request_params_n") == (3, 3)
    assert scrape.histogram("vllm:request_max_num_generation_tokens") == (3, 8)
    assert scrape.histogram("vllm:request_num_preemptions") == (3, 0)
    assert scrape.value("vllm:request_generation_tokens_bucket", le="2.0") == 1
    computed = 78 + (8 - 3)  # the prompts, and one token for each step after a request's first
    assert scrape.histogram("vllm:iteration_tokens_total") == (4 + 3, computed)
    assert (scrape["vllm:num_requests_running"], scrape["vllm:kv_cache_usage_perc"]) == (0, 0)


def test_latencies_are_observed_once_a_token_and_once_a_request(metered: Callable[..., Metered]) -> None:
    run = metered()
    for i, max_tokens in enumerate((1, 2, 6)):
        run.add(str(i), [5, 6, 7 + i], max_tokens=max_tokens)
    scrape = run.run()
    assert scrape["vllm:time_to_first_token_seconds_count"] == 3
    assert scrape["vllm:inter_token_latency_seconds_count"] == (2 - 1) + (6 - 1)
    assert scrape["vllm:request_time_per_output_token_seconds_count"] == 2, "a lone token has none"
    parts = {
        name: scrape.histogram(f"vllm:{name}_seconds")
        for name in ("e2e_request_latency", "request_queue_time", "request_inference_time")
    }
    assert {count for count, _ in parts.values()} == {3}
    prefill, decode = (scrape.histogram(f"vllm:request_{part}_time_seconds")[1] for part in ("prefill", "decode"))
    total = {name: total for name, (_, total) in parts.items()}
    assert prefill + decode == pytest.approx(total["request_inference_time"])
    assert total["request_queue_time"] + total["request_inference_time"] <= total["e2e_request_latency"]
    assert scrape["vllm:inter_token_latency_seconds_sum"] == pytest.approx(decode)


def test_samples_of_a_prompt_are_counted_each_and_their_prompt_once(metered: Callable[..., Metered]) -> None:
    run = metered()
    run.add("r", list(range(10, 27)), n=3, temperature=1.0, seed=1, max_tokens=5)
    scrape = run.run()
    assert run.usage() == (scrape["vllm:prompt_tokens_total"], scrape["vllm:generation_tokens_total"]) == (17, 15)
    assert reasons(scrape) == {"length": 3}
    assert scrape["vllm:time_to_first_token_seconds_count"] == 3
    assert scrape["vllm:inter_token_latency_seconds_count"] == 12
    assert scrape.histogram("vllm:request_params_n") == (1, 3)
    assert scrape.histogram("vllm:request_max_num_generation_tokens") == (1, 5)
    assert scrape.histogram("vllm:request_prefill_kv_computed_tokens") == (3, 17)


def test_preemptions_on_a_tiny_pool_are_counted_by_the_engine_and_by_request(metered: Callable[..., Metered]) -> None:
    run = metered(num_gpu_blocks_override=12, block_size=4, max_model_len=40)
    for i in range(4):
        run.add(str(i), [10 + i, 20 + i, 30 + i, 40 + i, 50 + i], max_tokens=20)
    scrape = run.run()
    assert scrape["vllm:num_preemptions_total"] == run.engine.stats.num_preemptions > 0
    assert scrape.histogram("vllm:request_num_preemptions") == (4, scrape["vllm:num_preemptions_total"])
    assert run.usage() == (scrape["vllm:prompt_tokens_total"], scrape["vllm:generation_tokens_total"]) == (20, 80)
    assert scrape["vllm:prefix_cache_queries_total"] == 20, "a prompt is looked up at its first admission"
    assert scrape["vllm:iteration_tokens_total_sum"] > 20 + 76, "what was computed again is work, too"


def test_each_way_to_end_has_its_reason(metered: Callable[..., Metered], monkeypatch: pytest.MonkeyPatch) -> None:
    run = metered(max_num_seqs=3)
    run.add("length", [5, 6], max_tokens=2)
    run.add("running", [5, 6, 7], max_tokens=50)
    run.add("failing", [8, 9], max_tokens=50)
    run.add("waiting", [7], max_tokens=5)
    run.step()
    assert run.scrape()["vllm:num_requests_waiting"] == 1
    run.engine.abort_request(["running", "waiting", "nobody"])
    run.step()
    fail = ModelRunnerOutput(errors={"failing": "no token allowed"})
    core = run.engine.engine_core.core
    with monkeypatch.context() as patch:
        patch.setattr(core.executor, "execute_model", lambda plan: fail)
        run.step()
    scrape = run.run()
    assert reasons(scrape) == {"length": 1, "abort": 2, "error": 1}
    assert scrape["vllm:e2e_request_latency_seconds_count"] == 4
    assert scrape["vllm:request_prefill_time_seconds_count"] == 3, "one never began"
    assert scrape.histogram("vllm:request_prompt_tokens") == (4, 8)
    assert scrape.histogram("vllm:request_prefill_kv_computed_tokens")[0] == 3
    assert (scrape["vllm:num_requests_running"], scrape["vllm:num_requests_waiting"]) == (0, 0)


def test_a_stop_string_is_a_stop_and_nothing_behind_it_is_counted(metered: Callable[..., Metered]) -> None:
    run = metered()
    run.add("free", [20, 30, 40], max_tokens=12)
    run.run()
    text = run.outputs["free"].outputs[0].text
    run.add("stopped", [20, 30, 40], max_tokens=12, stop=[text[len(text) // 2 :][:3]])
    scrape = run.run()
    assert reasons(scrape) == {"length": 1, "stop": 1}
    assert run.outputs["stopped"].outputs[0].finish_reason == "stop"
    assert run.usage() == (6, scrape["vllm:generation_tokens_total"])
    assert scrape["vllm:request_generation_tokens_sum"] == scrape["vllm:generation_tokens_total"] < 24


# -- the processor, by hand -------------------------------------------------------------------------------------------


def process(processor: OutputProcessor, now: float, *news: EngineCoreOutput) -> IterationStats:
    iteration = IterationStats(now)
    processor.process(news, now, iteration)
    return iteration


def test_times_are_those_of_the_steps() -> None:
    processor = OutputProcessor(None)
    processor.add_request(Request("r", [1, 2, 3], SamplingParams(max_tokens=9), arrival_time=1.0), None)
    nothing = process(processor, 4.0, EngineCoreOutput("r", times=(2.0, 3.5)))
    assert nothing == IterationStats(4.0)
    first = process(processor, 5.0, EngineCoreOutput("r", [7], num_cached_tokens=1))
    assert (first.num_prompt_tokens, first.num_cached_tokens, first.num_generation_tokens) == (3, 1, 1)
    assert (first.times_to_first_token, first.inter_token_latencies, first.finished) == ([4.0], [], [])
    second = process(processor, 5.25, EngineCoreOutput("r", [8]))
    assert (second.num_prompt_tokens, second.inter_token_latencies) == (0, [0.25])
    last = process(processor, 6.0, EngineCoreOutput("r", [9], finish_reason="length", num_preemptions=2))
    (end,) = last.finished
    assert (end.e2e_latency, end.queue_time, end.prefill_time) == (5.0, 1.5, 1.5)
    assert (end.decode_time, end.inference_time, end.mean_time_per_output_token) == (1.0, 2.5, 0.5)
    assert (end.num_prompt_tokens, end.num_generation_tokens, end.num_cached_tokens) == (3, 3, 1)
    assert (end.num_computed_prefill_tokens, end.num_preemptions, end.max_tokens_param) == (2, 2, 9)
    assert (last.num_samples, last.max_generation_tokens) == ([1], [3])


def test_times_that_the_core_does_not_tell_are_unknown() -> None:
    processor = OutputProcessor(None)
    processor.add_request(Request("r", [1], SamplingParams()), None)
    (end,) = process(processor, 1.0, EngineCoreOutput("r", [7], finish_reason="stop")).finished
    assert (end.queue_time, end.prefill_time, end.inference_time) == (None, None, None)
    assert (end.decode_time, end.mean_time_per_output_token) == (0.0, None)


def test_tokens_behind_a_stop_string_in_the_same_news_are_not_counted() -> None:
    processor = OutputProcessor(BYTE_LEVEL)
    ids = BYTE_LEVEL.encode("one two three four")
    processor.add_request(Request("r", [1], SamplingParams(stop="two", output_kind=RequestOutputKind.DELTA)), None)
    iteration = IterationStats(1.0)
    (output,) = processor.process([EngineCoreOutput("r", ids)], 1.0, iteration)
    kept = len(output.outputs[0].token_ids)
    assert iteration.num_generation_tokens == processor.num_generation_tokens == kept < len(ids)
    assert [end.finish_reason for end in iteration.finished] == ["stop"]
    late = process(processor, 2.0, EngineCoreOutput("r", [5]), EngineCoreOutput("r", finish_reason="stop"))
    assert late == IterationStats(2.0), "what the core says of it afterwards is not counted again"


def test_samples_end_apart_and_the_request_with_the_last() -> None:
    processor = OutputProcessor(None)
    params = SamplingParams(n=3, max_tokens=4)
    processor.add_request(Request("r", [1, 2], params, child_ids=["1_r", "2_r"]), None)
    first = process(processor, 1.0, *(EngineCoreOutput(i, [5], times=(0.0, 0.5)) for i in ("1_r", "r")))
    assert (first.num_prompt_tokens, len(first.times_to_first_token), first.num_samples) == (2, 2, [])
    ends = process(processor, 2.0, EngineCoreOutput("r", [6], finish_reason="stop"), EngineCoreOutput("2_r", [6]))
    assert ends.times_to_first_token == [2.0] and ends.inter_token_latencies == [1.0]
    assert [end.finish_reason for end in ends.finished] == ["stop"] and ends.num_samples == []
    iteration = IterationStats(3.0)
    processor.abort(["r"], 3.0, iteration)
    assert [end.finish_reason for end in iteration.finished] == ["abort", "abort"]
    assert [end.num_computed_prefill_tokens for end in (*ends.finished, *iteration.finished)] == [2, 0, 0]
    assert (iteration.num_samples, iteration.max_generation_tokens) == ([3], [2])


def test_requests_of_an_engine_that_died_are_errors() -> None:
    processor = OutputProcessor(None)
    processor.add_request(Request("r", [1], SamplingParams()), None)
    iteration = IterationStats(1.0)
    (output,) = processor.abort(["r"], 1.0, iteration, finish_reason="error", error="gone")
    assert (output.error, [end.finish_reason for end in iteration.finished]) == ("gone", ["error"])


def test_without_stats_nothing_is_collected_and_outputs_are_the_same() -> None:
    def play(stats: IterationStats | None) -> list[RequestOutput]:
        processor = OutputProcessor(None)
        processor.add_request(Request("r", [1], SamplingParams(n=2), child_ids=["1_r"]), None)
        news = [EngineCoreOutput(i, [5], finish_reason="length") for i in ("r", "1_r")]
        return processor.process(news, 1.0, stats)

    assert play(None) == play(IterationStats(1.0))


def test_a_logger_that_raises_ends_nothing_but_its_own_step() -> None:
    class Broken:
        def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
            raise KeyError("no such reason")

        def record_rejection(self, reason: str) -> None: ...

    registry = new_registry()
    record_all([Broken(), PrometheusStatLogger("t", 9, registry)], None, IterationStats(0.0, num_generation_tokens=2))
    assert Scrape(registry)["vllm:generation_tokens_total"] == 2


def test_a_logger_is_told_of_steps_without_news(metered: Callable[..., Metered]) -> None:
    run = metered()
    run.engine.stat_logger.record(SchedulerStats(kv_cache_usage=0.5), IterationStats(0.0))
    assert run.scrape()["vllm:kv_cache_usage_perc"] == 0.5
