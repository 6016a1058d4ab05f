"""Claims about beam search: transformers' sequences and scores, and what it costs. transformers is the oracle."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_vllm import LLM
from mini_vllm.engine.beam_search import PromptSearch, num_continuations
from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.outputs import BeamSearchOutput, Logprob
from mini_vllm.sampling_params import BeamSearchParams
from tests.checkpoints import make_checkpoint
from tests.engine.test_llm_engine import assert_clean

WIDTHS = [2, 3, 5]
PENALTIES = [0.0, 0.5, 1.0, 2.0, -1.0]
SMALL_VOCAB = 24
PROMPT = [3, 7, 1, 9]
Ranked = list[tuple[list[int], float]]
"""Output tokens (the end of sequence included) and score of each hypothesis, best first."""


def theirs(
    model: Any, prompt: list[int], width: int, penalty: float, eos: list[int], max_tokens: int, **kwargs: Any
) -> Ranked:
    """`generate(num_beams=...)` of transformers."""
    with torch.no_grad():
        result = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            num_beams=width, num_return_sequences=width, length_penalty=penalty, eos_token_id=eos or None,
            pad_token_id=0, max_new_tokens=max_tokens, return_dict_in_generate=True, output_scores=True,
            **{"early_stopping": False} | kwargs,
        )  # fmt: skip
    rows = [trimmed(row[len(prompt) :], eos, max_tokens) for row in result.sequences.tolist()]
    return list(zip(rows, result.sequences_scores.tolist(), strict=True))


def trimmed(row: list[int], eos: list[int], max_tokens: int) -> list[int]:
    end = next((i + 1 for i, token_id in enumerate(row) if token_id in eos), max_tokens)
    return row[:end]


def assert_same(ours: Ranked, expected: Ranked) -> None:
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in expected]
    assert [score for _, score in ours] == pytest.approx([score for _, score in expected], rel=1e-5, abs=2e-5)


# -- the search by itself, over transformers' own log-probabilities ------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1, 2])
def small_model(request: pytest.FixtureRequest) -> Any:
    """A vocabulary so small that sequences end by themselves, early and late."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(request.param)
    config = LlamaConfig(
        vocab_size=SMALL_VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.6,
    )  # fmt: skip
    return LlamaForCausalLM(config).float().eval()


def search(model: Any, width: int, penalty: float, eos: list[int], max_tokens: int) -> Ranked:
    params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, length_penalty=penalty)
    search = PromptSearch(params, max_tokens, frozenset(eos))
    while search.beams:
        rows = torch.tensor([[*PROMPT, *beam.tokens] for beam in search.beams])
        with torch.no_grad():
            logprobs = model(rows).logits[:, -1].log_softmax(dim=-1)
        top = logprobs.topk(min(num_continuations(width, len(eos)), SMALL_VOCAB))
        search.advance(
            [
                {i: Logprob(value) for i, value in zip(ids, values, strict=True)}
                for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
        )
    return [(list(beam.tokens), beam.score(penalty)) for beam in search.hypotheses]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("eos", [[], [2], [2, 11, 5]])
def test_the_search_ranks_as_transformers_does(small_model: Any, width: int, penalty: float, eos: list[int]) -> None:
    assert_same(search(small_model, width, penalty, eos, 12), theirs(small_model, PROMPT, width, penalty, eos, 12))


def test_another_length_penalty_or_stopping_rule_is_noticed(small_model: Any) -> None:
    """Broken control: penalties do change the order, and so does stopping at the first full set of hypotheses."""
    ours = search(small_model, 4, 0.0, [2, 11, 5], 12)
    differing = sum(
        theirs(small_model, PROMPT, 4, penalty, [2, 11, 5], 12)[0][0] != ours[0][0] for penalty in (-2.0, 3.0)
    )
    scores = [score for _, score in theirs(small_model, PROMPT, 4, 3.0, [2, 11, 5], 12)]
    assert differing or scores != pytest.approx([score for _, score in ours], abs=2e-5)


def test_wider_beams_may_score_worse() -> None:
    """A Markov chain in which the second beam crowds out the path that one beam would have found."""
    rows = [[0.48, 0.50, 0.01, 0.01], [0.30, 0.29, 0.05, 0.36], [0.01, 0.55, 0.15, 0.29], [0.02, 0.08, 0.08, 0.82]]

    def best(width: int) -> float:
        params = BeamSearchParams(beam_width=width, max_tokens=4, length_penalty=0.0)
        search = PromptSearch(params, 4, frozenset())
        while search.beams:
            states = [beam.tokens[-1] if beam.tokens else 0 for beam in search.beams]
            search.advance([{i: Logprob(math.log(p)) for i, p in enumerate(rows[state])} for state in states])
        return math.exp(search.hypotheses[0].cum_logprob)

    assert best(1) == pytest.approx(0.1210, abs=1e-4) and best(2) == pytest.approx(0.0553, abs=1e-4)


# -- through the engine --------------------------------------------------------------------------------------------

EOS = [2, 40, 41, 42, 43, 44]
PROMPTS = ["hello world", "def add(a, b):\n    return", "東京 naïve café"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("beams"), "llama", seed=5, generation_config={"eos_token_id": EOS})


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), dtype="float32", num_threads=1, num_gpu_blocks_override=200, block_size=4, max_logprobs=-1)


def ranked(llm: LLM, output: BeamSearchOutput, prompt: str) -> Ranked:
    length = len(llm.get_tokenizer().encode(prompt))
    return [(sequence.tokens[length:], sequence.score) for sequence in output.sequences]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [2, 3, 5])
def test_beams_of_several_prompts_equal_transformers(llm: LLM, oracle: Any, width: int, penalty: float) -> None:
    params = BeamSearchParams(beam_width=width, max_tokens=10, length_penalty=penalty, include_stop_str_in_output=True)
    outputs = llm.beam_search(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = llm.get_tokenizer().encode(prompt)
        assert_same(ranked(llm, output, prompt), theirs(oracle, ids, width, penalty, EOS, 10))
    assert_clean(llm.llm_engine)


def test_one_beam_is_greedy(llm: LLM) -> None:
    from mini_vllm import SamplingParams

    (beams,) = llm.beam_search(PROMPTS[0], BeamSearchParams(beam_width=1, max_tokens=8, ignore_eos=True))
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    (output,) = llm.generate(PROMPTS[0], greedy, use_tqdm=False)
    assert ranked(llm, beams, PROMPTS[0])[0][0] == output.outputs[0].token_ids
    assert beams.sequences[0].cum_logprob == pytest.approx(output.outputs[0].cumulative_logprob, abs=1e-4)


def test_fields_say_how_a_hypothesis_came_about(llm: LLM) -> None:
    (output,) = llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=4, max_tokens=8))
    (kept,) = llm.beam_search(
        [PROMPTS[0]], BeamSearchParams(beam_width=4, max_tokens=8, include_stop_str_in_output=True)
    )
    ids = llm.get_tokenizer().encode(PROMPTS[0])
    assert len(output.sequences) == 4
    for sequence, whole in zip(output.sequences, kept.sequences, strict=True):
        generated = whole.tokens[len(ids) :]
        assert whole.tokens[: len(ids)] == ids and sequence.text == llm.get_tokenizer().decode(sequence.tokens)
        chosen = [position[token_id].logprob for position, token_id in zip(whole.logprobs, generated, strict=True)]
        assert whole.cum_logprob == pytest.approx(sum(chosen)) and whole.score == pytest.approx(
            sum(chosen) / len(generated)
        )
        if whole.finish_reason == "stop":
            assert whole.stop_reason in EOS and sequence.tokens == whole.tokens[:-1]
        else:
            assert whole.finish_reason == "length" and sequence.tokens == whole.tokens and len(generated) == 8


def test_a_beam_computes_less_than_a_block_a_step(llm: LLM) -> None:
    """Each beam's full blocks are found in the prefix cache, those it shares with others included."""
    engine, block_size, width, length = llm.llm_engine, 4, 3, 12
    llm.reset_prefix_cache()
    first = engine.stats.step_id
    prompt = [5 + i % 30 for i in range(40)]
    llm.beam_search(
        {"prompt_token_ids": prompt}, BeamSearchParams(beam_width=width, max_tokens=length, ignore_eos=True)
    )
    records = [record for record in engine.step_records() if record.step_id > first and record.num_scheduled_tokens]
    assert len(records) == length
    assert records[0].total_num_scheduled_tokens == len(prompt)
    for record in records[1:]:
        assert len(record.num_scheduled_tokens) == width
        assert max(record.num_scheduled_tokens.values()) <= block_size


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"beam_width": 0}, "beam_width: must be at least 1"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1"),
        ({"length_penalty": math.inf}, "length_penalty: must be a finite number"),
        ({"temperature": 0.5}, "temperature: must be 0: beams are not sampled"),
        ({"ignore_eos": 1}, "ignore_eos: must be a bool"),
    ],
)
def test_bad_parameters_are_refused_by_field(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"^{says}"):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4} | kwargs)


def test_a_width_beyond_the_engines_logprobs_is_refused(llama: Path) -> None:
    narrow = LLM(str(llama), dtype="float32", num_threads=1, num_gpu_blocks_override=20)
    with pytest.raises(InvalidParameterError, match=r"^beam_width: 11 beams look at 22 logprobs each, .* at most 20"):
        narrow.beam_search("x", BeamSearchParams(beam_width=11, max_tokens=4))
    with pytest.raises(InvalidParameterError, match="^params: must be BeamSearchParams"):
        narrow.beam_search("x", None)  # type: ignore[arg-type]
    assert_clean(narrow.llm_engine)


def test_nothing_stays_behind_when_a_step_is_interrupted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(plan: Any) -> Any:
        raise KeyboardInterrupt

    core = llm.llm_engine.engine_core.core  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(core.executor, "execute_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.beam_search(PROMPTS, BeamSearchParams(beam_width=2, max_tokens=4))
    assert_clean(llm.llm_engine)
