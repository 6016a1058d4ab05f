"""Claims about the synchronous shell over a real small model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.exceptions import InvalidParameterError, PromptTooLongError
from mini_vllm.outputs import RequestOutput
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams

MakeEngine = Callable[..., LLMEngine]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["hello world", "def add(a, b):", "The capital of France is", "naïve café, 東京"]


def drain(engine: LLMEngine) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def assert_clean(engine: LLMEngine) -> None:
    """Nothing is left in the queues, the pool's tables, or the shell."""
    scheduler = engine.engine_core.core.scheduler  # type: ignore[attr-defined]
    scheduler.check_integrity()
    assert not scheduler.requests and not scheduler.running and not scheduler.waiting
    assert engine.stats.kv_cache_usage == 0.0
    assert engine.get_num_unfinished_requests() == 0 and not engine.has_unfinished_requests()


def params_of(kind: RequestOutputKind, **kwargs: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "output_kind": kind} | kwargs)


def test_streamed_deltas_add_up_to_the_cumulative_text(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for kind in RequestOutputKind:
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(f"{kind.name}-{index}", prompt, params_of(kind))
    outputs = drain(engine)
    for index in range(len(PROMPTS)):
        delta, cumulative, final = (outputs[f"{kind}-{index}"] for kind in ("DELTA", "CUMULATIVE", "FINAL_ONLY"))
        assert "".join(output.outputs[0].text for output in delta) == cumulative[-1].outputs[0].text
        assert [i for output in delta for i in output.outputs[0].token_ids] == cumulative[-1].outputs[0].token_ids
        assert (len(delta), len(cumulative), len(final)) == (12, 12, 1)
        assert final[0].outputs[0] == cumulative[-1].outputs[0]
        text = engine.get_tokenizer().decode(final[0].outputs[0].token_ids)
        assert final[0].outputs[0].text == text
    assert_clean(engine)


def test_the_text_of_a_request_does_not_depend_on_its_neighbours(make_engine: MakeEngine) -> None:
    alone = []
    for prompt in PROMPTS:
        engine = make_engine()
        engine.add_request("r", prompt, GREEDY)
        alone.append(drain(engine)["r"][-1].outputs[0])
    engine = make_engine()
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, GREEDY)
        engine.step()  # each joins while the others are already decoding
    outputs = drain(engine)
    assert [outputs[str(index)][-1].outputs[0] for index in range(len(PROMPTS))] == alone
    assert len({tuple(output.token_ids) for output in alone}) == len(alone), "the texts differ, so mixing would show"


# -- aborts -----------------------------------------------------------------------------------------------------


def test_an_abort_before_the_first_step_leaves_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request("r", "hello", GREEDY)
    (output,) = engine.abort_request("r")
    assert output.finished and output.outputs[0].finish_reason == "abort" and output.outputs[0].token_ids == []
    assert_clean(engine)
    assert engine.step() == []


def test_an_abort_while_waiting_behind_others_leaves_them_alone(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    for request_id in "abc":
        engine.add_request(request_id, "hello world", GREEDY)
    engine.step()
    assert engine.waiting_reasons() == {"b": "batch full (max_num_seqs)", "c": "behind the head of the queue"}
    engine.abort_request(["b"])
    outputs = drain(engine)
    assert set(outputs) == {"a", "c"} and outputs["a"][-1].outputs[0] == outputs["c"][-1].outputs[0]
    assert_clean(engine)


def test_an_abort_in_mid_prefill_frees_the_chunks(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=16, enable_prefix_caching=False)
    engine.add_request("r", [5] * 100, GREEDY)
    assert engine.step() == [] and engine.stats.kv_cache_usage > 0
    engine.abort_request("r")
    assert_clean(engine)


def test_an_abort_while_decoding_returns_what_was_generated(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for request_id in "ab":
        engine.add_request(request_id, "hello world", GREEDY)
    seen = [engine.step() for _ in range(4)][-1]
    (output,) = engine.abort_request("a")
    assert output.outputs[0].token_ids == seen[0].outputs[0].token_ids and len(output.outputs[0].token_ids) == 4
    rest = drain(engine)
    assert set(rest) == {"b"} and len(rest["b"][-1].outputs[0].token_ids) == 12
    assert_clean(engine)


def test_an_abort_of_a_preempted_request_leaves_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(num_gpu_blocks_override=7, block_size=4, max_model_len=24, enable_prefix_caching=False)
    for request_id in "ab":
        engine.add_request(request_id, [5, 6, 7, 8, 9, 10, 11], GREEDY)
    while not engine.stats.num_preemptions:
        engine.step()
    (victim,) = engine.waiting_reasons()
    engine.abort_request(victim)
    outputs = drain(engine)
    assert victim not in outputs and len(outputs) == 1
    assert_clean(engine)


def test_an_abort_after_the_end_or_of_a_stranger_is_ignored(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request("r", "hello", GREEDY)
    drain(engine)
    assert engine.abort_request(["r", "nobody"]) == []
    assert_clean(engine)


# -- bad input --------------------------------------------------------------------------------------------------

BAD_REQUESTS: dict[str, tuple[Any, Any, str, str]] = {
    "empty prompt": ([], None, "prompt", "at least one token"),
    "over-long prompt": ([5] * 300, None, "prompt", "maximum context length is 256 tokens. However, .* 300"),
    "id out of range": ([384], None, "prompt_token_ids", "token id 384 .* 0 to 383"),
    "negative id": ([-5], None, "prompt_token_ids", "token id -5"),
    "not a prompt": (3.5, None, "prompt", "got float"),
    "unknown key": ({"promt": "x"}, None, "prompt", "unknown keys promt"),
    "params of another type": ("x", {"temperature": 1}, "sampling_params", "got dict"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_by_field_while_others_are_served(make_engine: MakeEngine, name: str) -> None:
    prompt, params, field, says = BAD_REQUESTS[name]
    engine = make_engine()
    engine.add_request("good", "hello world", GREEDY)
    engine.step()
    with pytest.raises(InvalidParameterError, match=says) as caught:
        engine.add_request("bad", prompt, params)
    assert caught.value.field == field
    assert set(drain(engine)) == {"good"}
    assert_clean(engine)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", -0.1, "0"),
        ("temperature", float("nan"), "finite"),
        ("temperature", "hot", "finite number"),
        ("top_p", 0.0, r"\(0, 1\]"),
        ("top_p", 1.5, r"\(0, 1\]"),
        ("top_p", float("nan"), "finite"),
        ("top_k", -2, "positive"),
        ("top_k", 2.5, "integer"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", -3, "at least 1"),
        ("seed", 2**64, "64"),
        ("stop_token_ids", [-1], "0 or more"),
        ("stop_token_ids", 5, "list of ids"),
        ("ignore_eos", 1, "bool"),
    ],
)
def test_bad_sampling_parameters_name_field_and_limit(field: str, value: Any, limit: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"^{field}: .*{limit}") as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_a_prompt_that_never_fits_the_pool_is_refused_before_it_is_queued(make_engine: MakeEngine) -> None:
    engine = make_engine(num_gpu_blocks_override=5, block_size=4, max_model_len=16)
    with pytest.raises(PromptTooLongError, match=r"maximum context length is 16"):
        engine.add_request("r", [5] * 16, GREEDY)
    assert_clean(engine)


def test_duplicate_and_empty_request_ids_are_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request("r", "hello", GREEDY)
    for bad in ("r", "", 7):
        with pytest.raises(InvalidParameterError, match=r"^request_id: "):
            engine.add_request(bad, "hello", GREEDY)  # type: ignore[arg-type]
    assert len(drain(engine)["r"]) == 12
    engine.add_request("r", "hello", GREEDY)
    drain(engine)
    assert_clean(engine)


# -- looking in -------------------------------------------------------------------------------------------------


def test_step_records_say_who_ran_and_who_ended(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    engine.add_request("r", [5] * 12, params_of(RequestOutputKind.FINAL_ONLY, max_tokens=2))
    drain(engine)
    records = engine.step_records()
    assert [record.num_scheduled_tokens for record in records] == [{"r": 8}, {"r": 4}, {"r": 1}]
    assert records[-1].finished == {"r": "length"} and engine.step_records(1) == records[-1:]


def test_a_second_request_with_the_same_prefix_reports_its_cached_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    prompt = list(range(5, 27))
    cached = []
    for request_id in ("cold", "warm", "reset"):
        if request_id == "reset":
            assert engine.reset_prefix_cache()
        engine.add_request(request_id, prompt, GREEDY)
        cached.append(drain(engine)[request_id][-1].num_cached_tokens)
    assert cached == [0, 20, 0]
    assert (engine.stats.prefix_cache_queries, engine.stats.prefix_cache_hits) == (66, 20)


def test_cache_salts_separate_and_join(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    cached = {}
    for request_id, salt in (("a1", "a"), ("b1", "b"), ("a2", "a"), ("none", None)):
        engine.add_request(request_id, list(range(5, 27)), GREEDY, cache_salt=salt)
        cached[request_id] = drain(engine)[request_id][-1].num_cached_tokens
    assert cached == {"a1": 0, "b1": 0, "a2": 20, "none": 0}


def test_priority_decides_who_is_admitted_first(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1, scheduling_policy="priority")
    for request_id, priority in (("later", 5), ("sooner", -5)):
        engine.add_request(request_id, "hello", params_of(RequestOutputKind.FINAL_ONLY), priority=priority)
    finished = []
    while engine.has_unfinished_requests():
        finished += [output.request_id for output in engine.step()]
    assert finished == ["sooner", "later"]


def test_metrics_are_in_order(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request("r", "hello", GREEDY)
    metrics = drain(engine)["r"][-1].metrics
    assert metrics is not None and metrics.first_token_time is not None and metrics.last_token_time is not None
    assert metrics.arrival_time <= metrics.first_token_time < metrics.last_token_time == metrics.finished_time


def test_a_request_the_core_refuses_leaves_nothing_in_the_shell(make_engine: MakeEngine) -> None:
    engine = make_engine(num_gpu_blocks_override=7, block_size=4, max_model_len=24)
    engine.input_processor.max_model_len = 200  # let an over-long prompt through to the core
    with pytest.raises(PromptTooLongError, match="the whole pool has 6"):
        engine.add_request("r", [5] * 30, GREEDY)
    assert_clean(engine)


def test_prompt_ids_beyond_the_tokenizer_but_within_the_model_are_served(qwen2: Path) -> None:
    from mini_vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=str(qwen2), dtype="float32", num_threads=1, num_gpu_blocks_override=32)
    engine = LLMEngine.from_engine_args(args)
    engine.add_request("r", [400, 447, 10], GREEDY)
    assert len(drain(engine)["r"][-1].outputs[0].token_ids) == 12
    with pytest.raises(InvalidParameterError, match=r"token id 448 .* 0 to 447"):
        engine.add_request("r", [448], GREEDY)
