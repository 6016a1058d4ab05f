"""Claims about the offline API: transformers' tokens, vLLM's surface, and nothing left behind."""

import json
from pathlib import Path
from typing import Any

import pytest

from mini_vllm import LLM, SamplingParams
from mini_vllm.exceptions import CheckpointError, ConfigError, InvalidParameterError, PromptTooLongError
from mini_vllm.outputs import RequestOutput
from tests.engine.test_llm_engine import assert_clean

PROMPTS = ["hello world", "def add(a, b):\n    return", "東京 naïve café", "The capital of France is Paris, and"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
OPTIONS = {"dtype": "float32", "num_threads": 1, "num_gpu_blocks_override": 64, "max_num_seqs": 8}


def make(folder: Path | None, **kwargs: Any) -> LLM:
    return LLM(None if folder is None else str(folder), **OPTIONS | kwargs)


@pytest.fixture(scope="module")
def llm(llama: Path) -> LLM:
    return make(llama)


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest):
    yield
    if "llm" in request.fixturenames:
        assert_clean(request.getfixturevalue("llm").llm_engine)


def ids_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


# -- the tokens are right ---------------------------------------------------------------------------------------


def oracle(folder: Path, prompts: list[str], max_tokens: int, *, allowed: int | None = None) -> list[list[int]]:
    """transformers' greedy continuation of each prompt alone. allowed: ids from this one on are masked."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    results = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        length = ids.shape[1]
        for _ in range(max_tokens):
            with torch.no_grad():
                logits = model(ids).logits[0, -1, :allowed]
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
        results.append(ids[0, length:].tolist())
    return results


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_tokens_equal_transformers(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    outputs = make(folder).generate(PROMPTS, GREEDY, use_tqdm=False)
    expected = oracle(folder, PROMPTS, 16, allowed=384)
    assert ids_of(outputs) == expected
    assert ids_of(outputs) != expected[::-1], "broken control: the continuations differ"
    tokenizer = make(folder).get_tokenizer()
    assert [output.outputs[0].text for output in outputs] == [tokenizer.decode(ids) for ids in expected]


def test_ids_no_token_stands_behind_are_never_generated(qwen2: Path) -> None:
    params = SamplingParams(temperature=5.0, max_tokens=200, ignore_eos=True, seed=0)
    outputs = make(qwen2).generate(["hello", "world"], params, use_tqdm=False)
    assert max(map(max, ids_of(outputs))) < 384, "the model has 448 rows, the tokenizer 384 tokens"


def test_the_bundled_model_is_the_default() -> None:
    llm = LLM(num_threads=1, max_num_seqs=2)
    (output,) = llm.generate("import ", SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    assert output.outputs[0].token_ids and llm.get_tokenizer().eos_token == "<|endoftext|>"


# -- generate ---------------------------------------------------------------------------------------------------


def test_outputs_come_in_the_order_of_the_prompts_with_vllms_fields(llm: LLM) -> None:
    lengths = [9, 2, 12, 5]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == PROMPTS
    assert [len(ids) for ids in ids_of(outputs)] == lengths
    output = outputs[0]
    assert output.finished and output.prompt_token_ids == llm.get_tokenizer().encode(PROMPTS[0])
    completion = output.outputs[0]
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)


def test_all_spellings_of_a_prompt_give_the_same_tokens(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello world")
    (plain,) = ids_of(llm.generate("hello world", GREEDY, use_tqdm=False))
    for prompts in (
        ["hello world"],
        {"prompt": "hello world"},
        ids,
        [ids],
        {"prompt_token_ids": ids},
        [{"prompt_token_ids": ids}],
    ):
        assert ids_of(llm.generate(prompts, GREEDY, use_tqdm=False)) == [plain], prompts  # type: ignore[arg-type]
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_arrays_of_ids_are_prompts_of_ids(llm: LLM) -> None:
    import numpy as np

    ids = llm.get_tokenizer().encode("hello world")
    (plain,) = ids_of(llm.generate([ids], GREEDY, use_tqdm=False))
    assert ids_of(llm.generate(np.array(ids), GREEDY, use_tqdm=False)) == [plain]  # type: ignore[arg-type]
    assert ids_of(llm.generate(np.array([ids, ids]), GREEDY, use_tqdm=False)) == [plain] * 2  # type: ignore[arg-type]
    with pytest.raises(InvalidParameterError, match="token ids must be integers"):
        llm.generate([[[1, 2], [3, 4]]], GREEDY, use_tqdm=False)  # type: ignore[list-item]


def test_a_failed_call_leaves_the_requests_of_others_alone(llm: LLM) -> None:
    engine = llm.llm_engine
    taken = str(int(llm.generate("hello", GREEDY, use_tqdm=False)[0].request_id) + 2)
    engine.add_request(taken, "hello world", GREEDY)
    with pytest.raises(InvalidParameterError, match="request_id"):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert engine.output_processor.unfinished_request_ids() == [taken]
    engine.abort_request(taken)


def test_seeded_requests_repeat_and_unseeded_ones_of_a_batch_differ(llm: LLM) -> None:
    seeded = SamplingParams(temperature=2.0, max_tokens=12, seed=4, ignore_eos=True)
    first = ids_of(llm.generate(["hello"] * 2, seeded, use_tqdm=False))
    again = ids_of(llm.generate(["world", "hello"], seeded, use_tqdm=False))
    assert first[0] == first[1] == again[1]
    free = SamplingParams(temperature=2.0, max_tokens=12, ignore_eos=True)
    a, b = ids_of(llm.generate(["hello"] * 2, free, use_tqdm=False))
    assert a != b


def test_stop_ids_and_eos_end_a_request_with_their_reason(llm: LLM) -> None:
    (ids,) = ids_of(llm.generate("hello world", GREEDY, use_tqdm=False))
    stop = next(token_id for token_id in ids[3:] if token_id not in ids[:3])
    params = SamplingParams(temperature=0.0, max_tokens=16, stop_token_ids=[stop])  # type: ignore[arg-type]
    (output,) = llm.generate("hello world", params, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.token_ids == ids[: ids.index(stop) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_max_tokens_none_fills_the_context(llama: Path) -> None:
    llm = make(llama, max_model_len=40)
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    for output in llm.generate(["hello world", [5] * 39], params, use_tqdm=False):
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 40
        assert output.outputs[0].finish_reason == "length"


def test_without_params_the_generation_config_rules(llama: Path, qwen2: Path) -> None:
    llm = make(qwen2)
    expected = SamplingParams(temperature=0.5, top_p=0.8, top_k=20, max_tokens=7)
    assert llm.get_default_sampling_params() == expected
    (output,) = llm.generate("hello", use_tqdm=False)
    assert 1 <= len(output.outputs[0].token_ids) <= 7
    assert make(llama).get_default_sampling_params() == SamplingParams()
    assert make(qwen2, generation_config="vllm").get_default_sampling_params() == SamplingParams()
    engine = llm.llm_engine
    assert (engine.input_processor.eos_token_id, engine.input_processor.resolve_params(None).stop_token_ids) == (
        2,
        (5,),
    )


def test_lists_of_the_wrong_length_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidParameterError, match="sampling_params: has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    with pytest.raises(InvalidParameterError, match="priority: has 3 entries for 2 prompts"):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False, priority=[1, 2, 3])
    with pytest.raises(InvalidParameterError, match="sampling_params: must be SamplingParams, got str"):
        llm.generate(["a", "b"], "greedy", use_tqdm=False)  # type: ignore[arg-type]


def test_one_bad_prompt_of_many_is_refused_before_anything_runs(llm: LLM) -> None:
    step = llm.llm_engine.stats.step_id
    for bad in ([], [5] * 999, [10**6], 3.5, {"x": 1}):
        with pytest.raises(InvalidParameterError):
            llm.generate(["fine", bad, "fine"], GREEDY, use_tqdm=False)  # type: ignore[list-item]
        assert_clean(llm.llm_engine)
    assert llm.llm_engine.stats.step_id == step
    assert llm.generate("fine", GREEDY, use_tqdm=False)


def test_what_only_the_core_refuses_is_withdrawn_as_a_whole(llama: Path) -> None:
    llm = make(llama, num_gpu_blocks_override=7, block_size=4, max_model_len=24)
    limit = llm.llm_engine.input_processor.max_model_len
    llm.llm_engine.input_processor.max_model_len = 200  # let the over-long prompt through to the core
    with pytest.raises(PromptTooLongError, match="the whole pool has 6"):
        llm.generate([[5] * 8, [5] * 30], GREEDY, use_tqdm=False)
    assert_clean(llm.llm_engine)
    llm.llm_engine.input_processor.max_model_len = limit
    assert llm.generate([[5] * 8], GREEDY, use_tqdm=False)[0].finished


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_in_mid_generation_leaves_nothing(
    llm: LLM, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llm.llm_engine
    step, calls = engine.step, iter(range(100))

    def interrupted() -> list[RequestOutput]:
        if next(calls) == 3:
            raise error("now")
        return step()

    expected = ids_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(error):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert_clean(engine)
    assert ids_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_an_interrupt_inside_the_forward_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = llm.llm_engine.engine_core.core.executor  # type: ignore[attr-defined]
    execute, calls = executor.execute_model, iter(range(100))

    def interrupted(plan: Any) -> Any:
        result = execute(plan)
        if next(calls) == 3:
            raise KeyboardInterrupt
        return result

    expected = ids_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    monkeypatch.setattr(executor, "execute_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert_clean(llm.llm_engine)
    assert ids_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_a_step_that_fails_ends_its_requests_with_an_error_and_the_engine_lives(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = llm.llm_engine.engine_core.core.executor  # type: ignore[attr-defined]

    def broken(plan: Any) -> Any:
        raise ValueError("out of luck")

    monkeypatch.setattr(executor, "execute_model", broken)
    (output,) = llm.generate(["hello"], GREEDY, use_tqdm=False)
    assert output.outputs[0].finish_reason == "error" and "out of luck" in (output.error or "")
    monkeypatch.undo()
    assert llm.generate(["hello"], GREEDY, use_tqdm=False)[0].outputs[0].finish_reason == "length"


def test_the_progress_bar_counts_prompts_and_shows_both_speeds(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(PROMPTS, GREEDY)
    shown = capsys.readouterr().err
    assert "4/4" in shown and "est. speed input" in shown and "output:" in shown
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_priorities_reach_the_scheduler(llama: Path) -> None:
    llm = make(llama, scheduling_policy="priority", max_num_seqs=1)
    outputs = llm.generate(["hello", "world"], GREEDY, use_tqdm=False, priority=[5, 0])
    first, second = (output.metrics for output in outputs)
    assert first is not None and second is not None
    assert second.finished_time < first.first_token_time  # type: ignore[operator]


# -- chat -------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "hello"}]


def test_chat_is_generate_over_the_rendered_ids(llm: LLM) -> None:
    (output,) = llm.chat(CHAT, GREEDY, use_tqdm=False)
    ids = llm.get_tokenizer().apply_chat_template(CHAT, add_generation_prompt=True)
    assert output.prompt_token_ids == ids and ids.count(1) == 1, "one BOS"
    assert output.prompt == "<s>user: hello\nassistant: "
    assert ids_of([output]) == ids_of(llm.generate({"prompt_token_ids": ids}, GREEDY, use_tqdm=False))


def test_several_conversations_are_answered_in_order(llm: LLM) -> None:
    other = [{"role": "user", "content": "goodbye"}]
    both = llm.chat([CHAT, other], GREEDY, use_tqdm=False)
    assert ids_of(both) == ids_of(llm.chat(CHAT, GREEDY, use_tqdm=False) + llm.chat(other, GREEDY, use_tqdm=False))


def test_chat_options_reach_the_template(llm: LLM) -> None:
    def prompt(messages: Any = CHAT, **kwargs: Any) -> str | None:
        return llm.chat(messages, GREEDY, use_tqdm=False, **kwargs)[0].prompt

    assert prompt(add_generation_prompt=False) == "<s>user: hello\n"
    turn = [*CHAT, {"role": "assistant", "content": "I think"}]
    assert prompt(turn, add_generation_prompt=False, continue_final_message=True).endswith("assistant: I think")  # type: ignore[union-attr]
    template = "{{ mood }}|{{ tools[0].name }}|{{ messages[0].content }}"
    assert prompt(chat_template=template, tools=[{"name": "t"}], chat_template_kwargs={"mood": "x"}) == "x|t|hello"


def test_bad_conversations_are_refused_before_anything_runs(llm: LLM) -> None:
    for messages, field in (
        ([], "messages"),
        ("hi", "messages"),
        ([[{"content": "x"}]], "messages"),
        ([CHAT, []], "messages"),
    ):
        with pytest.raises(InvalidParameterError) as caught:
            llm.chat(messages, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
        assert caught.value.field == field
    with pytest.raises(InvalidParameterError, match="continue_final_message"):
        llm.chat(CHAT, GREEDY, use_tqdm=False, continue_final_message=True)


# -- construction -----------------------------------------------------------------------------------------------


def test_a_misspelt_engine_argument_is_refused_with_the_nearest_name(llama: Path) -> None:
    with pytest.raises(ConfigError, match="max_modellen: no such engine argument; did you mean 'max_model_len'"):
        LLM(str(llama), max_modellen=16)


def test_a_folder_without_weights_is_a_checkpoint_error(llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((llama / name).read_text())
    with pytest.raises(CheckpointError, match="safetensors"):
        make(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        make(tmp_path)


def test_an_unknown_architecture_is_refused_with_those_that_are_known(llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((llama / name).read_text())
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["NoSuchForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"NoSuchForCausalLM.*LlamaForCausalLM"):
        make(tmp_path)


def test_max_model_len_auto_shrinks_to_the_pool(llama: Path) -> None:
    llm = make(llama, max_model_len="auto", num_gpu_blocks_override=5, block_size=16)
    assert llm.llm_engine.max_model_len == 64
    with pytest.raises(PromptTooLongError, match=r"maximum context length is 64 tokens"):
        llm.generate([[5] * 64], GREEDY, use_tqdm=False)
