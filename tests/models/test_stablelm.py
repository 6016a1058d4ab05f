"""StableLM: layer norms, partial rotation, and the two options of the 12B model."""

import dataclasses

import pytest
import torch

from mini_vllm.distributed.parallel_state import use_tp_group
from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.norm import LayerNorm, PerHeadLayerNorm
from mini_vllm.models.llama import LlamaDecoderLayer
from mini_vllm.models.stablelm import StableLmDecoderLayer
from tests.families import stablelm
from tests.layers.test_linear import FakeGroup, randn
from tests.models.oracle import BROKEN
from tests.models.small import build, config_of


@pytest.mark.parametrize(("row", "share"), [("stablelm", 1.0), ("stablelm", 0.5), ("stablelm-2-12b", 0.25)])
def test_control_another_rotated_share_fails(oracle_of, row, share):
    oracle = oracle_of(row)
    rope = dataclasses.replace(oracle.config.rope, partial_rotary_factor=share)
    assert oracle.error(oracle.model(rope=rope)) > BROKEN


def test_control_root_mean_square_instead_of_layer_norms_fails(oracle_of, monkeypatch):
    oracle = oracle_of("stablelm")

    def without_mean(self, x, residual=None):
        x = x if residual is None else x + residual
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias, x

    monkeypatch.setattr(LayerNorm, "forward", without_mean)
    assert oracle.error(oracle.model()) > BROKEN


def test_control_norms_without_their_biases_fail(oracle_of):
    oracle = oracle_of("stablelm")
    model = oracle.model()
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.bias.data.zero_()
    assert oracle.error(model) > BROKEN


def test_control_a_dropped_projection_bias_fails(oracle_of):
    oracle = oracle_of("stablelm")
    model = oracle.model()
    model.model.layers[0].self_attn.qkv_proj.bias.data.zero_()
    assert oracle.error(model) > BROKEN


def test_control_sequential_instead_of_parallel_residual_fails(oracle_of, monkeypatch):
    oracle = oracle_of("stablelm-2-12b")
    model = oracle.model()
    for layer in model.model.layers:
        layer.post_attention_layernorm = layer.input_layernorm
    monkeypatch.setattr(StableLmDecoderLayer, "forward", LlamaDecoderLayer.forward)
    assert oracle.error(model) > BROKEN


def test_control_one_heads_norm_for_all_heads_fails(oracle_of):
    oracle = oracle_of("stablelm-2-12b")
    model = oracle.model()
    for layer in model.model.layers:
        weight = layer.self_attn.q_layernorm.weight.data
        weight.copy_(weight[:1].expand_as(weight))
    assert oracle.error(model) > BROKEN


def test_control_without_head_norms_parity_fails(oracle_of):
    oracle = oracle_of("stablelm-2-12b")
    model = oracle.model()
    for layer in model.model.layers:
        layer.self_attn.qk_layernorm = False
    assert oracle.error(model) > BROKEN


def test_head_norms_are_layer_norms_with_a_weight_per_head():
    norm = PerHeadLayerNorm(3, 3, 0, 16, 1e-5, dtype=torch.float32)
    weights, x = [randn(16, seed=i) for i in range(3)], randn(5, 3, 16, seed=9)
    for head, weight in enumerate(weights):
        norm.weight.weight_loader(norm.weight, weight, head)
    expected = [torch.nn.functional.layer_norm(x[:, i], (16,), weights[i], eps=1e-5) for i in range(3)]
    torch.testing.assert_close(norm(x), torch.stack(expected, 1))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_keep_the_norms_of_their_own_heads(oracle_of, world_size):
    """4 query heads and 2 KV heads: with 4 ranks, each KV head is held twice."""
    oracle, parts = oracle_of("stablelm-2-12b"), []
    whole = oracle.model().model.layers[1].self_attn
    for rank in range(world_size):
        with use_tp_group(FakeGroup(rank, world_size)):
            parts.append(oracle.model().model.layers[1].self_attn)
    assert torch.cat([part.q_layernorm.weight for part in parts]).equal(whole.q_layernorm.weight)
    keys = torch.cat([part.k_layernorm.weight for part in parts])
    assert keys.equal(whole.k_layernorm.weight.repeat_interleave(world_size // 2, 0))


def test_a_missing_head_norm_is_named(oracle_of):
    oracle = oracle_of("stablelm")
    options = {"qk_layernorm": True}
    with pytest.raises(
        CheckpointError, match=r"missing: model.layers.0.self_attn.q_layernorm.norms.0.weight, .*norms.1"
    ):
        oracle.model(raw=oracle.config.raw | options)


def test_what_the_file_does_not_say_is_the_familys():
    config = config_of(stablelm())
    for key in ("layer_norm_eps", "partial_rotary_factor"):
        config.pop(key)
    assert HFConfig.from_dict(config).rope.partial_rotary_factor == 0.25
    assert build(config).model.norm.eps == 1e-5
    assert build(config | {"layer_norm_eps": 1e-3}).model.norm.eps == 1e-3


def test_the_rotated_share_may_stand_in_rope_parameters():
    config = config_of(stablelm())
    config.pop("partial_rotary_factor")
    config["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    assert HFConfig.from_dict(config).rope.partial_rotary_factor == 0.5


@pytest.mark.parametrize(
    ("option", "error", "named"),
    [
        ({"sliding_window": 16}, UnsupportedModelError, "sliding_window=16 is not supported.*'stablelm'"),
        ({"layer_norm_eps": "x"}, CheckpointError, "layer_norm_eps must be a positive number, got 'x'"),
        ({"qk_layernorm": "yes"}, CheckpointError, "qk_layernorm must be true or false, got 'yes'"),
    ],
)
def test_options_that_would_change_results_are_refused_by_name(option, error, named):
    with pytest.raises(error, match=named):
        build(config_of(stablelm(**option)))
