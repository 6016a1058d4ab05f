"""Whatever is asked of decoding, how a request is served does not change what it gets.

Through the whole engine, text included: several samples, penalties, truncation, biases, bans, stop strings and logprobs
under chunked prefill, preemptions, prefix hits and too few places, against each request alone in a roomy engine without
prefix cache. Slots hold NaN until they are written, so that a block which a sample lacks ends in an error.
Log-probabilities are also those of transformers' model of the same checkpoint.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_vllm.core import scheduler
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import BlockIds, NewRequestData, SchedulerOutput
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.outputs import LogprobsAtPosition, RequestOutput
from mini_vllm.request import Request
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.test_llm_engine import assert_clean
from tests.integration.rig import kv_tensors, poison_unwritten_slots

HEADER = "import os\nimport sys\n\n\ndef first(items):\n    return items[0]\n\n\n"
PROMPTS = [
    HEADER + "def last(items):",
    HEADER + "class Queue:\n",
    "hello world",
    HEADER + "print(",
    HEADER,
    "東京 café",
]
SHAPES: dict[str, dict[str, Any]] = {
    "chunks": {"max_num_batched_tokens": 7},
    "small blocks and chunks": {"block_size": 1, "max_num_batched_tokens": 16, "num_gpu_blocks_override": 900},
    "preemption": {"num_gpu_blocks_override": 40, "max_model_len": 100},
    "preemption without a prefix cache": {
        "num_gpu_blocks_override": 36, "max_model_len": 100, "enable_prefix_caching": False,
    },
    "three places": {"max_num_seqs": 3},
    "all at once": {
        "num_gpu_blocks_override": 40, "max_model_len": 100, "max_num_batched_tokens": 13, "max_num_seqs": 5,
    },
}  # fmt: skip


def sampled(seed: int, **kwargs: Any) -> SamplingParams:
    return SamplingParams(**{"seed": seed, "max_tokens": 14, "ignore_eos": True, "logprobs": 2} | kwargs)


JOBS = [
    sampled(1, n=3),
    sampled(2, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.7, n=2),
    sampled(3, min_p=0.02, top_p=0.95, top_k=60, logit_bias={40: 3.0, 41: -50.0}),
    sampled(4, bad_words=["a", "e", "th"], n=2),
    sampled(5, stop=["e", "\n"], min_tokens=3, allowed_token_ids=list(range(20, 300))),
    SamplingParams(temperature=0.0, max_tokens=14, frequency_penalty=1.0, n=2, ignore_eos=True, logprobs=0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("decoding"), "llama", seed=11)


MakeEngine = Callable[..., LLMEngine]


@pytest.fixture(scope="module")
def make(folder: Path, load_once: None) -> MakeEngine:
    def make_engine(**kwargs: Any) -> LLMEngine:
        options = {"dtype": "float32", "num_threads": 1, "num_gpu_blocks_override": 200, "block_size": 4}
        options |= {"max_logprobs": -1, "disable_log_stats": True}
        engine = LLMEngine.from_engine_args(EngineArgs.from_kwargs(model=str(folder), **options | kwargs))
        core = engine.engine_core.core  # type: ignore[attr-defined]
        kv = core.scheduler.kv
        poison_unwritten_slots(kv, kv_tensors(core.executor), len(kv.block_pool.blocks))
        return engine

    return make_engine


def serve(engine: LLMEngine, jobs: Sequence[SamplingParams], prompts: Sequence[Any]) -> list[RequestOutput]:
    """Everything at once; the last output of each, in order."""
    for index, (prompt, params) in enumerate(zip(prompts, jobs, strict=True)):
        engine.add_request(f"job-{index}", prompt, params)
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        last.update((output.request_id, output) for output in engine.step())
    assert_clean(engine)
    return [last[f"job-{index}"] for index in range(len(jobs))]


def alone(make: MakeEngine, jobs: Sequence[SamplingParams], prompts: Sequence[Any]) -> list[RequestOutput]:
    engine = make(enable_prefix_caching=False)
    return [serve(engine, [params], [prompt])[0] for params, prompt in zip(jobs, prompts, strict=True)]


@pytest.fixture(scope="module")
def plain(make: MakeEngine) -> list[RequestOutput]:
    return alone(make, JOBS, PROMPTS)


def essence(outputs: Sequence[RequestOutput]) -> list[Any]:
    """What must be equal to the last bit."""
    return [
        [(c.index, c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in output.outputs] for output in outputs
    ]


# -- nothing changes a token ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_how_requests_are_served_does_not_change_what_they_get(
    make: MakeEngine, plain: list[RequestOutput], shape: str
) -> None:
    engine = make(**SHAPES[shape])
    for attempt in range(2):  # the second time with what the first left in the prefix cache
        outputs = serve(engine, JOBS, PROMPTS)
        assert essence(outputs) == essence(plain), f"attempt {attempt}"
        for output, expected in zip(outputs, plain, strict=True):
            for ours, theirs in zip(output.outputs, expected.outputs, strict=True):
                assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-3)
    if "preemption" in shape:
        assert engine.stats.num_preemptions > 0
    if SHAPES[shape].get("enable_prefix_caching", True):
        assert engine.stats.prefix_cache_hits > 0


def test_a_resumed_request_that_forgot_its_penalties_is_noticed(
    make: MakeEngine, plain: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken control of preemption."""
    original = scheduler.new_request_data

    def forgetful(request: Request, block_ids: BlockIds) -> NewRequestData:
        data = original(request, block_ids)
        if request.num_preemptions:
            neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
            data.sampling_params = dataclasses.replace(data.sampling_params, **neutral)  # type: ignore[arg-type]
            data.bad_words_token_ids = []
        return data

    monkeypatch.setattr(scheduler, "new_request_data", forgetful)
    assert essence(serve(make(**SHAPES["preemption"]), JOBS, PROMPTS)) != essence(plain)


def test_a_prompts_last_block_that_was_not_copied_is_noticed(make: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken control of forks: the children would read slots that nobody wrote."""
    original = Scheduler.schedule

    def forgetful(self: Scheduler) -> SchedulerOutput:
        plan = original(self)
        plan.block_copies = []
        return plan

    monkeypatch.setattr(Scheduler, "schedule", forgetful)
    outputs = serve(make(), JOBS, PROMPTS)
    reasons = [[completion.finish_reason for completion in output.outputs] for output in outputs]
    assert any("error" in per_sample[1:] for per_sample in reasons)
    assert not any(per_sample[0] == "error" for per_sample in reasons), "the first sample needs no copy"


def test_samples_that_all_draw_from_the_parents_stream_are_noticed(
    make: MakeEngine, plain: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken control of `n`: a child that draws with the index of its parent."""
    original = scheduler.new_request_data

    def same_stream(request: Request, block_ids: BlockIds) -> NewRequestData:
        data = original(request, block_ids)
        data.sample_index = 0
        return data

    monkeypatch.setattr(scheduler, "new_request_data", same_stream)
    assert essence(serve(make(), JOBS, PROMPTS)) != essence(plain)


def test_seeds_make_streams(make: MakeEngine, plain: list[RequestOutput]) -> None:
    engine = make()
    prompts = [PROMPTS[0]] * 12
    outputs = serve(engine, [sampled(seed, n=2) for seed in range(10)] + [sampled(0, n=2)] * 2, prompts)
    streams = [tuple(c.token_ids) for output in outputs for c in output.outputs]
    assert len(set(streams[:20])) == 20, "ten seeds with two samples each: twenty streams"
    assert streams[20:22] == streams[22:24] == streams[:2], "the same seed, the same streams"
    (one,) = serve(engine, [sampled(1)], [PROMPTS[0]])
    assert one.outputs[0].token_ids == outputs[1].outputs[0].token_ids, "the first sample is that of n=1"
    greedy = plain[-1].outputs
    assert greedy[0].token_ids == greedy[1].token_ids, "greedy samples are equal"


def test_what_was_asked_was_done(make: MakeEngine, plain: list[RequestOutput]) -> None:
    """The plain run itself: otherwise everything above could hold with parameters that do nothing."""
    tokenizer = make().get_tokenizer()
    banned = {i for i in range(384) if tokenizer.decode([i]).strip() in ("a", "e", "th")}
    assert banned and not any(banned.intersection(completion.token_ids) for completion in plain[3].outputs)
    assert not any(41 in completion.token_ids for completion in plain[2].outputs)
    (stopped,) = plain[4].outputs
    assert all(20 <= token_id < 300 for token_id in stopped.token_ids)
    assert stopped.finish_reason == "length" or (stopped.stop_reason in ("e", "\n") and len(stopped.token_ids) > 3)
    without = alone(make, [sampled(2, n=2)], [PROMPTS[1]])
    assert essence(without) != essence(plain[1:2]), "penalties change tokens"


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_streams_add_up_to_the_same(make: MakeEngine, plain: list[RequestOutput], kind: RequestOutputKind) -> None:
    engine = make(**SHAPES["all at once"])
    for index, (prompt, params) in enumerate(zip(PROMPTS, JOBS, strict=True)):
        engine.add_request(str(index), prompt, dataclasses.replace(params, output_kind=kind))
    texts = [["" for _ in output.outputs] for output in plain]
    ids: list[list[list[int]]] = [[[] for _ in output.outputs] for output in plain]
    while engine.has_unfinished_requests():
        for output in engine.step():
            for completion in output.outputs:
                at = int(output.request_id)
                old = completion.index
                texts[at][old] = (texts[at][old] if kind is RequestOutputKind.DELTA else "") + completion.text
                ids[at][old] = (ids[at][old] if kind is RequestOutputKind.DELTA else []) + completion.token_ids
    assert texts == [[c.text for c in output.outputs] for output in plain]
    assert ids == [[c.token_ids for c in output.outputs] for output in plain]


# -- what is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
def test_n_samples_compute_the_prompt_once_and_count_it_once(make: MakeEngine, caching: bool) -> None:
    engine = make(enable_prefix_caching=caching)
    (output,) = serve(engine, [sampled(1, n=5)], [PROMPTS[0]])
    scheduled = sum(record.total_num_scheduled_tokens for record in engine.step_records())
    assert scheduled == len(output.prompt_token_ids) + 5 * (14 - 1)
    assert engine.output_processor.num_prompt_tokens == len(output.prompt_token_ids)
    assert engine.output_processor.num_generation_tokens == 5 * 14
    assert [completion.index for completion in output.outputs] == list(range(5))


# -- logprobs are transformers' -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Callable[[list[int]], torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logprobs(ids: list[int]) -> torch.Tensor:
        """[len(ids), vocab]: row i is what the model expects after ids[: i + 1]."""
        with torch.no_grad():
            result: torch.Tensor = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        return result

    return logprobs


def assert_position(position: LogprobsAtPosition, own: int, row: torch.Tensor, k: int) -> None:
    """`position` is what `row` says of its own token and of the k likeliest."""
    top = row.topk(k)
    ids = list(position)
    assert ids[0] == own and set(ids) == {own, *top.indices.tolist()}
    for token_id, entry in position.items():
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=2e-4)
        assert entry.rank == int((row >= row[token_id]).sum()), "ranks count those at least as likely"


@pytest.mark.parametrize("budget", [3, 16, 2048])
@pytest.mark.parametrize("num_blocks", [200, 40])
def test_prompt_logprobs_are_transformers_however_the_prompt_is_cut(
    make: MakeEngine, oracle: Callable[[list[int]], torch.Tensor], budget: int, num_blocks: int
) -> None:
    """Also with what earlier requests left in the prefix cache, beside other requests, and when preempted."""
    engine = make(max_num_batched_tokens=budget, num_gpu_blocks_override=num_blocks, max_model_len=100)
    serve(engine, [sampled(0)] * len(PROMPTS), PROMPTS)
    jobs = [sampled(index, prompt_logprobs=3, n=1 + index % 2) for index in range(len(PROMPTS))]
    for output in serve(engine, jobs, PROMPTS):
        prompt, given = output.prompt_token_ids, output.prompt_logprobs
        assert given is not None and len(given) == len(prompt) and given[0] is None
        rows = oracle(prompt)
        for index in range(1, len(prompt)):
            position = given[index]
            assert position is not None
            assert_position(position, prompt[index], rows[index - 1], 3)


def test_logprobs_of_sampled_tokens_are_transformers_and_raw(
    make: MakeEngine, oracle: Callable[[list[int]], torch.Tensor]
) -> None:
    """Raw: neither temperature nor penalties nor bans show in them."""
    jobs = [
        sampled(1, n=2, logprobs=4, temperature=0.5),
        sampled(2, logprobs=0, repetition_penalty=2.0, top_k=3),
        sampled(3, logprobs=2, bad_words=["a"], logit_bias={50: 20.0}),
    ]
    for output, job in zip(serve(make(**SHAPES["all at once"]), jobs, PROMPTS[:3]), jobs, strict=True):
        for completion in output.outputs:
            rows = oracle([*output.prompt_token_ids, *completion.token_ids])[len(output.prompt_token_ids) - 1 :]
            assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
            for position, token_id, row in zip(completion.logprobs, completion.token_ids, rows, strict=False):
                assert_position(position, token_id, row, job.logprobs or 0)
            chosen = [float(row[i]) for row, i in zip(rows, completion.token_ids, strict=False)]
            assert completion.cumulative_logprob == pytest.approx(sum(chosen), abs=2e-3)


def test_all_logprobs_of_a_position_sum_to_one(make: MakeEngine) -> None:
    (output,) = serve(make(), [sampled(1, logprobs=-1, max_tokens=3)], ["hello"])
    for position in output.outputs[0].logprobs or ():
        assert len(position) == 384
        total = torch.tensor([entry.logprob for entry in position.values()]).exp().sum()
        assert float(total) == pytest.approx(1.0, abs=1e-4)


def test_tokens_asked_for_by_id_are_reported(make: MakeEngine, oracle: Callable[[list[int]], torch.Tensor]) -> None:
    (output,) = serve(make(), [sampled(1, logprobs=None, logprob_token_ids=[7, 300])], ["hello"])
    (completion,) = output.outputs
    rows = oracle([*output.prompt_token_ids, *completion.token_ids])[len(output.prompt_token_ids) - 1 :]
    for position, token_id, row in zip(completion.logprobs or (), completion.token_ids, rows, strict=False):
        assert next(iter(position)) == token_id and set(position) == {token_id, 7, 300}
        for other in (7, 300):
            assert position[other].logprob == pytest.approx(float(row[other]), abs=2e-4)
