"""Claims about what is refused before the core, and what a request that passes looks like."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mini_vllm.engine.input_processor import InputProcessor, sampling_params_of
from mini_vllm.exceptions import CheckpointError, InvalidParameterError, PromptTooLongError
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.text.tokenizer import Tokenizer

MAX_MODEL_LEN = 32
VOCAB_SIZE = 400


@pytest.fixture
def processor(llama: Path) -> InputProcessor:
    tokenizer = Tokenizer.from_folder(llama)
    return InputProcessor(
        tokenizer, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, eos_token_ids=(2, 7, 9), clock=lambda: 12.5
    )


@pytest.mark.parametrize(
    ("prompt", "field", "says"),
    [
        ([], "prompt", "at least one token"),
        ({"prompt_token_ids": []}, "prompt", "at least one token"),
        ([5, VOCAB_SIZE], "prompt_token_ids", f"token id {VOCAB_SIZE} at position 1 .* ids 0 to {VOCAB_SIZE - 1}"),
        ([5, 6, -1], "prompt_token_ids", "token id -1 at position 2"),
        ([1, 2.5], "prompt", "must be integers, got 2.5 at position 1"),
        ([1, True], "prompt", "must be integers, got True"),
        ([1, "x"], "prompt", "must be integers, got 'x'"),
        ([1, None], "prompt", "must be integers, got None"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids", "list of token ids, got str"),
        ({"prompt": [1, 2]}, "prompt", "must be text, got list"),
        ({}, "prompt", "needs 'prompt' or 'prompt_token_ids'"),
        ({"text": "x"}, "prompt", "unknown keys text; a prompt dict has cache_salt, prompt, prompt_token_ids"),
        ({"prompt": "x", "multi_modal_data": {}}, "prompt", "unknown keys multi_modal_data"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt", "not empty"),
        ({"prompt": "x", "cache_salt": 3}, "cache_salt", "must be a string"),
        (7, "prompt", "got int"),
        (None, "prompt", "got NoneType"),
        (b"bytes", "prompt", "got bytes"),
        ("half a pair \ud800", "prompt", "no valid Unicode"),
    ],
)
def test_bad_prompts_are_refused_by_field(processor: InputProcessor, prompt: Any, field: str, says: str) -> None:
    with pytest.raises(InvalidParameterError, match=says) as caught:
        processor.tokenize([prompt])
    assert caught.value.field == field


def test_an_empty_text_is_refused_unless_the_tokenizer_frames_it(llama: Path, qwen2: Path) -> None:
    def tokenize(folder: Path) -> list[int]:
        tokenizer = Tokenizer.from_folder(folder)
        processor = InputProcessor(tokenizer, max_model_len=32, vocab_size=448, clock=lambda: 0.0)
        return processor.tokenize([""])[0].token_ids

    assert tokenize(llama) == [1], "the BOS token is a prompt"
    with pytest.raises(InvalidParameterError, match="at least one token"):
        tokenize(qwen2)


def test_a_prompt_must_leave_room_for_one_output_token(processor: InputProcessor) -> None:
    processor.tokenize([[5] * (MAX_MODEL_LEN - 1)])
    for length in (MAX_MODEL_LEN, 10 * MAX_MODEL_LEN):
        with pytest.raises(
            PromptTooLongError, match=f"maximum context length is 32 tokens. However, .* {length} tokens"
        ):
            processor.tokenize([[5] * length])
    with pytest.raises(PromptTooLongError):
        processor.tokenize(["hello world " * 100])


def test_in_a_batch_the_bad_prompt_is_named(processor: InputProcessor) -> None:
    with pytest.raises(InvalidParameterError, match=r"^prompt_token_ids: \(prompt 2 of 3\) token id 999"):
        processor.tokenize(["fine", [1, 2], {"prompt_token_ids": [999]}])
    with pytest.raises(PromptTooLongError, match=r"^prompt: \(prompt 0 of 2\) This model's maximum"):
        processor.tokenize([[1] * 99, "x"])


def test_all_spellings_of_a_prompt_give_the_same_request(processor: InputProcessor) -> None:
    ids = processor.tokenizer.encode("hello world")
    spellings = ["hello world", {"prompt": "hello world"}, ids, tuple(ids), np.array(ids), {"prompt_token_ids": ids}]
    tokenized = processor.tokenize(spellings)
    assert [prompt.token_ids for prompt in tokenized] == [ids] * len(spellings)
    assert [prompt.text for prompt in tokenized] == ["hello world"] * 2 + [None] * 4
    assert all(type(token_id) is int for prompt in tokenized for token_id in prompt.token_ids)


def test_of_text_and_ids_the_ids_win_and_the_text_is_kept(processor: InputProcessor) -> None:
    prompt = processor.tokenize([{"prompt": "shown", "prompt_token_ids": [5, 6]}])[0]
    assert (prompt.token_ids, prompt.text) == ([5, 6], "shown")


def test_further_eos_ids_become_stop_ids_unless_eos_is_ignored(processor: InputProcessor) -> None:
    assert processor.eos_token_id == 2
    assert processor.resolve_params(SamplingParams(stop_token_ids=(4, 7))).stop_token_ids == (4, 7, 9)
    assert processor.resolve_params(SamplingParams(stop_token_ids=(4,), ignore_eos=True)).stop_token_ids == (4,)


def test_without_an_eos_in_the_tokenizer_the_models_first_is_used(processor: InputProcessor) -> None:
    tokenizer = Tokenizer(processor.tokenizer.backend)
    other = InputProcessor(tokenizer, max_model_len=8, vocab_size=400, eos_token_ids=(7, 9), clock=lambda: 0.0)
    assert other.eos_token_id == 7 and other.resolve_params(None).stop_token_ids == (9,)
    assert InputProcessor(tokenizer, max_model_len=8, vocab_size=400, clock=lambda: 0.0).eos_token_id is None


def test_a_request_carries_what_the_core_needs(processor: InputProcessor) -> None:
    prompt = processor.tokenize([{"prompt_token_ids": [5, 6], "cache_salt": "s"}])[0]
    params = processor.resolve_params(SamplingParams(max_tokens=None))
    request = processor.make_request("r", prompt, params, priority=-3)
    assert (request.request_id, request.all_token_ids, request.eos_token_id) == ("r", [5, 6], 2)
    assert (request.arrival_time, request.priority, request.cache_salt) == (12.5, -3, "s")
    assert (request.max_tokens, request.max_model_len, request.stop_ids) == (None, MAX_MODEL_LEN, {7, 9})
    assert processor.make_request("r", prompt, params, arrival_time=1.0, cache_salt="t").cache_salt == "t"


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [({"priority": "high"}, "priority"), ({"priority": True}, "priority"), ({"cache_salt": ""}, "cache_salt")],
)  # fmt: skip
def test_bad_request_options_are_refused_by_field(processor: InputProcessor, kwargs: Any, field: str) -> None:
    prompt = processor.tokenize([[5]])[0]
    with pytest.raises(InvalidParameterError) as caught:
        processor.make_request("r", prompt, SamplingParams(), **kwargs)
    assert caught.value.field == field


def test_params_of_another_type_are_refused(processor: InputProcessor) -> None:
    with pytest.raises(InvalidParameterError, match="sampling_params: must be SamplingParams, got dict"):
        processor.resolve_params({"temperature": 0})  # type: ignore[arg-type]


def test_the_generation_config_gives_the_defaults() -> None:
    params = sampling_params_of({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 99, "x": 1})
    assert params == SamplingParams(temperature=0.6, top_p=0.9, top_k=20, max_tokens=99)
    assert sampling_params_of({}) == SamplingParams()


def test_an_impossible_generation_config_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p: must be in \(0, 1\], got 7"):
        sampling_params_of({"top_p": 7})


def test_what_models_recommend_beyond_temperature_is_taken_up() -> None:
    params = sampling_params_of({"repetition_penalty": 1.1, "min_p": 0.05})
    assert (params.repetition_penalty, params.min_p) == (1.1, 0.05)


# -- what takes the model to decide ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"n": 16385}, "n: must be at most 16384, got 16385"),
        ({"logprobs": 21}, "logprobs: asks for 21 logprobs at each position, the engine allows at most 20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs: asks for 21 "),
        ({"logprobs": -1}, r"logprobs: asks for 400 logprobs \(the whole vocabulary\) .* at most 20 \(max_logprobs"),
        ({"logprob_token_ids": [400]}, "logprob_token_ids: token id 400 is out of range: .* ids 0 to 399"),
        ({"logprob_token_ids": list(range(21))}, "logprob_token_ids: asks for 21"),
        ({"allowed_token_ids": [5, 401]}, "allowed_token_ids: token id 401 is out of range"),
        ({"logit_bias": {400: 1.0}}, "logit_bias: token id 400 is out of range"),
        ({"stop_token_ids": [400]}, "stop_token_ids: token id 400 is out of range"),
    ],
)
def test_parameters_beyond_the_model_are_refused_by_field_and_limit(
    processor: InputProcessor, kwargs: Any, says: str
) -> None:
    with pytest.raises(InvalidParameterError, match=f"^{says}") as caught:
        processor.resolve_params(SamplingParams(**kwargs))
    assert caught.value.field == next(iter(kwargs))


def test_limits_themselves_are_allowed(processor: InputProcessor) -> None:
    processor.resolve_params(
        SamplingParams(logprobs=20, prompt_logprobs=20, allowed_token_ids=[0, 399], logit_bias={399: -1.0})
    )


def test_all_logprobs_are_allowed_when_the_engine_says_so(processor: InputProcessor) -> None:
    everything = InputProcessor(
        processor.tokenizer, max_model_len=32, vocab_size=VOCAB_SIZE, max_logprobs=-1, clock=lambda: 0.0
    )
    everything.resolve_params(SamplingParams(logprobs=-1, prompt_logprobs=VOCAB_SIZE))
    with pytest.raises(InvalidParameterError, match=f"at most {VOCAB_SIZE}"):
        everything.resolve_params(SamplingParams(logprobs=VOCAB_SIZE + 1))


def test_bad_words_become_the_ids_of_both_spellings() -> None:
    from mini_vllm.engine.arg_utils import DEFAULT_MODEL

    tokenizer = Tokenizer.from_folder(DEFAULT_MODEL)
    processor = InputProcessor(tokenizer, max_model_len=32, vocab_size=2048, clock=lambda: 0.0)
    sequences = processor.checker.bad_words_token_ids(SamplingParams(bad_words=["import", " self.x"]))
    texts = [tokenizer.decode(ids) for ids in sequences]
    assert texts == ["import", " import", "self.x", " self.x"] and all(sequences)
    request = processor.make_request("r", processor.tokenize(["x"])[0], SamplingParams(bad_words=["import"]))
    assert request.bad_words_token_ids == sequences[:2]


def test_a_spelling_that_contains_another_is_not_listed_twice(processor: InputProcessor) -> None:
    """With a tokenizer that writes the space as a token of its own, the word alone is enough."""
    sequences = processor.checker.bad_words_token_ids(SamplingParams(bad_words=["hello", "hello"]))
    for index, ids in enumerate(sequences):
        assert not any(ids[-len(other) :] == other for other in sequences[:index])


def test_a_request_for_n_samples_names_its_children(processor: InputProcessor) -> None:
    prompt = processor.tokenize([[5]])[0]
    assert processor.make_request("r", prompt, SamplingParams(n=3)).unborn_ids == ("1_r", "2_r")
    assert processor.make_request("r", prompt, SamplingParams()).unborn_ids == ()


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    processor: InputProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor.tokenizer, "encode_batch", None)
    for text in ("a" * 10**6, "\u4e00" * 10**6):
        with pytest.raises(
            PromptTooLongError, match=r"maximum context length is 32 tokens\. However, your prompt"
        ) as one:
            processor.tokenize([text])
        assert one.value.field == "prompt"
        with pytest.raises(PromptTooLongError, match=r"^prompt: \(prompt 1 of 2\) This"):
            processor.tokenize(["a", {"prompt": text}])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_no_text_that_fits_is_taken_for_too_long(family: str, request: pytest.FixtureRequest) -> None:
    """Not one of the longest tokens, nor one whose characters NFC puts together."""
    tokenizer = Tokenizer.from_folder(request.getfixturevalue(family))
    processor = InputProcessor(tokenizer, max_model_len=32, vocab_size=tokenizer.vocab_size, clock=lambda: 0.0)
    longest = max(range(tokenizer.vocab_size), key=lambda i: len(tokenizer.decode(i, skip_special_tokens=False)))
    for text in (tokenizer.decode([longest] * 30, skip_special_tokens=False), "o\u031b\u0301" * 9):
        processor._check_size(text)


def test_ids_win_over_a_text_of_any_length(processor: InputProcessor) -> None:
    assert processor.tokenize([{"prompt": "a" * 10**6, "prompt_token_ids": [3]}])[0].token_ids == [3]


def test_a_priority_needs_a_policy_that_looks_at_it(processor: InputProcessor) -> None:
    processor.takes_priority = False
    prompt = processor.tokenize([[3]])[0]
    assert processor.make_request("r", prompt, SamplingParams()).priority == 0
    with pytest.raises(InvalidParameterError, match="priority: needs --scheduling-policy priority, got -1"):
        processor.make_request("r", prompt, SamplingParams(), priority=-1)
