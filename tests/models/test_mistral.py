"""Mistral: the window of every layer, and what a config.json leaves unsaid."""

import pytest

from mini_vllm.exceptions import UnsupportedModelError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.attention import get_attention_layers
from tests.families import mistral
from tests.models.oracle import BROKEN, TOLERANCE
from tests.models.small import build, config_of


@pytest.mark.parametrize("window", [15, 17, None])
def test_control_a_window_off_by_one_fails(oracle_of, window):
    oracle = oracle_of("mistral-window")
    assert oracle.error(oracle.model(sliding_window=window)) > BROKEN


def test_control_a_window_in_one_layer_only_fails(oracle_of):
    oracle = oracle_of("mistral-window")
    model = oracle.model()
    model.model.layers[0].self_attn.attn.impl.sliding_window = None
    assert oracle.error(model) > BROKEN


def test_prompts_shorter_than_the_window_see_everything(oracle_of):
    oracle = oracle_of("mistral-wide-heads")
    assert oracle.error(oracle.model(sliding_window=128)) < TOLERANCE


def test_a_window_that_is_not_mentioned_is_the_familys_4096_and_null_is_none():
    said = config_of(mistral(sliding_window=32))
    unsaid = {key: value for key, value in said.items() if key != "sliding_window"}
    for config, expected in ((said, 32), (unsaid, 4096), (said | {"sliding_window": None}, None)):
        model = build(config)
        assert {layer.sliding_window for layer in get_attention_layers(model).values()} == {expected}


def test_the_default_number_of_kv_heads_is_the_familys():
    config = config_of(mistral(num_attention_heads=16))
    config.pop("num_key_value_heads")
    assert HFConfig.from_dict(config).num_key_value_heads == 8


@pytest.mark.parametrize("option", [{"attention_bias": True}, {"mlp_bias": True}, {"layer_types": ["full_attention"]}])
def test_options_the_family_does_not_have_are_refused_by_name(option):
    with pytest.raises(UnsupportedModelError, match=rf"{next(iter(option))}=.* is not supported.*'mistral'"):
        build(config_of(mistral(**option)))
