"""The master invariant with a step planned while another computes: the tokens are those of the synchronous engine.

The cases are those of `test_master_invariant`, run against engines with `async_scheduling`; the references come of
synchronous ones. Then the same for what those cases leave out: every option of sampling, children, ends by end of
sequence and by stop strings, log-probabilities. Last, each thing that the overlap rests on is broken.
"""

import random
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from mini_vllm.core.scheduler_output import EngineCoreOutput, SchedulerOutput
from mini_vllm.engine.core import EngineCore
from mini_vllm.request import Request
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.worker.input_batch import InputBatch
from tests.checkpoints import make_checkpoint
from tests.integration import test_master_invariant as master
from tests.integration.rig import VOCAB_SIZE, Rig, run, tokens
from tests.integration.test_master_invariant import (  # noqa: F401  (collected here, with this module's rig)
    JOBS,
    alone,
    test_a_cold_and_a_warm_prefix_cache_give_the_same_tokens,
    test_a_pool_that_forces_preemptions_gives_the_same_tokens,
    test_a_prefix_cache_that_evicts_all_the_time_gives_the_same_tokens,
    test_an_abort_of_neighbours_gives_the_same_tokens,
    test_any_neighbours_give_the_same_tokens,
    test_any_order_of_arrival_gives_the_same_tokens,
    test_any_physical_placement_gives_the_same_tokens,
    test_any_prefill_threshold_gives_the_same_tokens,
    test_any_token_budget_gives_the_same_tokens,
    test_whoever_goes_first_and_whoever_gives_way_the_tokens_are_the_same,
    tight_pool,
)

MAX_STEPS = 3000


@pytest.fixture(scope="module")
def plain_rig(tmp_path_factory: pytest.TempPathFactory, load_once: None) -> Rig:
    folder = tmp_path_factory.mktemp("llama")
    return Rig(make_checkpoint(folder, "llama", seed=3, tokenizer=False, vocab_size=VOCAB_SIZE))


@pytest.fixture(scope="module")
def rig(plain_rig: Rig) -> Rig:
    return Rig(plain_rig.folder, async_scheduling=True)


@pytest.fixture(scope="module")
def reference(plain_rig: Rig) -> list[list[int]]:
    return alone(plain_rig)


@settings(max_examples=15)
@master.COMBINATION
def test_any_combination_gives_the_same_tokens(rig: Rig, reference: list[list[int]], **case: Any) -> None:
    master.check_combination(rig, reference, **case)


# --- everything a request may ask -------------------------------------------------------------------------------


def wishes() -> list[SamplingParams]:
    """One of each thing that looks at the tokens before it, or that may end a request."""
    seeded: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 14}
    plain: dict[str, Any] = {"temperature": 0.0, "max_tokens": 14}
    return [
        SamplingParams(**plain, repetition_penalty=1.4),
        SamplingParams(**seeded, presence_penalty=0.8, frequency_penalty=0.5),
        SamplingParams(**seeded, min_p=0.02, top_k=40, top_p=0.95, logprobs=3),
        SamplingParams(**plain, min_tokens=6, stop_token_ids=tuple(range(3, 60))),
        SamplingParams(**plain, stop_token_ids=tuple(range(3, 20))),
        SamplingParams(**seeded, logit_bias={7: 4.0, 9: 3.5}),
        SamplingParams(**plain, allowed_token_ids=list(range(10, 30))),
        SamplingParams(**plain, prompt_logprobs=2, logprobs=2),
        SamplingParams(**seeded, n=3),
        SamplingParams(temperature=0.7, seed=8, max_tokens=9, n=4, logprobs=1),
        SamplingParams(**plain, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=1, max_tokens=1),
    ]


def request_of(number: int, params: SamplingParams, prompt: tuple[int, ...]) -> Request:
    return Request(
        str(number),
        prompt,
        params,
        eos_token_id=60 + number % 5,
        max_model_len=100,
        child_ids=[f"{number}.{child}" for child in range(1, params.n)],
        bad_words_token_ids=[[11], [12, 13]] if number % 3 == 0 else [],
    )


def all_news(engine: EngineCore, seed: int = 2, *, doomed: bool = False) -> dict[str, list[Any]]:
    """Everything said of each sequence: tokens, log-probabilities, why it ended. Requests come one by one."""
    rng = random.Random(seed)
    shared = tokens(rng, 24)
    waiting = [
        request_of(number, params, shared[: rng.randrange(25)] + tokens(rng, rng.randrange(1, 30)))
        for number, params in enumerate(wishes() + wishes())
    ]
    said: dict[str, list[Any]] = {}
    for step in range(MAX_STEPS):
        if not waiting and not engine.has_work():
            engine.scheduler.check_integrity()
            assert engine.scheduler.kv.usage == 0, "blocks leaked"
            return said
        if waiting and step % 2 == 0:
            engine.add_request(waiting.pop(0))
        if doomed and step % 5 == 4 and engine.scheduler.requests:
            engine.abort_requests([rng.choice(sorted(engine.scheduler.requests))])
        for news in engine.step().outputs:
            note(said.setdefault(news.request_id, [[], [], [], None, None]), news)
        engine.scheduler.check_integrity()
    raise AssertionError("the engine makes no progress")


def note(entry: list[Any], news: EngineCoreOutput) -> None:
    entry[0] += news.new_token_ids
    entry[1] += news.logprobs or []
    if news.prompt_logprobs is not None:
        entry[2] = [*entry[2][: news.prompt_logprobs.start - 1], *news.prompt_logprobs.positions]
    entry[3], entry[4] = news.finish_reason, (news.stop_reason, news.error)


def exact(said: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Everything but the numbers of log-probabilities: tokens, whose they are and in which order, ends."""
    return {
        name: [entry[0], *[[(p.token_ids[:1], p.rank) for p in positions] for positions in entry[1:3]], *entry[3:]]
        for name, entry in said.items()
    }


def numbers(said: dict[str, list[Any]]) -> list[float]:
    """The log-probabilities of the tokens. Their last digits depend on how many rows a product has, and a step may have
    a neighbour more or fewer, in a synchronous engine, too."""
    return [p.logprobs[0] for name in sorted(said) for part in said[name][1:3] for p in part]


SHAPES: list[dict[str, Any]] = [
    {},
    {"budget": 24, "max_num_seqs": 5},
    {"block_size": 8, "num_blocks": 24, "budget": 40},
    {"block_size": 4, "num_blocks": 40, "budget": 30, "policy": "fair", "preemption_policy": "least-work"},
    {"block_size": 1, "num_blocks": 150, "policy": "priority"},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_wish_gets_the_same_tokens_logprobs_and_end(plain_rig: Rig, rig: Rig, shape: dict[str, Any]) -> None:
    expected = all_news(plain_rig.engine(num_blocks=400))
    reasons = {entry[3] for entry in expected.values()}
    assert reasons == {"stop", "length"} and len(expected) == 24 + 2 * 5
    said = all_news(rig.engine(**shape))
    assert exact(said) == exact(expected)
    assert numbers(said) == pytest.approx(numbers(expected), abs=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_aborts_in_any_state_leak_nothing_and_change_nobody(plain_rig: Rig, rig: Rig, shape: dict[str, Any]) -> None:
    expected = all_news(plain_rig.engine(num_blocks=400))
    survivors = 0
    for name, entry in all_news(rig.engine(**shape), doomed=True).items():
        assert entry[0] == expected[name][0][: len(entry[0])]
        if entry[3] is not None:
            assert exact({name: entry}) == exact({name: expected[name]})
            survivors += 1
    assert survivors > 3


def test_the_steps_really_overlap(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made by one thread while the other is in the model, and all plans are run by that one."""
    engine = rig.engine()
    running, overlapped, threads = threading.Event(), [], set()
    execute, schedule = engine.executor.execute_model, engine.scheduler.schedule

    def slowly(plan: SchedulerOutput) -> Any:
        threads.add(threading.current_thread().name)
        running.set()
        time.sleep(0.002)
        result = execute(plan)
        running.clear()
        return result

    def watched() -> SchedulerOutput:
        overlapped.append(running.is_set())
        return schedule()

    monkeypatch.setattr(engine.executor, "execute_model", slowly)
    monkeypatch.setattr(engine.scheduler, "schedule", watched)
    run(engine, JOBS)
    assert sum(overlapped) > 5 and len(threads) == 1


def test_a_request_is_never_scheduled_past_its_limit(rig: Rig) -> None:
    engine = rig.engine()
    planned = 0
    for job in JOBS:
        engine.add_request(Request(str(id(job)), job.prompt, job.params, max_model_len=128))
    while engine.has_work():
        planned += engine.step().stats.num_scheduled_tokens
    cached = engine.scheduler.kv.prefix_cache_hits
    assert planned + cached == sum(len(job.prompt) + (job.params.max_tokens or 0) - 1 for job in JOBS)


# --- broken controls ------------------------------------------------------------------------------------------


def different(rig: Rig, plain_rig: Rig, shape: dict[str, Any] | None = None) -> bool:
    expected = all_news(plain_rig.engine(num_blocks=400))
    try:
        return exact(all_news(rig.engine(**(shape or {})))) != exact(expected)
    except (AssertionError, RuntimeError, KeyError, ValueError):
        return True


def test_the_check_sees_a_stale_token(rig: Rig, plain_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fed into a step is the token of the step before the last."""
    expected = all_news(plain_rig.engine(num_blocks=400))
    append = InputBatch.append_sampled

    def stale(self: InputBatch, rows: Any, token_ids: Any) -> None:
        before = self.token_ids[self.row_numbers(rows), np.maximum(self.num_tokens[rows] - 1, 0)]
        append(self, rows, before.astype(np.int64))

    monkeypatch.setattr(InputBatch, "append_sampled", stale)
    assert exact(all_news(rig.engine(num_blocks=400))) != exact(expected)


def test_the_check_sees_a_plan_made_before_children_part(
    rig: Rig, plain_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineCore, "_may_plan_ahead", lambda self, plan: self.scheduler.may_plan_ahead())
    assert different(rig, plain_rig)


def test_the_check_sees_tokens_under_way_that_count_for_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "ends_with_placeholders", lambda self: False)
    with pytest.raises(AssertionError):
        test_a_request_is_never_scheduled_past_its_limit(rig)
