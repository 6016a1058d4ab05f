"""Flags: defaults, and nothing accepted that would not act."""

from typing import Any

import pytest

from mini_vllm.bench.options import LatencyOptions, ThroughputOptions
from mini_vllm.exceptions import ConfigError, InvalidParameterError


def test_without_arguments_there_is_a_random_set() -> None:
    options = ThroughputOptions()
    assert options.dataset == "random"
    assert options.dataset_settings() == {
        "random_input_len": 256,
        "random_output_len": 128,
        "random_range_ratio": 0.0,
        "random_prefix_len": 0,
    }


def test_a_file_alone_means_sharegpt() -> None:
    options = ThroughputOptions(dataset_path="x.json", output_len=32)
    assert options.dataset == "sharegpt"
    assert options.dataset_settings() == {"dataset_path": "x.json", "output_len": 32}


def test_short_length_flags_stand_for_the_datasets_own() -> None:
    random = ThroughputOptions(input_len=10, output_len=20).dataset_settings()
    assert (random["random_input_len"], random["random_output_len"]) == (10, 20)
    repeated = ThroughputOptions(dataset_name="prefix_repetition", output_len=9).dataset_settings()
    assert repeated["prefix_repetition_output_len"] == 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset_name": "sonnet"}, "dataset_name: must be one of random"),
        ({"dataset_name": "sharegpt"}, "dataset_path: sharegpt needs a file"),
        ({"dataset_name": "random", "dataset_path": "x"}, "dataset_path: has no meaning"),
        ({"prefix_repetition_suffix_len": 4}, "prefix_repetition_suffix_len: has no meaning"),
        ({"dataset_path": "x", "random_input_len": 4}, "random_input_len: has no meaning"),
        ({"dataset_path": "x", "input_len": 4}, "input_len: has no meaning"),
        ({"dataset_name": "prefix_repetition", "input_len": 4}, "input_len: has no meaning"),
        ({"input_len": 4, "random_input_len": 5}, "input_len: 4 contradicts random_input_len: 5"),
        ({"num_prompts": 0}, "num_prompts: must be at least 1"),
        ({"num_repeats": 0}, "num_repeats: must be at least 1"),
        ({"num_warmups": -1}, "num_warmups: must be at least 0"),
    ],
)
def test_flags_that_would_not_act_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ThroughputOptions(**given)


@pytest.mark.parametrize("name", ["input_len", "output_len", "batch_size", "num_iters"])
def test_latency_lengths_and_counts_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: must be at least 1"):
        LatencyOptions(**{name: 0})
    with pytest.raises(ConfigError, match="num_iters_warmup"):
        LatencyOptions(num_iters_warmup=-1)


@pytest.mark.parametrize("kind", [LatencyOptions, ThroughputOptions])
def test_a_temperature_no_request_could_have_is_refused_at_once(kind: Any) -> None:
    with pytest.raises(InvalidParameterError, match="temperature"):
        kind(temperature=-1.0)
