"""Claims about the messages between shell and engine: what goes in comes out, and what cannot travel is said."""

import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.core.scheduler_output import (
    EngineCoreOutput,
    EngineCoreOutputs,
    PromptLogprobs,
    SchedulerStats,
    TokenLogprobs,
)
from mini_vllm.engine.process.messages import (
    AbortRequests,
    AddRequests,
    Dying,
    Ended,
    EngineCoreRequest,
    ErrorReport,
    Heartbeat,
    News,
    Shutdown,
    Start,
    StopRequests,
    TokenizerFacts,
    UtilityCall,
    UtilityResult,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from mini_vllm.engine.process.mp_client import portable_args, why_not_sendable
from mini_vllm.exceptions import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    InvalidParameterError,
    KVCacheTooSmallError,
    MiniVLLMError,
    PromptTooLongError,
    UnsupportedModelError,
)
from mini_vllm.request import Request, Tenant
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams
from tests.async_rig import engine_args

ids = st.integers(0, 2**31)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
finite = st.floats(0, 2, allow_nan=False)

params = st.builds(
    SamplingParams,
    n=st.integers(1, 4),
    temperature=finite,
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 50),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(texts, max_size=3),
    stop_token_ids=st.lists(ids, max_size=3),
    bad_words=st.lists(texts, max_size=2),
    logit_bias=st.none() | st.dictionaries(ids, st.floats(-5, 5)),
    allowed_token_ids=st.none() | st.lists(ids, min_size=1, max_size=4),
    max_tokens=st.none() | st.integers(1, 10**6),
    logprobs=st.none() | st.integers(-1, 20),
    prompt_logprobs=st.none() | st.integers(-1, 20),
    logprob_token_ids=st.none() | st.lists(ids, max_size=3),
    ignore_eos=st.booleans(),
    output_kind=st.sampled_from(RequestOutputKind),
    extra_args=st.none() | st.dictionaries(texts, st.integers(0, 9) | texts),
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    request_id = draw(texts)
    chosen = draw(params)
    return Request(
        request_id,
        draw(st.lists(ids, min_size=1, max_size=20)),
        chosen,
        eos_token_id=draw(st.none() | ids),
        arrival_time=draw(finite),
        priority=draw(st.integers(-(2**63), 2**63 - 1)),
        max_model_len=draw(st.none() | st.integers(1, 10**6)),
        cache_salt=draw(st.none() | texts),
        child_ids=[f"{i}_{request_id}" for i in range(1, chosen.n)],
        bad_words_token_ids=draw(st.lists(st.lists(ids, max_size=3), max_size=2)),
        tenant=Tenant(draw(texts), draw(texts)),
    )


@given(st.lists(requests(), max_size=3))
def test_a_request_reaches_the_core_as_it_was(made: list[Request]) -> None:
    message = AddRequests([EngineCoreRequest.of(request) for request in made])
    arrived = decode_to_engine(encode(message))
    assert arrived == message
    for request, again in zip(made, [item.to_request() for item in arrived.requests], strict=True):
        for name in Request.__slots__:
            assert as_lists(getattr(again, name)) == as_lists(getattr(request, name)), name


def as_lists(value: Any) -> Any:
    return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


positions = st.builds(TokenLogprobs, st.lists(ids, max_size=4), st.lists(finite, max_size=4), st.integers(1, 9))
news = st.builds(
    EngineCoreOutput,
    request_id=texts,
    new_token_ids=st.lists(ids, max_size=3),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    stop_reason=st.none() | ids | texts,
    error=st.none() | texts,
    num_cached_tokens=st.integers(0, 999),
    num_preemptions=st.integers(0, 9),
    logprobs=st.none() | st.lists(positions, max_size=2),
    prompt_logprobs=st.none() | st.builds(PromptLogprobs, st.integers(1, 9), st.lists(positions, max_size=2)),
    times=st.none() | st.tuples(finite, st.none() | finite),
)


@given(st.lists(news, max_size=5), finite)
def test_the_news_of_a_step_reach_the_shell_as_they_were(outputs: list[EngineCoreOutput], now: float) -> None:
    message = News(EngineCoreOutputs(outputs, SchedulerStats(step_id=3, num_running_reqs=2), now))
    assert decode_from_engine(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [AbortRequests(["a", "b"]), StopRequests([]), UtilityCall(7, "step_records", [None]), Shutdown(),
     Start({"model": None, "max_logprobs": 20}, 1.5, TokenizerFacts("a folder", 7))],
)  # fmt: skip
def test_the_other_messages_reach_the_engine(message: Any) -> None:
    assert decode_to_engine(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [UtilityResult(7, encode({"a": "b"})), UtilityResult(8, error=ErrorReport("AssertionError", "lost")), Heartbeat(),
     Ended(["a"]), Dying(ErrorReport("RuntimeError", "bug"))],
)  # fmt: skip
def test_the_other_messages_reach_the_shell(message: Any) -> None:
    assert decode_from_engine(encode(message)) == message


@pytest.mark.parametrize(
    "error",
    [ConfigError("tensor_parallel_size: no"), CheckpointError("x"), UnsupportedModelError("y"),
     KVCacheTooSmallError("z"), InvalidParameterError("prompt", "too: long"), PromptTooLongError("prompt", "w")],
)  # fmt: skip
def test_an_error_of_ours_keeps_type_text_and_field(error: MiniVLLMError) -> None:
    again = ErrorReport.of(error).rebuild()
    assert type(again) is type(error) and str(again) == str(error)
    assert getattr(again, "field", None) == getattr(error, "field", None)


def test_any_other_error_becomes_a_dead_engine_that_names_it() -> None:
    again = ErrorReport.of(MemoryError("no more")).rebuild()
    assert isinstance(again, EngineDeadError) and str(again) == "MemoryError: no more"


@pytest.mark.parametrize(
    ("field", "options", "others"),
    [
        ("logits_processors", {"logits_processors": [lambda ids, logits: logits]}, {}),
        ("extra_args", {"extra_args": {"x": object()}}, {}),
        ("stop", {"stop": "\ud800"}, {}),
        ("priority", {}, {"priority": 2**70}),
        ("cache_salt", {}, {"cache_salt": "\udfff"}),
    ],
)
def test_a_request_that_cannot_travel_is_refused_by_the_name_of_its_field(
    field: str, options: dict[str, Any], others: dict[str, Any]
) -> None:
    message = EngineCoreRequest.of(Request("r", [1], SamplingParams(**options), **others))
    with pytest.raises((TypeError, ValueError, OverflowError)):
        encode(AddRequests([message]))
    assert why_not_sendable([message]).field == field


def test_classes_among_the_arguments_are_refused_and_names_are_not() -> None:
    with pytest.raises(ConfigError, match=r"^logits_processors: .*module:Class"):
        portable_args(engine_args(logits_processors=[dict]))
    assert portable_args(engine_args(logits_processors="a.b:C"))["logits_processors"] == ("a.b:C",)


def test_the_arguments_of_an_engine_survive_the_way() -> None:
    args = engine_args(max_num_seqs=3, gpu_memory_utilization=0.5)
    start = decode_to_engine(encode(Start(portable_args(args), 1.0, TokenizerFacts("", 0))))
    assert type(args).from_kwargs(**start.engine_args) == args


@pytest.mark.slow
def test_the_news_of_a_thousand_sequences_cost_less_than_two_microseconds_each() -> None:
    outputs = [EngineCoreOutput(f"chatcmpl-{i:032x}", [i]) for i in range(1000)]
    message = News(EngineCoreOutputs(outputs))
    best = min(timed(message) for _ in range(50))
    assert best / len(outputs) < 2e-6


def timed(message: News) -> float:
    start = time.perf_counter()
    decode_from_engine(encode(message))
    return time.perf_counter() - start


def test_messages_of_another_kind_are_not_taken_for_ours() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_to_engine(encode([99, []]))
