"""Claims about decoding through `LLM` and the command line: what is asked there arrives, and nothing stays behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_vllm import LLM, SamplingParams
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.entrypoints.cli.main import build_parser, main
from mini_vllm.entrypoints.cli.sampling_arguments import sampling_params_from
from mini_vllm.exceptions import ConfigError, InvalidParameterError
from mini_vllm.sampling.logits_processor import LogitsProcessor
from tests.engine.test_llm_engine import assert_clean, drain

GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
OPTIONS = {"dtype": "float32", "num_threads": 1, "num_gpu_blocks_override": 64, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def llm(llama: Path) -> LLM:
    return LLM(str(llama), **OPTIONS)


def complete(llm: LLM, prompt: str = "hello world", **params: Any) -> Any:
    options = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True} | params
    (output,) = llm.generate(prompt, SamplingParams(**options), use_tqdm=False)
    assert_clean(llm.llm_engine)
    return output


# -- stop strings end the request in the core ------------------------------------------------------------------------


def test_the_core_stops_at_a_stop_string(llm: LLM) -> None:
    whole = complete(llm).outputs[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    engine = llm.llm_engine
    before = engine.output_processor.num_generation_tokens
    (end,) = complete(llm, stop=stop).outputs
    assert (end.finish_reason, end.stop_reason) == ("stop", stop) and end.text == whole.text[: whole.text.index(stop)]
    assert engine.output_processor.num_generation_tokens - before == len(end.token_ids) < 16
    (shown,) = complete(llm, stop=stop, include_stop_str_in_output=True).outputs
    assert shown.text == end.text + stop and shown.token_ids == end.token_ids


def test_samples_stop_one_by_one(llm: LLM) -> None:
    free = complete(llm, n=4, temperature=1.0, seed=3).outputs
    stop = free[2].text[len(free[2].text) // 2 :][:2]
    for before, after in zip(free, complete(llm, n=4, temperature=1.0, seed=3, stop=stop).outputs, strict=True):
        assert after.text == (before.text[: before.text.index(stop)] if stop in before.text else before.text)
        assert after.finish_reason == ("stop" if stop in before.text else "length")


# -- several samples in the engine ---------------------------------------------------------------------------------


def test_aborting_the_request_ends_every_sample(make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine(max_num_seqs=2)
    engine.add_request("r", "hello world", SamplingParams(n=4, max_tokens=30, seed=1, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert set(engine.waiting_reasons()) == {"2_r", "3_r"}
    (output,) = engine.abort_request("r")
    assert output.finished and [c.finish_reason for c in output.outputs] == ["abort"] * 4
    assert [len(c.token_ids) for c in output.outputs] == [3, 3, 1, 1]
    assert_clean(engine)
    assert engine.step() == []


def test_a_childs_id_cannot_be_taken_and_is_free_afterwards(make_engine: Callable[..., LLMEngine]) -> None:
    engine = make_engine()
    engine.add_request("1_b", "hello", GREEDY)
    engine.add_request("a", "hello", SamplingParams(n=2, max_tokens=2))
    for request_id, n in (("1_a", 1), ("b", 2)):
        with pytest.raises(InvalidParameterError, match=r"^request_id: '1_[ab]' is already in use"):
            engine.add_request(request_id, "hello", SamplingParams(n=n))
    assert set(drain(engine)) == {"1_b", "a"}
    engine.add_request("1_a", "hello", GREEDY)
    drain(engine)
    assert_clean(engine)


# -- logits processors ---------------------------------------------------------------------------------------------


class Only(LogitsProcessor):
    """Allows one token, whatever the request."""

    token_id = 77

    def __init__(self, *args: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(logits, -torch.inf)
        kept[:, self.token_id] = logits[:, self.token_id]
        return kept


@pytest.mark.parametrize("given", [[Only], f"{__name__}:Only"])
def test_the_engines_processors_act_on_every_request(llama: Path, given: Any) -> None:
    output = complete(LLM(str(llama), logits_processors=given, **OPTIONS), n=2, temperature=1.0, max_tokens=3)
    assert [c.token_ids for c in output.outputs] == [[77] * 3] * 2


@pytest.mark.parametrize("given", [["no colon"], [3], "mini_vllm.nowhere:Class"])
def test_what_is_no_processor_is_refused_by_field(llama: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match="^logits_processors: "):
        LLM(str(llama), logits_processors=given, **OPTIONS)


def test_a_requests_own_processor_acts_on_it_alone(llm: LLM) -> None:
    def count_up(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        changed = torch.full_like(logits, -torch.inf)
        changed[100 + len(token_ids)] = 0.0
        return changed

    params = [SamplingParams(temperature=0.0, max_tokens=4, logits_processors=[count_up]), GREEDY]
    own, other = llm.generate(["hello world"] * 2, params, use_tqdm=False)
    assert own.outputs[0].token_ids == [100, 101, 102, 103]
    assert other.outputs[0].token_ids == complete(llm).outputs[0].token_ids


def test_the_engine_says_how_many_logprobs_it_allows(llama: Path, llm: LLM) -> None:
    with pytest.raises(InvalidParameterError, match="^logprobs: asks for 21 .* at most 20"):
        complete(llm, logprobs=21)
    assert_clean(llm.llm_engine)
    with pytest.raises(ConfigError, match="^max_logprobs: must be -1"):
        LLM(str(llama), max_logprobs=-2, **OPTIONS)
    none = LLM(str(llama), max_logprobs=0, **OPTIONS)
    assert len(complete(none, logprobs=0).outputs[0].logprobs[0]) == 1
    with pytest.raises(InvalidParameterError, match="^prompt_logprobs: asks for 1 .* at most 0"):
        complete(none, prompt_logprobs=1)


# -- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def generate(llama: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    engine = ["--model", str(llama), "--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "64"]

    def run(*argv: str) -> tuple[int, str, str]:
        status = main(["generate", *engine, "--max-tokens", "8", "--ignore-eos", *argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_flags_become_sampling_params() -> None:
    argv = (
        "generate --n 3 --temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --sampling-seed -5 "
        "--repetition-penalty 1.1 --presence-penalty -1 --frequency-penalty 2 --logit-bias 5=-1.5 --logit-bias 6=2 "
        "--allowed-token-ids 5,6,7 --bad-words one --bad-words two --max-tokens 9 --min-tokens 2 --stop a --stop b "
        "--stop-token-ids 8,9 --include-stop-str-in-output --ignore-eos --logprobs 3 --prompt-logprobs -1 "
        "--logprob-token-ids 4 --no-skip-special-tokens --no-spaces-between-special-tokens"
    ).split()
    params = sampling_params_from(build_parser().parse_args(argv), SamplingParams())
    assert params == SamplingParams(
        n=3, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=-5, repetition_penalty=1.1, presence_penalty=-1,
        frequency_penalty=2, logit_bias={5: -1.5, 6: 2.0}, allowed_token_ids=[5, 6, 7], bad_words=["one", "two"],
        max_tokens=9, min_tokens=2, stop=["a", "b"], stop_token_ids=[8, 9], include_stop_str_in_output=True,
        ignore_eos=True, logprobs=3, prompt_logprobs=-1, logprob_token_ids=[4], skip_special_tokens=False,
        spaces_between_special_tokens=False,
    )  # fmt: skip


def test_flags_not_given_leave_the_models_defaults_alone() -> None:
    base = SamplingParams(temperature=0.3, repetition_penalty=1.2, max_tokens=128)
    assert sampling_params_from(build_parser().parse_args(["generate"]), base) == base


def test_help_is_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    for heading in ("sampling:", "penalties, biases and bans:", "where to stop:", "logprobs and text:", "KV cache:"):
        assert f"\n{heading}\n" in text
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    assert "--min-p" in text and "--n N" not in text and "--logprobs" not in text, "it shows one text a prompt"


def test_samples_are_printed_one_after_another_and_streamed_alike(generate: Any, llm: LLM) -> None:
    sampling = ["--n", "2", "--temperature", "1", "--sampling-seed", "7"]
    texts = [
        [c.text for c in complete(llm, prompt, n=2, temperature=1.0, seed=7, max_tokens=8).outputs]
        for prompt in ("hello", "world")
    ]
    one = generate("--prompt", "hello", *sampling)
    assert one[1] == f"--- sample 1 of 2: 'hello'\n{texts[0][0]}\n\n--- sample 2 of 2: 'hello'\n{texts[0][1]}\n"
    both = generate("--prompt", "hello", "--prompt", "world", *sampling)
    assert "--- 2 of 2, sample 1 of 2: 'world'\n" + texts[1][0] in both[1]
    assert generate("--prompt", "hello", "--prompt", "world", *sampling, "--stream") == both


def test_json_lines_hold_logprobs(generate: Any) -> None:
    status, out, _ = generate("--prompt", "hello", "--temperature", "0", "--logprobs", "2", "--prompt-logprobs", "0",
                              "--n", "2", "--json")  # fmt: skip
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [line["index"] for line in lines] == [0, 1]
    for line in lines:
        assert [position[0]["token_id"] for position in line["logprobs"]] == line["token_ids"]
        assert line["logprobs"][0][0]["rank"] == 1 and len(line["logprobs"][0]) == 2
        assert line["cumulative_logprob"] == pytest.approx(sum(p[0]["logprob"] for p in line["logprobs"]))
        assert line["prompt_logprobs"][0] is None and len(line["prompt_logprobs"]) == line["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--logprobs", "1"], "logprobs: --logprobs needs --json"),
        (["--n", "0"], "n: must be at least 1"),
        (["--min-p", "2"], "min_p: must be in [0, 1]"),
        (["--stop", ""], "stop: must be strings that are not empty"),
        (["--allowed-token-ids", "5,999"], "allowed_token_ids: token id 999 is out of range"),
        (["--json", "--logprobs", "99"], "logprobs: asks for 99 logprobs"),
    ],
)
def test_bad_values_are_one_line_naming_the_field(generate: Any, argv: list[str], says: str) -> None:
    status, out, err = generate("--prompt", "x", *argv)
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and says in err
