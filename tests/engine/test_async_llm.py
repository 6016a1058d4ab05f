"""Claims about `AsyncLLM`, with its core in a thread and in a process: it says what `LLM` says, and loses nothing."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from mini_vllm import LLM
from mini_vllm.engine.async_llm import AsyncLLM
from mini_vllm.engine.input_processor import TokenizedPrompt
from mini_vllm.engine.intake import Intake
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.engine.process.async_core_client import ThreadCoreClient
from mini_vllm.engine.protocol import NewRequest
from mini_vllm.exceptions import InvalidParameterError, OverloadedError, PromptTooLongError, RequestError
from mini_vllm.outputs import RequestOutput
from mini_vllm.request import Tenant
from mini_vllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from tests.async_rig import async_engine, checkpoint, finish, in_process_engine, new_requests

pytestmark = pytest.mark.asyncio(loop_scope="module")

DELTA = RequestOutputKind.DELTA
PROMPTS = ["The capital of France is", "hello world, goodbye", "def add(a, b):", "Zwei Wörter", "a", "for i in range"]
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True, output_kind=DELTA)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["thread", "process"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[AsyncLLM]:
    async with async_engine(in_process=request.param == "thread") as made:
        yield made


@pytest.fixture(scope="module")
def offline() -> Iterator[LLM]:
    llm = LLM(str(checkpoint()), dtype="float32", num_threads=1, num_gpu_blocks_override=80)
    yield llm
    llm.shutdown()


async def assert_clean(engine: AsyncLLM) -> None:
    """Nothing of any request is left, here or in the core."""
    await engine.check_integrity()
    stats = await engine.stats()
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage) == (0, 0, 0.0)
    assert engine.num_unfinished_requests == 0
    unfinished = engine._unfinished
    assert unfinished.admission.num_tokens == 0 and not unfinished.leaving
    assert not engine.output_processor.unfinished_request_ids() and not engine.output_processor._by_core_id
    assert not unfinished.streams and not engine._calls._waiting and unfinished.idle.is_set()


def shape(output: RequestOutput) -> Any:
    """What must be equal to the last bit in two runs."""
    return output.prompt_token_ids, [
        (each.index, each.text, each.token_ids, each.finish_reason, each.stop_reason) for each in output.outputs
    ]


def logprobs(output: RequestOutput) -> list[float]:
    """Numbers that the size of a batch may change in their last digits."""
    positions = [*(output.prompt_logprobs or ()), *(p for each in output.outputs for p in each.logprobs or ())]
    return [entry.logprob for position in positions for entry in (position or {}).values()]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, max_tokens=12),
        SamplingParams(seed=7, max_tokens=12, top_p=0.9),
        SamplingParams(seed=7, max_tokens=8, n=3, logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=8, logprobs=1, prompt_logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=30, stop=["e", "ca"]),
        SamplingParams(temperature=0.0, max_tokens=9, bad_words=["capital"], logit_bias={5: 3.0}, min_tokens=3),
    ],
    ids=["greedy", "seeded", "samples", "logprobs", "stop", "rules"],
)
async def test_it_says_what_the_offline_engine_says(engine: AsyncLLM, offline: LLM, params: SamplingParams) -> None:
    expected = offline.generate(PROMPTS, params, use_tqdm=False)
    outputs = await asyncio.gather(*(finish(engine, prompt, params, f"r{i}") for i, prompt in enumerate(PROMPTS)))
    for output, other in zip(outputs, expected, strict=True):
        assert shape(output) == shape(other)
        assert logprobs(output) == pytest.approx(logprobs(other), abs=1e-4)
    await assert_clean(engine)


async def test_streamed_deltas_add_up_to_the_whole(engine: AsyncLLM, offline: LLM) -> None:
    params = SamplingParams(seed=3, max_tokens=15, n=2, logprobs=1, output_kind=DELTA)
    (expected,) = offline.generate(PROMPTS[0], params, use_tqdm=False)
    texts, token_ids, num_logprobs = ["", ""], [[], []], [0, 0]
    async for output in engine.generate(PROMPTS[0], params, "r"):
        for part in output.outputs:
            texts[part.index] += part.text
            token_ids[part.index] += part.token_ids
            num_logprobs[part.index] += len(part.logprobs or ())
    assert texts == [completion.text for completion in expected.outputs]
    assert token_ids == [completion.token_ids for completion in expected.outputs]
    assert num_logprobs == [len(ids) for ids in token_ids]


async def test_beam_search_finds_what_the_offline_search_finds(engine: AsyncLLM, offline: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6)
    expected = offline.beam_search(PROMPTS[:2], params)
    found = await asyncio.gather(*(engine.beam_search(p, params, f"b{i}") for i, p in enumerate(PROMPTS[:2])))
    for output, other in zip(found, expected, strict=True):
        assert [(each.tokens, each.text) for each in output.sequences] == [(e.tokens, e.text) for e in other.sequences]
        assert [each.score for each in output.sequences] == pytest.approx([e.score for e in other.sequences], abs=1e-4)
    await assert_clean(engine)


async def test_token_ids_and_default_parameters_are_taken(engine: AsyncLLM) -> None:
    outputs = [output async for output in engine.generate([3, 4, 5], None, "r")]
    assert outputs[-1].prompt_token_ids == [3, 4, 5] and outputs[-1].finished


async def test_tenant_and_salt_reach_the_core(make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(scheduling_policy="priority")
    engine.add_request("r", {"prompt": "a", "cache_salt": "s"}, LONG, tenant=Tenant("key", "user"))
    core = engine.engine_core.core  # type: ignore[attr-defined]
    request = core.scheduler.requests["r"]
    assert (request.tenant, request.cache_salt) == (Tenant("key", "user"), "s")
    engine.abort_request("r")
    options = {"tenant": Tenant("key"), "cache_salt": "t", "priority": 3}
    (request,) = Intake(engine.input_processor, engine.output_processor, 100).make_requests(
        [NewRequest(request_id="r", prompt=TokenizedPrompt([1], cache_salt="s"), params=LONG, **options)]  # type: ignore[arg-type]
    )
    assert {name: getattr(request, name) for name in options} == options


# -- what is refused -------------------------------------------------------------------------------------------


async def test_a_bad_request_is_refused_before_anything_of_its_batch_is_queued(engine: AsyncLLM) -> None:
    good, bad = await new_requests(engine, ["a", "b"], SamplingParams(max_tokens=2))
    for field, changed in {
        "request_id": {"request_id": good.request_id},
        "stop_token_ids": {"params": SamplingParams(stop_token_ids=[10**6])},
        "priority": {"priority": 3},
        "cache_salt": {"cache_salt": ""},
    }.items():
        values = {"request_id": "x", "prompt": bad.prompt, "params": bad.params} | changed
        with pytest.raises(InvalidParameterError) as caught:
            await engine.add_requests([good, NewRequest(**values)])
        assert caught.value.field == field
    await assert_clean(engine)


async def test_an_id_is_refused_while_a_request_has_it(engine: AsyncLLM) -> None:
    (request,) = await new_requests(engine, ["a"], LONG)
    (stream,) = await engine.add_requests([request])
    with pytest.raises(InvalidParameterError, match="already in use"):
        await engine.add_requests([request])
    with pytest.raises(InvalidParameterError, match="already in use"):
        await engine.beam_search("a", BeamSearchParams(beam_width=1, max_tokens=1), request.request_id)
    await stream.aclose()
    (stream,) = await engine.add_requests([request])
    await stream.aclose()
    await assert_clean(engine)


async def test_a_prompt_larger_than_the_pool_is_refused_at_once() -> None:
    async with in_process_engine(num_gpu_blocks_override=20, max_model_len=256) as engine:
        engine.input_processor.max_model_len = 10_000  # so that the pool is what refuses
        with pytest.raises(PromptTooLongError, match="whole KV cache holds 304"):
            await finish(engine, [5] * 305, SamplingParams(max_tokens=1))
        assert not engine.num_unfinished_requests


async def test_a_core_that_refuses_fails_that_request_alone(engine: AsyncLLM) -> None:
    good, bad = await new_requests(engine, ["a", "b"], SamplingParams(temperature=0.0, max_tokens=4, n=2))
    bad.prompt.token_ids = [5] * 300
    engine._intake.input_processor.max_model_len = 256
    streams = await engine.add_requests([good, bad])
    assert [output async for output in streams[0]][-1].finished
    with pytest.raises(RequestError, match="maximum context length"):
        await anext(streams[1])
    await assert_clean(engine)


async def test_callables_are_refused_where_they_cannot_travel(engine: AsyncLLM) -> None:
    params = SamplingParams(max_tokens=2, logits_processors=[lambda ids, logits: logits])
    if isinstance(engine.client, ThreadCoreClient):
        assert (await finish(engine, "a", params)).finished
    else:
        with pytest.raises(InvalidParameterError, match=r"^logits_processors"):
            await finish(engine, "a", params)
    await assert_clean(engine)


# -- aborts in every state -------------------------------------------------------------------------------------


async def test_closing_a_stream_at_any_moment_frees_everything(engine: AsyncLLM) -> None:
    for num_outputs in (0, 1, 3, 200):
        for n in (1, 3):
            (request,) = await new_requests(engine, ["hello"], SamplingParams(
                temperature=0.0, max_tokens=60, ignore_eos=True, output_kind=DELTA, n=n))  # fmt: skip
            (stream,) = await engine.add_requests([request])
            for _ in range(num_outputs):
                with contextlib.suppress(StopAsyncIteration):
                    await anext(stream)
            await stream.aclose()
            await assert_clean(engine)


async def test_an_abort_mid_prefill_and_while_waiting_frees_everything() -> None:
    async with in_process_engine(max_num_batched_tokens=8, max_num_seqs=1) as engine:
        requests = await new_requests(engine, [[7] * 200, [8] * 200], LONG)
        streams = await engine.add_requests(requests)
        while not (await engine.stats()).num_running_reqs:
            pass
        assert (await engine.stats()).num_waiting_reqs == 1
        for stream in streams:
            await stream.aclose()
        await assert_clean(engine)


async def test_an_abort_by_id_ends_the_stream_with_what_there_was(engine: AsyncLLM) -> None:
    (request,) = await new_requests(engine, ["hello"], LONG)
    (stream,) = await engine.add_requests([request])
    first = await anext(stream)
    await engine.abort(request.request_id)
    rest = [output async for output in stream]
    assert rest[-1].finished and rest[-1].outputs[0].finish_reason == "abort" and not first.finished
    await engine.abort([request.request_id, "unknown"])
    await assert_clean(engine)


async def test_cancelling_a_task_aborts_its_request_wherever_it_is(engine: AsyncLLM) -> None:
    for pause in (0.0, 0.0005, 0.002, 0.01):
        tasks = [asyncio.create_task(finish(engine, f"prompt {i}", LONG, f"r{i}")) for i in range(6)]
        await asyncio.sleep(pause)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await assert_clean(engine)


async def test_leaving_the_generator_early_aborts(engine: AsyncLLM) -> None:
    generator = engine.generate("hello", LONG, "r")
    async with contextlib.aclosing(generator):
        async for _ in generator:
            break
    await assert_clean(engine)


async def test_cancelling_a_beam_search_leaves_no_beam_behind(engine: AsyncLLM) -> None:
    search = asyncio.create_task(engine.beam_search("hello", BeamSearchParams(beam_width=4, max_tokens=200), "b"))
    await asyncio.sleep(0.02)
    assert engine.num_unfinished_requests == 1
    search.cancel()
    with pytest.raises(asyncio.CancelledError):
        await search
    await assert_clean(engine)


async def test_an_id_can_be_used_again_at_once_and_gets_nothing_of_the_request_before(
    engine: AsyncLLM, offline: LLM
) -> None:
    short = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    (expected,) = offline.generate(["another prompt"], short, use_tqdm=False)
    for params in (LONG, SamplingParams(temperature=0.0, stop=["e", "a", "t"], output_kind=DELTA)):
        for _ in range(20):
            generator = engine.generate("hello", params, "r")
            await anext(generator)
            await generator.aclose()
            assert shape(await finish(engine, "another prompt", short, "r")) == shape(expected)
    await assert_clean(engine)


# -- the rest --------------------------------------------------------------------------------------------------


async def test_what_the_core_knows_can_be_asked_while_it_runs(engine: AsyncLLM) -> None:
    (request,) = await new_requests(engine, ["hello"], LONG)
    (stream,) = await engine.add_requests([request])
    await anext(stream)
    assert (await engine.stats()).num_running_reqs == 1
    assert await engine.waiting_reasons() == {}
    (record,) = await engine.step_records(1)
    assert request.request_id in record.num_scheduled_tokens
    await stream.aclose()
    await engine.reset_prefix_cache()
    await engine.check_health()
    assert engine.is_running and engine.dead_error is None


async def test_warming_up_leaves_no_trace() -> None:
    async with in_process_engine() as engine:
        stats = await engine.stats()
        assert (stats.step_id, stats.prefix_cache_queries, stats.kv_cache_usage) == (0, 0, 0.0)
        assert await engine.step_records() == []


async def test_a_reader_far_behind_gets_the_whole_answer_in_one_piece(engine: AsyncLLM) -> None:
    (request,) = await new_requests(engine, ["hello"], LONG)
    (stream,) = await engine.add_requests([request])
    while engine.num_unfinished_requests:
        await asyncio.sleep(0.01)
    (output,) = [output async for output in stream]
    assert len(output.outputs[0].token_ids) == 200 and output.finished


async def test_the_stream_interval_spaces_outputs_but_not_the_first_and_the_last() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, output_kind=DELTA)
    async with in_process_engine() as engine:
        whole = await finish(engine, "hello", SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True))
    async with in_process_engine(stream_interval=4) as engine:
        lengths, text = [], ""
        async for output in engine.generate("hello", params, "r"):
            lengths.append(len(output.outputs[0].token_ids))
            text += output.outputs[0].text
    assert lengths == [1, 4, 4, 1] and text == whole.outputs[0].text


async def test_the_event_loop_breathes_while_a_big_prompt_is_tokenised() -> None:
    async with in_process_engine(model=None, num_gpu_blocks_override=None) as engine:
        pauses: list[float] = []
        watching = asyncio.create_task(longest_pauses(pauses))
        tokenizer = engine.get_tokenizer()
        await engine.run_text_work(lambda: tokenizer.encode("import os, sys\n" * 20_000))
        watching.cancel()
        assert len(pauses) > 5 and max(pauses) < 0.1


async def longest_pauses(pauses: list[float]) -> None:
    while True:
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        pauses.append(time.perf_counter() - start)


class Loggers:
    """A stat logger that counts."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.finished: list[str] = []
        self.rejections: list[str] = []

    def record(self, stats: Any, iteration: Any) -> None:
        self.num_tokens += iteration.num_generation_tokens
        self.finished += [each.finish_reason for each in iteration.finished]

    def record_rejection(self, reason: str) -> None:
        self.rejections.append(reason)


async def test_loggers_hear_of_every_token_every_end_and_every_rejection() -> None:
    logger = Loggers()
    async with in_process_engine(stat_loggers=[logger], max_num_queued_reqs=2, max_num_queued_tokens=50) as engine:
        await finish(engine, "a", SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
        (stream,) = await engine.add_requests(await new_requests(engine, ["b"], LONG))
        await stream.aclose()
        with pytest.raises(OverloadedError):
            await engine.add_requests(await new_requests(engine, ["a", "b", "c"], LONG))
        with pytest.raises(OverloadedError):
            await finish(engine, [5] * 51, LONG)
        await engine.drain(0.0)
        with pytest.raises(OverloadedError):
            await finish(engine, "a", LONG)
    assert logger.finished == ["length", "abort"] and logger.num_tokens >= 5
    assert logger.rejections == ["max_num_queued_reqs", "max_num_queued_tokens", "shutting_down"]


async def test_overload_refuses_all_of_a_batch_and_counts_return_to_zero() -> None:
    async with in_process_engine(max_num_queued_reqs=3) as engine:
        requests = await new_requests(engine, ["a", "b", "c", "d"], LONG)
        streams = await engine.add_requests(requests[:2])
        with pytest.raises(OverloadedError) as caught:
            await engine.add_requests(requests[2:])
        assert caught.value.reason == "max_num_queued_reqs" and 1 <= caught.value.retry_after <= 60
        assert engine.num_unfinished_requests == 2
        streams += await engine.add_requests(requests[2:3])
        for stream in streams:
            await stream.aclose()
        await assert_clean(engine)


async def test_draining_lets_requests_finish_and_takes_no_more() -> None:
    async with in_process_engine() as engine:
        short = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        running = asyncio.create_task(finish(engine, "a", short))
        await asyncio.sleep(0)
        while not engine.num_unfinished_requests:
            await asyncio.sleep(0)
        await engine.drain(10.0)
        assert (await running).outputs[0].finish_reason == "length"
        with pytest.raises(OverloadedError, match="shutting down"):
            await finish(engine, "a", short)


async def test_draining_aborts_what_is_left_when_the_time_is_over() -> None:
    async with in_process_engine() as engine:
        running = asyncio.create_task(finish(engine, "a", LONG))
        while not engine.num_unfinished_requests:
            await asyncio.sleep(0)
        await engine.drain(0.0)
        assert (await running).outputs[0].finish_reason == "abort"
        await assert_clean(engine)


async def test_a_failure_while_text_is_made_ends_those_requests_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async with in_process_engine() as engine:
        good, bad = await new_requests(engine, ["good", "bad"], LONG)
        streams = await engine.add_requests([good])
        first = await anext(streams[0])
        streams += await engine.add_requests([bad])
        parent = engine.output_processor._requests[bad.request_id]
        monkeypatch.setattr(parent, "take", None)
        monkeypatch.setattr("mini_vllm.engine.unfinished.CHUNK", 1)
        with pytest.raises(RequestError, match="could not be processed"):
            await anext(streams[1])
        assert first.outputs and not (await anext(streams[0])).finished
        await streams[0].aclose()
        await assert_clean(engine)
