"""Qwen3: norms on query and key heads, head_dim of its own, windows in some layers."""

import pytest
import torch

from mini_vllm.exceptions import UnsupportedModelError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.attention import get_attention_layers
from mini_vllm.models import llama
from mini_vllm.models.qwen3 import Qwen3Attention, Qwen3ForCausalLM
from tests.families import SLIDING, qwen3
from tests.models.oracle import BROKEN
from tests.models.small import build, config_of


def test_control_without_head_norms_parity_fails(oracle_of, monkeypatch):
    oracle = oracle_of("qwen3")
    monkeypatch.setattr(Qwen3Attention, "prepare_heads", lambda self, heads: heads)
    assert oracle.error(oracle.model()) > BROKEN


def test_control_norms_after_the_rotation_fail(oracle_of, monkeypatch):
    oracle, prepare, rotate = oracle_of("qwen3"), Qwen3Attention.prepare_heads, llama.apply_rotary
    model = oracle.model()
    layers = iter([*model.model.layers])
    monkeypatch.setattr(Qwen3Attention, "prepare_heads", lambda self, heads: heads)
    monkeypatch.setattr(llama, "apply_rotary", lambda x, cs: prepare(next(layers).self_attn, rotate(x, cs)))
    assert oracle.error(model) > BROKEN


def test_control_query_and_key_norms_exchanged_fail(oracle_of):
    oracle = oracle_of("qwen3")
    model = oracle.model()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_norm, attention.k_norm = attention.k_norm, attention.q_norm
    assert oracle.error(model) > BROKEN


def test_control_another_head_dim_than_the_files_cannot_load(oracle_of):
    oracle = oracle_of("qwen3")
    with pytest.raises(ValueError, match=r"has shape \[.*\], expected \[.*\]"):
        oracle.model(head_dim=16)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_control_a_dropped_bias_fails(oracle_of, part):
    oracle = oracle_of("qwen3-window-tied-biased")
    model = oracle.model()
    module = model.model.layers[1].self_attn.qkv_proj
    module.bias.data.split(module.output_partition_sizes)[part].zero_()
    assert oracle.error(model) > BROKEN


@pytest.mark.parametrize("window", [15, 17, None])
def test_control_a_window_off_by_one_fails(oracle_of, window):
    oracle = oracle_of("qwen3-window-tied-biased")
    assert oracle.error(oracle.model(sliding_window=window)) > BROKEN


def test_head_dim_that_is_not_mentioned_is_the_familys_128():
    config = config_of(qwen3())
    config.pop("head_dim")
    assert HFConfig.from_dict(config).head_dim == 128


def test_windows_follow_max_window_layers_and_the_switch():
    for config, expected in (
        (qwen3(**SLIDING), [None, 16]),
        (qwen3(**SLIDING | {"use_sliding_window": False}), [None] * 2),
    ):
        layers = get_attention_layers(build(config_of(config)))
        assert [layer.sliding_window for layer in layers.values()] == expected


def test_an_option_the_family_does_not_have_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"mlp_bias=True is not supported.*'qwen3'"):
        build(config_of(qwen3(mlp_bias=True)))


def test_head_norms_compute_in_float32_in_a_bfloat16_model():
    model = Qwen3ForCausalLM(HFConfig.from_dict(config_of(qwen3())), dtype=torch.bfloat16)
    attention = model.model.layers[0].self_attn
    heads = torch.randn(3, 6, 24, generator=torch.Generator().manual_seed(0)) * 100
    prepared = attention.prepare_heads(heads.bfloat16())
    assert prepared.dtype is torch.bfloat16
    exact = heads / heads.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(prepared.float(), exact, atol=2e-2, rtol=2e-2)
