"""Claims about the metrics of an `AsyncLLM`: the sums agree with what callers were told, whatever happens to them."""

import asyncio
import contextlib
from collections import Counter

import pytest

from mini_vllm.engine.async_llm import AsyncLLM
from mini_vllm.engine.metrics.prometheus import PrometheusStatLogger, new_registry
from mini_vllm.exceptions import OverloadedError
from mini_vllm.outputs import RequestOutput
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams
from tests.async_rig import async_engine, finish, in_process_engine, new_requests
from tests.engine.metrics_table import Scrape


class Callers:
    """Tasks that each run one request to its end, or leave before it."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.engine = engine
        self.last: dict[str, RequestOutput] = {}

    async def call(self, request_id: str, prompt: str, params: SamplingParams) -> None:
        async for output in self.engine.generate(prompt, params, request_id):
            self.last[request_id] = output

    async def leave(self, request_id: str, prompt: str, after: int) -> None:
        params = SamplingParams(max_tokens=100, ignore_eos=True, output_kind=RequestOutputKind.CUMULATIVE)
        async with contextlib.aclosing(self.engine.generate(prompt, params, request_id)) as outputs:
            async for output in outputs:
                if len(output.outputs[0].token_ids) >= after:
                    return

    async def idle(self) -> None:
        """Until the core has told of its last step."""
        while (await self.engine.stats()).num_running_reqs:
            await asyncio.sleep(0.01)
        await self.engine.check_integrity()


def reasons(scrape: Scrape) -> dict[str, float]:
    samples = scrape.families["vllm:request_success"].samples
    return {sample.labels["finished_reason"]: sample.value for sample in samples if sample.value}


async def test_the_sums_are_those_of_the_callers_usage() -> None:
    registry = new_registry()
    logger = PrometheusStatLogger("tiny", 256, registry)
    final = {"output_kind": RequestOutputKind.FINAL_ONLY, "ignore_eos": True}
    async with in_process_engine(stat_loggers=[logger], max_num_seqs=6, num_gpu_blocks_override=40) as engine:
        callers = Callers(engine)
        text = (await finish(engine, "a b c", SamplingParams(max_tokens=12, temperature=0.0), "probe")).outputs[0].text
        before = Scrape(registry)
        work = [
            callers.call(f"n{i}", f"prompt {i}", SamplingParams(n=1 + i % 3, max_tokens=3 + i, seed=i, **final))
            for i in range(12)
        ]
        work += [
            callers.call(f"s{i}", "a b c", SamplingParams(max_tokens=12, temperature=0.0, stop=text[4:7], **final))
            for i in range(3)
        ]
        work += [callers.leave(f"left{i}", f"going {i}", 1 + i) for i in range(4)]
        await asyncio.gather(*work)
        await callers.idle()
        scrape = Scrape(registry)
    assert before.falls(scrape) == []

    def grown(name: str) -> float:
        return scrape[name] - before[name]

    ended = [completion for output in callers.last.values() for completion in output.outputs]
    told = Counter(completion.finish_reason for completion in ended)
    got = reasons(scrape)
    assert (got["abort"], got["stop"], got["length"]) == (4, told["stop"], told["length"] + reasons(before)["length"])
    assert told["stop"] == 3
    left = scrape["vllm:request_generation_tokens_sum"] - sum(len(c.token_ids) for c in ended)
    left -= before["vllm:request_generation_tokens_sum"]
    assert (
        grown("vllm:generation_tokens_total") == sum(len(c.token_ids) for c in ended) + left and left >= 1 + 2 + 3 + 4
    )
    assert grown("vllm:prompt_tokens_total") == grown("vllm:prompt_tokens_cached_total") + (
        scrape.value("vllm:prompt_tokens_by_source_total", source="local_compute")
        - before.value("vllm:prompt_tokens_by_source_total", source="local_compute")
    )
    tokens = scrape["vllm:generation_tokens_total"]
    first, later = (scrape[f"vllm:{name}_seconds_count"] for name in ("time_to_first_token", "inter_token_latency"))
    assert first + later == tokens
    assert scrape["vllm:request_params_n_count"] == len(callers.last) + 4 + 1
    assert scrape["vllm:e2e_request_latency_seconds_count"] == sum(got.values())


async def test_gauges_fall_to_nothing_after_the_last_request_left() -> None:
    registry = new_registry()
    logger = PrometheusStatLogger("tiny", 256, registry)
    async with in_process_engine(stat_loggers=[logger]) as engine:
        callers = Callers(engine)
        await callers.leave("r", "hello", 3)
        for _ in range(500):
            if Scrape(registry)["vllm:num_requests_running"] == 0:
                break
            await asyncio.sleep(0.01)
        scrape = Scrape(registry)
    assert (scrape["vllm:num_requests_running"], scrape["vllm:kv_cache_usage_perc"]) == (0, 0)
    assert reasons(scrape) == {"abort": 1}


async def test_what_is_not_taken_in_is_a_rejection_and_nothing_else() -> None:
    registry = new_registry()
    logger = PrometheusStatLogger("tiny", 256, registry)
    async with in_process_engine(stat_loggers=[logger], max_num_queued_reqs=2) as engine:
        requests = await new_requests(engine, ["a", "b", "c"], SamplingParams(max_tokens=2))
        with pytest.raises(OverloadedError):
            await engine.add_requests(requests)
        scrape = Scrape(registry)
    assert scrape.value("vllm:admission_rejections_total", reason="max_num_queued_reqs") == 1
    assert reasons(scrape) == {}


async def test_times_agree_across_processes() -> None:
    registry = new_registry()
    logger = PrometheusStatLogger("tiny", 256, registry)
    async with async_engine(stat_loggers=[logger]) as engine:
        params = SamplingParams(max_tokens=20, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
        outputs = await asyncio.gather(*(finish(engine, f"prompt {i}", params, str(i)) for i in range(4)))
        scrape = Scrape(registry)
    sums = {
        name: scrape.histogram(f"vllm:request_{name}_time_seconds")
        for name in ("queue", "prefill", "decode", "inference")
    }
    assert {count for count, _ in sums.values()} == {4}
    assert sums["prefill"][1] + sums["decode"][1] == pytest.approx(sums["inference"][1])
    e2e, ttft = scrape["vllm:e2e_request_latency_seconds_sum"], scrape["vllm:time_to_first_token_seconds_sum"]
    assert sums["queue"][1] + sums["prefill"][1] <= ttft <= e2e < 60
    assert sums["queue"][1] + sums["inference"][1] <= e2e
    for output in outputs:
        metrics = output.metrics
        assert metrics is not None and metrics.queued_time is not None and metrics.scheduled_time is not None
        assert metrics.first_token_time is not None and metrics.finished_time is not None
        assert metrics.arrival_time <= metrics.queued_time <= metrics.scheduled_time <= metrics.first_token_time
        assert metrics.first_token_time <= metrics.finished_time
