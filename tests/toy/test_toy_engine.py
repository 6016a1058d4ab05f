"""The toy shell: the same scheduler and block manager, one method of the model, text in and text out."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from mini_vllm.engine.core import EngineCore
from mini_vllm.exceptions import ConfigError, InvalidParameterError, PromptTooLongError, RequestError
from mini_vllm.request import Request
from mini_vllm.sampling.toy_sampler import Sampler
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.toy import TOY_MODELS, VOCAB_SIZE, ByteTokenizer, Logits, ToyEngine, ToyModel, ToyModelProtocol

PROMPTS = ["hello world", "goodbye", "The capital of France is", "a", "hello there"]


def greedy(max_tokens: int = 8, **kwargs: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **kwargs})


def by_hand(model: ToyModelProtocol, prompt: str, n: int) -> list[int]:
    """The plainest possible generation: one request, one forward a token."""
    ids = ByteTokenizer().encode(prompt)
    start = len(ids)
    for _ in range(n):
        ids.append(int(np.argmax(model.forward([ids[-1]], [len(ids) - 1])[0])))
    return ids[start:]


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


# -- it is the real engine ---------------------------------------------------------------------------------------


def test_it_runs_the_real_scheduler_manager_and_loop() -> None:
    engine = ToyEngine()
    assert type(engine.scheduler) is Scheduler
    assert type(engine.scheduler.kv) is KVCacheManager
    assert type(engine.engine_core) is EngineCore
    assert isinstance(engine.model, ToyModel) and isinstance(engine.sampler, Sampler)
    assert isinstance(engine.tokenizer, ByteTokenizer)


def test_keywords_reach_the_scheduler_and_the_pool() -> None:
    engine = ToyEngine(
        num_blocks=7, block_size=3, enable_caching=False, max_num_batched_tokens=11, long_prefill_token_threshold=5,
        max_num_seqs=2, policy="priority",
    )  # fmt: skip
    config, kv = engine.scheduler.config, engine.scheduler.kv
    assert (config.max_num_batched_tokens, config.long_prefill_token_threshold) == (11, 5)
    assert (config.max_num_seqs, config.policy) == (2, "priority")
    assert (kv.block_size, kv.block_pool.num_blocks, kv.enable_caching) == (3, 7, False)
    assert ToyEngine().scheduler.config.max_num_batched_tokens == 2048


def test_there_is_no_check_of_the_pool_at_start() -> None:
    assert ToyEngine(num_blocks=2, block_size=1).scheduler.kv.block_pool.num_usable_blocks == 1


# -- what it generates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TOY_MODELS))
def test_a_batch_gives_each_request_what_it_would_get_alone(name: str) -> None:
    engine = ToyEngine(model=name, seed=3)
    texts = engine.generate(PROMPTS, greedy(12))
    expected = [by_hand(TOY_MODELS[name](3), prompt, 12) for prompt in PROMPTS]
    assert [r.output_token_ids for r in engine.requests.values()] == expected
    assert texts == [ByteTokenizer().decode(ids) for ids in expected]


@pytest.mark.parametrize("name", sorted(TOY_MODELS))
@pytest.mark.parametrize(
    "knobs",
    [
        {"max_num_batched_tokens": 3},
        {"long_prefill_token_threshold": 2},
        {"num_blocks": 12, "block_size": 4},
        {"num_blocks": 12, "block_size": 4, "enable_caching": False},
        {"max_num_seqs": 1},
        {"block_size": 1},
        {"policy": "priority"},
    ],
)
def test_no_knob_changes_a_token(name: str, knobs: dict[str, Any]) -> None:
    assert ToyEngine(model=name, **knobs).generate(PROMPTS, greedy(12)) == ToyEngine(model=name).generate(
        PROMPTS, greedy(12)
    )


def test_the_default_is_greedy() -> None:
    engine = ToyEngine()
    (text,) = engine.generate(["hello"])
    assert text == engine.generate(["hello"], SamplingParams(temperature=0.0))[0]
    assert text == ToyEngine().generate("hello")[0], "one string is a list of one"


def test_a_seeded_request_draws_the_same_in_any_company() -> None:
    params = greedy(10, temperature=1.0, seed=5)
    alone = ToyEngine().generate(["hello"], params)
    engine = ToyEngine(max_num_batched_tokens=6)
    assert engine.generate(["hello", *PROMPTS], [params] + [greedy(10, temperature=2.0)] * 5)[0] == alone[0]


def test_each_prompt_may_have_its_own_params() -> None:
    engine = ToyEngine()
    engine.generate(PROMPTS[:3], [greedy(n) for n in (2, 5, 3)])
    assert [r.num_output_tokens for r in engine.requests.values()] == [2, 5, 3]
    with pytest.raises(InvalidParameterError, match="params: 2 given for 3 prompts"):
        engine.generate(PROMPTS[:3], [greedy(), greedy()])


def test_the_end_of_the_sequence_ends_a_request_and_is_not_shown() -> None:
    engine = ToyEngine()
    (text,) = engine.generate(["hello"], SamplingParams(temperature=0.0, max_tokens=500))
    (request,) = engine.requests.values()
    assert request.finish_reason == "stop"
    assert request.output_token_ids[-1] == 256 and 256 not in request.output_token_ids[:-1]
    assert len(text.encode()) == request.num_output_tokens - 1


def test_generating_twice_hits_the_prefix_cache_and_gives_the_same() -> None:
    engine = ToyEngine(block_size=4)
    assert engine.generate(PROMPTS, greedy()) == engine.generate(PROMPTS, greedy())
    second = list(engine.requests.values())[len(PROMPTS) :]
    assert [r.num_cached_tokens for r in second] == [8, 4, 20, 0, 8]


# -- requests, ids, steps --------------------------------------------------------------------------------------------


def test_ids_are_req_n_and_never_repeat_across_engines() -> None:
    ids = [ToyEngine().add_request("a") for _ in range(3)]
    numbers = [int(re.fullmatch(r"req-(\d+)", rid).group(1)) for rid in ids]  # type: ignore[union-attr]
    assert numbers == [numbers[0], numbers[0] + 1, numbers[0] + 2]


def test_adding_a_request_computes_nothing() -> None:
    engine = ToyEngine()
    rid = engine.add_request("hello")
    assert engine.requests[rid].num_computed_tokens == 0
    assert [r.request_id for r in engine.scheduler.waiting] == [rid]
    assert engine.has_unfinished_requests()


def test_step_returns_the_requests_that_finished_in_it() -> None:
    engine = ToyEngine()
    short, long = engine.add_request("hello", greedy(1)), engine.add_request("world", greedy(3))
    finished = []
    while engine.has_unfinished_requests():
        finished.append([r.request_id for r in engine.step()])
    assert finished == [[short], [], [long]]
    assert engine.scheduler.running == []
    assert engine.step() == []


def test_token_ids_are_a_prompt_too() -> None:
    engine = ToyEngine()
    a, b = engine.add_request("hi", greedy()), engine.add_request([104, 105], greedy())
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.requests[a].output_token_ids == engine.requests[b].output_token_ids


def test_an_aborted_request_is_gone_at_once() -> None:
    engine = ToyEngine()
    rid = engine.add_request("hello", greedy(50))
    engine.step()
    engine.abort_request(rid)
    engine.abort_request(rid)
    assert engine.requests[rid].finish_reason == "abort"
    assert not engine.has_unfinished_requests() and engine.scheduler.kv.usage == 0.0
    engine.step()
    assert engine.executor.rows == {}


def test_priority_and_salt_reach_the_request() -> None:
    engine = ToyEngine(policy="priority", max_num_seqs=1, block_size=4)
    low, high = engine.add_request("low", greedy(1), priority=5), engine.add_request("high", greedy(1), priority=1)
    assert [r.request_id for r in engine.step()] == [high]
    assert [r.request_id for r in engine.step()] == [low]
    cached = []
    for salt in ("x", "y", "x"):
        rid = engine.add_request("hello world", greedy(1), cache_salt=salt)
        engine.step()
        cached.append(engine.requests[rid].num_cached_tokens)
    assert cached == [0, 0, 8]


def test_the_executor_forgets_finished_and_preempted_requests() -> None:
    engine = ToyEngine(num_blocks=5, block_size=4)
    engine.generate(["aaaaaaaa", "bbbbbbbb"], greedy(9))
    assert sum(r.num_preemptions for r in engine.requests.values()) == 1
    engine.step()
    assert engine.executor.rows == {}


# -- refusals and failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", [], [257], [-1], [1, 300]])
def test_bad_prompts_are_refused(prompt: str | list[int]) -> None:
    engine = ToyEngine()
    with pytest.raises(InvalidParameterError, match="prompt"):
        engine.add_request(prompt)
    assert not engine.has_unfinished_requests() and engine.requests == {}


def test_a_prompt_that_cannot_fit_is_refused_and_takes_its_batch_with_it() -> None:
    engine = ToyEngine(num_blocks=5, block_size=4)
    with pytest.raises(PromptTooLongError, match="17 tokens"):
        engine.generate(["short", "x" * 17], greedy())
    assert not engine.has_unfinished_requests()
    assert engine.generate(["short"], greedy(3)) == ToyEngine().generate(["short"], greedy(3))


def test_a_request_that_outgrows_the_pool_is_an_error_of_its_own() -> None:
    engine = ToyEngine(num_blocks=5, block_size=4)
    with pytest.raises(RequestError, match="the whole pool has 4"):
        engine.generate(["aaaaaaaa", "bbbbbbbb"], [greedy(50), greedy(5)])
    assert [r.finish_reason for r in engine.requests.values()] == ["error", "length"]


def test_an_unknown_model_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"\['moe', 'toy'\].*'bigram'"):
        ToyEngine(model="bigram")


# -- the model is one method -----------------------------------------------------------------------------------------


class OnlyForward:
    """Any other attribute that the engine would read is an error."""

    def __init__(self, model: ToyModelProtocol) -> None:
        self.forward = model.forward

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the engine read model.{name}")


@pytest.mark.parametrize("name", sorted(TOY_MODELS))
def test_the_engine_touches_nothing_of_the_model_but_forward(name: str) -> None:
    engine = ToyEngine(model=OnlyForward(TOY_MODELS[name](0)), max_num_batched_tokens=7)
    assert engine.generate(PROMPTS, greedy()) == ToyEngine(model=name).generate(PROMPTS, greedy())


def test_the_model_sees_only_the_requests_that_sample() -> None:
    """Mid-prefill chunks reach nothing: the row is the newest token and its position."""
    calls: list[tuple[list[int], list[int]]] = []

    class Recording(ToyModel):
        def forward(self, last_tokens: Sequence[int], positions: Sequence[int]) -> Logits:
            calls.append((list(last_tokens), list(positions)))
            return super().forward(last_tokens, positions)

    engine = ToyEngine(model=Recording(), max_num_batched_tokens=8)
    engine.generate(["hello world", "goodbye"], greedy(2))
    assert [positions for _, positions in calls] == [[10], [11, 6], [7]]
    assert calls[0][0] == [ord("d")] and calls[1][0][1] == ord("e")


def test_another_model_is_one_row_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    class Repeater:
        def __init__(self, seed: int) -> None:
            pass

        def forward(self, last_tokens: Sequence[int], positions: Sequence[int]) -> Logits:
            logits = np.zeros((len(last_tokens), VOCAB_SIZE))
            logits[np.arange(len(last_tokens)), list(last_tokens)] = 1.0
            return logits

    monkeypatch.setitem(TOY_MODELS, "repeater", Repeater)
    assert ToyEngine(model="repeater").generate(["a", "xyz"], greedy(4)) == ["aaaa", "zzzz"]


def test_a_model_can_be_swapped_in_a_living_engine() -> None:
    engine = ToyEngine()
    before = engine.generate(["hello"], greedy())
    engine.model = TOY_MODELS["moe"](0)
    after = engine.generate(["hello"], greedy())
    assert before != after == ToyEngine(model="moe").generate(["hello"], greedy())


def test_a_sampler_can_be_swapped_too() -> None:
    class AlwaysZ(Sampler):
        def sample(self, logits: Any, params: SamplingParams) -> int:
            return ord("z")

    engine = ToyEngine()
    engine.sampler = AlwaysZ()
    assert engine.generate(["hello"], greedy(3)) == ["zzz"]


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: np.vstack([x, x[:1]]), lambda x: x[:, :-1], np.ravel])
def test_logits_of_the_wrong_shape_fail_loudly(change: Callable[[Logits], Logits], quiet: None) -> None:
    class Wrong(ToyModel):
        def forward(self, last_tokens: Sequence[int], positions: Sequence[int]) -> Logits:
            return change(super().forward(last_tokens, positions))

    with pytest.raises(RequestError, match=r"model\.forward returned logits .*, expected \(2, 257\)"):
        ToyEngine(model=Wrong()).generate(["hello", "world"], greedy())


@pytest.mark.parametrize("poison", [np.nan, -np.inf, np.inf])
def test_a_row_without_a_finite_best_logit_fails_alone(poison: float) -> None:
    class Poisoned(ToyModel):
        def forward(self, last_tokens: Sequence[int], positions: Sequence[int]) -> Logits:
            logits = super().forward(last_tokens, positions)
            logits[[t == ord("!") for t in last_tokens]] = poison
            return logits

    engine = ToyEngine(model=Poisoned())
    with pytest.raises(RequestError, match="no token can be chosen"):
        engine.generate(["hello", "hello!"], greedy())
    good, bad = engine.requests.values()
    assert (good.finish_reason, bad.finish_reason) == ("length", "error")
    assert good.output_token_ids == by_hand(ToyModel(0), "hello", 8)


# -- driven by hand --------------------------------------------------------------------------------------------------


def engine_step(scheduler: Scheduler, model: ToyModelProtocol, sampler: Sampler) -> list[Request]:
    """One step in four lines a reader can follow: schedule, forward, sample, update."""
    plan = scheduler.schedule()
    requests = [scheduler.requests[rid] for rid in plan.num_scheduled_tokens]
    rows = [r for r in requests if Scheduler.needs_sample(r)]
    result = ModelRunnerOutput()
    if rows:
        logits = model.forward([r.all_token_ids[-1] for r in rows], [r.num_tokens - 1 for r in rows])
        result.req_ids = [r.request_id for r in rows]
        result.sampled_token_ids = [
            [sampler.sample(row, r.sampling_params)] for row, r in zip(logits, rows, strict=True)
        ]
    scheduler.update_from_output(plan, result)
    return [r for r in requests if r.is_finished]


@pytest.mark.parametrize("knobs", [{}, {"max_num_batched_tokens": 5}, {"num_blocks": 12, "block_size": 4}])
def test_a_step_written_by_hand_equals_the_engine(knobs: dict[str, Any]) -> None:
    engine = ToyEngine(**knobs)
    ids = [engine.add_request(prompt, greedy()) for prompt in PROMPTS]
    finished: list[Request] = []
    while engine.scheduler.has_unfinished_requests():
        finished += engine_step(engine.scheduler, engine.model, engine.sampler)
    assert engine_step(engine.scheduler, engine.model, engine.sampler) == []
    assert sorted(r.request_id for r in finished) == sorted(ids)
    texts = [engine.tokenizer.decode(engine.requests[rid].output_token_ids) for rid in ids]
    assert texts == ToyEngine().generate(PROMPTS, greedy())


def test_the_scheduler_can_be_wrapped_by_a_probe() -> None:
    engine = ToyEngine(max_num_batched_tokens=8)
    seen: list[dict[str, int]] = []
    schedule = engine.scheduler.schedule

    def probe() -> SchedulerOutput:
        plan = schedule()
        seen.append(dict(plan.num_scheduled_tokens))
        return plan

    engine.scheduler.schedule = probe  # type: ignore[method-assign]
    engine.generate(["hello world", "goodbye"], greedy(4))
    assert [list(step.values()) for step in seen] == [[8], [3, 5], [1, 2], [1, 1], [1, 1], [1]]


@pytest.mark.parametrize("kwargs", [{"n": 2}, {"stop": "x"}, {"logprobs": 1}, {"min_p": 0.1}, {"bad_words": ["x"]}])
def test_parameters_that_only_the_real_engine_has_are_refused(kwargs: dict[str, Any]) -> None:
    engine = ToyEngine()
    with pytest.raises(InvalidParameterError, match=f"^{next(iter(kwargs))}: the toy engine does not have this"):
        engine.add_request("x", SamplingParams(**kwargs))
    assert not engine.has_unfinished_requests()
