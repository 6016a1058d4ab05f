"""Request sets: exact lengths, repeatable by seed, vLLM's filter for conversations, errors that name the entry."""

import json
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.bench.datasets import (
    BenchRequest,
    length_problem,
    length_range,
    prefix_repetition_requests,
    random_requests,
    read_sharegpt,
    require_fit,
    sharegpt_requests,
)
from mini_vllm.exceptions import InvalidParameterError

IDS = range(3, 100)


def words(text: str) -> list[int]:
    """A tokenizer of one token a word."""
    return [len(word) for word in text.split()]


# --- random -------------------------------------------------------------------------------------------------


def test_random_prompts_have_the_exact_length_and_only_usable_ids() -> None:
    requests = random_requests(20, IDS, input_len=17, output_len=5)
    assert {(len(request.prompt_token_ids), request.output_len) for request in requests} == {(17, 5)}
    assert {token for request in requests for token in request.prompt_token_ids} <= set(IDS)


def test_the_seed_alone_decides_the_random_prompts() -> None:
    def make(seed: int) -> list[BenchRequest]:
        return random_requests(5, IDS, input_len=8, output_len=4, range_ratio=0.5, seed=seed)

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_random_prompts_differ_from_each_other_unless_a_prefix_is_asked_for() -> None:
    plain = random_requests(8, IDS, input_len=16, output_len=1)
    assert len({tuple(request.prompt_token_ids[:4]) for request in plain}) == 8
    shared = random_requests(8, IDS, input_len=16, output_len=1, prefix_len=6)
    assert {len(request.prompt_token_ids) for request in shared} == {22}
    assert len({tuple(request.prompt_token_ids[:6]) for request in shared}) == 1
    assert len({tuple(request.prompt_token_ids[6:]) for request in shared}) == 8


def test_lengths_spread_over_the_whole_range_and_never_reach_zero() -> None:
    assert length_range(100, 0.25) == (75, 125)
    assert length_range(1, 0.9) == (1, 1)
    requests = random_requests(400, IDS, input_len=4, output_len=2, range_ratio=0.5)
    assert {len(request.prompt_token_ids) for request in requests} == {2, 3, 4, 5, 6}
    assert {request.output_len for request in requests} == {1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"input_len": 0}, "random_input_len"),
        ({"output_len": 0}, "random_output_len"),
        ({"prefix_len": -1}, "random_prefix_len"),
        ({"range_ratio": 1.0}, "random_range_ratio"),
        ({"range_ratio": -0.1}, "random_range_ratio"),
    ],
)
def test_impossible_random_settings_are_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParameterError, match=field):
        random_requests(4, IDS, **{"input_len": 8, "output_len": 8, **changes})


def test_a_request_beyond_the_context_is_refused_with_the_arithmetic() -> None:
    requests = [BenchRequest([1] * 10, 2), BenchRequest([1] * 60, 5)]
    require_fit(requests, 65, "input_len")
    with pytest.raises(InvalidParameterError, match=r"input_len: a prompt of 60 tokens plus 5 to generate is 65.*64"):
        require_fit(requests, 64, "input_len")


# --- prefix repetition --------------------------------------------------------------------------------------


def test_prefixes_are_shared_out_evenly_and_suffixes_are_not_shared() -> None:
    requests = prefix_repetition_requests(10, IDS, prefix_len=12, suffix_len=8, num_prefixes=3, output_len=7, seed=4)
    groups: dict[tuple[int, ...], int] = {}
    for request in requests:
        assert len(request.prompt_token_ids) == 20 and request.output_len == 7
        prefix = tuple(request.prompt_token_ids[:12])
        groups[prefix] = groups.get(prefix, 0) + 1
    assert sorted(groups.values()) == [3, 3, 4]
    assert len({tuple(request.prompt_token_ids[12:]) for request in requests}) == 10


def test_more_prefixes_than_prompts_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match="prefix_repetition_num_prefixes: 5 prefixes"):
        prefix_repetition_requests(4, IDS, prefix_len=4, suffix_len=4, num_prefixes=5, output_len=1)


# --- ShareGPT -----------------------------------------------------------------------------------------------


def conversation(*values: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human" if i % 2 == 0 else "gpt", "value": v} for i, v in enumerate(values)]}


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_first_two_messages_of_each_conversation_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, [conversation("q", "a", "more"), conversation("alone"), conversation("x", "y")])
    assert read_sharegpt(path) == [("q", "a"), ("x", "y")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is not JSON"),
        ({"conversations": []}, "must hold a JSON list, not dict"),
        ([conversation("a", "b"), {"messages": []}], 'entry 1 has no list "conversations"'),
        (["text"], 'entry 0 has no list "conversations"'),
        (
            [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]}],
            'entry 0, message 1 .* no text "value"',
        ),
        ([{"conversations": [{"value": 3}, {"value": "b"}]}], "entry 0, message 0"),
    ],
)
def test_a_malformed_file_is_refused_naming_the_entry(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message) as caught:
        read_sharegpt(written(tmp_path, content))
    assert caught.value.field == "dataset_path"


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="cannot be read"):
        read_sharegpt(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidParameterError, match="is not JSON"):
        read_sharegpt(tmp_path / "binary.json")


def test_the_filter_has_the_published_limits() -> None:
    def problem(prompt: int, output: int, check: bool = True) -> str | None:
        return length_problem(prompt, output, 2048, check_output_len=check)

    assert problem(4, 4) is None and problem(1024, 1024) is None
    assert "prompt shorter" in (problem(3, 10) or "")
    assert "answer shorter" in (problem(10, 3) or "")
    assert problem(10, 3, check=False) is None
    assert "prompt longer" in (problem(1025, 4) or "")
    assert "longer than 2048" in (problem(1024, 1025) or "")


def test_conversations_become_requests_of_the_answers_length() -> None:
    sample = sharegpt_requests([("a b c d e", "f g h i")], 3, words, max_model_len=100)
    assert sample.requests == [BenchRequest([1] * 5, 4)]
    assert sample.left_out == {}


def test_conversations_are_shuffled_by_the_seed_and_never_repeated() -> None:
    conversations = [(f"{'x' * n} b c d", "one two three four") for n in range(1, 30)]

    def take(seed: int, count: int = 10) -> list[BenchRequest]:
        return sharegpt_requests(conversations, count, words, max_model_len=100, seed=seed).requests

    assert take(0) == take(0) != take(1)
    everything = take(0, 1000)
    assert len({request.prompt_token_ids[0] for request in everything}) == len(everything) == 29


def test_what_does_not_fit_the_models_context_is_left_out_and_counted() -> None:
    conversations = [("a b c d", "e f g h"), ("a b c d", "e " * 50), ("a", "b c d e")]
    sample = sharegpt_requests(conversations, 3, words, max_model_len=20)
    assert [request.total_len for request in sample.requests] == [8]
    assert sorted(sample.left_out.values()) == [1, 1]
    assert any("longer than 20 tokens" in reason for reason in sample.left_out)


def test_a_given_output_length_replaces_the_answers_and_may_be_short() -> None:
    sample = sharegpt_requests([("a b c d", "e")], 1, words, output_len=2, max_model_len=20)
    assert sample.requests == [BenchRequest([1, 1, 1, 1], 2)]


def test_a_file_without_a_usable_conversation_is_refused_with_the_reasons() -> None:
    with pytest.raises(InvalidParameterError, match="2 x prompt shorter than 4 tokens"):
        sharegpt_requests([("a", "b"), ("c", "d")], 1, words, max_model_len=100)
    with pytest.raises(InvalidParameterError, match="none has two messages"):
        sharegpt_requests([], 1, words, max_model_len=100)
