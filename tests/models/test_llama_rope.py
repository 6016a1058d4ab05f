"""Llama under each rotary scaling: what must make the comparison of logits fail."""

import dataclasses

import pytest

from mini_vllm.hf_config import RopeConfig
from tests.models.oracle import BROKEN

SCALED = ("linear", "llama3", "yarn", "yarn-options", "dynamic-beyond")


@pytest.mark.parametrize("scaling", SCALED)
def test_control_without_the_scaling_parity_fails(oracle_of, scaling):
    oracle = oracle_of(f"llama-rope-{scaling}")
    assert oracle.error(oracle.model(rope=RopeConfig(theta=oracle.config.rope.theta))) > BROKEN


@pytest.mark.parametrize(
    ("scaling", "wrong"),
    [
        ("linear", {"factor": 3.0}),
        ("llama3", {"low_freq_factor": 2.0}),
        ("yarn", {"original_max_position_embeddings": 64}),
        ("yarn", {"attention_factor": 1.0}),
        ("yarn-options", {"truncate": True}),
        ("yarn-options", {"mscale": 1.0}),
        ("yarn-options", {"beta_fast": 8.0}),
        ("dynamic-beyond", {"factor": 3.0}),
    ],
)
def test_control_another_number_of_the_scaling_fails(oracle_of, scaling, wrong):
    oracle = oracle_of(f"llama-rope-{scaling}")
    rope = dataclasses.replace(oracle.config.rope, scaling=oracle.config.rope.scaling | wrong)
    assert oracle.error(oracle.model(rope=rope)) > BROKEN


@pytest.mark.parametrize(("row", "other_length"), [("within", 128), ("beyond", 64), ("beyond", 120)])
def test_control_another_max_model_len_changes_dynamic_frequencies(oracle_of, row, other_length):
    oracle = oracle_of(f"llama-rope-dynamic-{row}")
    assert oracle.error(oracle.model(max_model_len=other_length)) > (BROKEN / 10 if other_length == 120 else BROKEN)
