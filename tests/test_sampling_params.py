"""Every field of `SamplingParams`: what it takes, what it refuses, and how that is said."""

import dataclasses
import math
from typing import Any

import msgspec
import pytest

from mini_vllm.core.scheduler_output import NewRequestData
from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams

GOOD: dict[str, list[Any]] = {
    "n": [1, 4],
    "temperature": [0, 0.0, 1e-7, 1, 100.0],
    "top_p": [1, 1e-9, 0.5],
    "top_k": [-1, 0, 1, 10**9],
    "min_p": [0, 0.5, 1],
    "repetition_penalty": [1e-3, 1, 5.0],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2, 0, 2.0],
    "seed": [None, 0, -1, 2**63 - 1, -(2**63)],
    "stop": [(), "x", ["x", "yz"]],
    "stop_token_ids": [(), [1, 2], None],
    "include_stop_str_in_output": [True, False],
    "bad_words": [(), "x", ["x", "y"], None],
    "logit_bias": [None, {}, {3: -100, 4: 0.5}],
    "allowed_token_ids": [None, [1], (1, 2)],
    "min_tokens": [0, 16],
    "max_tokens": [1, None],
    "ignore_eos": [True, False],
    "logprobs": [None, -1, 0, 5],
    "prompt_logprobs": [None, -1, 0, 5],
    "logprob_token_ids": [None, [], [5]],
    "skip_special_tokens": [True, False],
    "spaces_between_special_tokens": [True, False],
    "detokenize": [True, False],
    "output_kind": [RequestOutputKind.DELTA, 2],
    "logits_processors": [(), None, [lambda ids, logits: logits]],
    "extra_args": [None, {"anything": object()}],
}
BAD: dict[str, list[Any]] = {
    "n": [0, -1, 1.0, True, "1", None],
    "temperature": [-0.1, math.nan, math.inf, "1", None, True],
    "top_p": [0, -0.1, 1.01, math.nan, "1", None],
    "top_k": [-2, 1.5, True, None],
    "min_p": [-0.1, 1.1, math.nan, None],
    "repetition_penalty": [0, -1, math.inf, None],
    "presence_penalty": [-2.1, 2.1, math.nan, None],
    "frequency_penalty": [-2.1, 2.1, "0", None],
    "seed": [2**63, -(2**63) - 1, 1.0, True],
    "stop": [[""], "", [1], 3, {"x": 1}, b"x"],
    "stop_token_ids": [[-1], ["1"], 3, "12", [1.0]],
    "include_stop_str_in_output": [1, None],
    "bad_words": [[""], [3], 5],
    "logit_bias": [{-1: 1.0}, {"1": 1.0}, {1: math.inf}, {1: "2"}, [1]],
    "allowed_token_ids": [[], [-1], "12", [1.5], 4],
    "min_tokens": [-1, 17, 1.0, None],
    "max_tokens": [0, -1, 2.0, True],
    "ignore_eos": [0, None],
    "logprobs": [-2, 1.0, True],
    "prompt_logprobs": [-2, "all", True],
    "logprob_token_ids": [[-1], 3, ["x"]],
    "skip_special_tokens": [1],
    "spaces_between_special_tokens": ["yes"],
    "detokenize": [None],
    "output_kind": [3, "delta", None],
    "logits_processors": [[1], 5, "f"],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_what_a_field_takes(name: str, value: Any) -> None:
    SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_what_a_field_refuses_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError, match=rf"^{name}: ") as error:
        SamplingParams(**{name: value})
    assert error.value.field == name


def test_every_field_is_in_the_tables() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == set(GOOD) and names - set(BAD) == {"extra_args"}


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidParameterError, match="detokenize=True"):
        SamplingParams(stop="x", detokenize=False)


def test_messages_name_the_range() -> None:
    with pytest.raises(InvalidParameterError, match=r"min_p: must be in \[0, 1\], got 2"):
        SamplingParams(min_p=2)
    with pytest.raises(InvalidParameterError, match="min_tokens: must be at most max_tokens=4, got 5"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_lists_become_tuples_and_the_whole_is_plain_data() -> None:
    params = SamplingParams(
        stop="end", bad_words=["a"], stop_token_ids=[1], allowed_token_ids=[2], logit_bias={3: 1.5}, output_kind=2
    )  # type: ignore[arg-type]
    assert params.stop == ("end",) and params.bad_words == ("a",) and params.allowed_token_ids == (2,)
    assert params.output_kind is RequestOutputKind.FINAL_ONLY
    assert hash(params) == hash(dataclasses.replace(params))
    data = NewRequestData("r", [1], 1, params, ([1],), 0)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(data), type=NewRequestData) == data


def test_another_limit_leaves_the_rest_and_is_checked_against_min_tokens() -> None:
    params = SamplingParams(min_tokens=3, max_tokens=None, stop="end", seed=1)
    assert params.with_max_tokens(5) == dataclasses.replace(params, max_tokens=5)
    assert params.max_tokens is None
    for wrong, message in ((2, "min_tokens: must be at most max_tokens=2, got 3"), (0, "max_tokens")):
        with pytest.raises(InvalidParameterError, match=message):
            params.with_max_tokens(wrong)
