"""Llama 4 where dense: layers with and without rotation, weightless head norms, sharpening; the rest is refused."""

import pytest
import torch

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.models.llama4 import Llama4Attention, Llama4Rotary, layers_with_rotation
from tests.families import LLAMA3, llama4
from tests.models.oracle import BROKEN
from tests.models.small import build, config_of


def attentions(model):
    return [module for module in model.modules() if isinstance(module, Llama4Attention)]


def test_control_without_head_norms_parity_fails(oracle_of):
    oracle = oracle_of("llama4-dense")
    assert oracle.error(oracle.model(raw=oracle.config.raw | {"use_qk_norm": False})) > BROKEN


@pytest.mark.parametrize("layer", [0, 1])
def test_control_rotation_in_the_wrong_layers_fails(oracle_of, layer):
    oracle = oracle_of("llama4-dense-without-norms")
    model = oracle.model()
    attentions(model)[layer].rotates ^= True
    assert oracle.error(model) > BROKEN


def test_control_halves_instead_of_neighbouring_pairs_fail(oracle_of, monkeypatch):
    oracle = oracle_of("llama4-dense-without-norms")
    turn = Llama4Attention._turn
    halves_first = lambda heads: heads.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # noqa: E731
    monkeypatch.setattr(Llama4Attention, "_turn", lambda self, heads, cs: turn(self, halves_first(heads), cs))
    assert oracle.error(oracle.model()) > BROKEN


@pytest.mark.parametrize("wrong", [{"attn_temperature_tuning": False}, {"floor_scale": 32}, {"attn_scale": 0.1}])
def test_control_another_sharpening_fails(oracle_of, wrong):
    oracle = oracle_of("llama4-dense")
    assert oracle.error(oracle.model(raw=oracle.config.raw | wrong)) > BROKEN


def test_control_without_the_rotary_scaling_parity_fails(oracle_of):
    oracle = oracle_of("llama4-dense-without-norms")
    assert oracle.config.rope.rope_type == LLAMA3["rope_scaling"]["rope_type"]
    assert oracle.error(oracle.model(rope=oracle_of("llama4-dense").config.rope)) > BROKEN


def test_sharpening_is_a_matter_of_position_not_of_the_batch(oracle_of):
    """Steps after 15, 31 and so on, wherever in the flat batch the token stands."""
    rotary = next(m for m in oracle_of("llama4-dense").model().modules() if isinstance(m, Llama4Rotary))
    _, _, factors = rotary(torch.tensor([30, 0, 14, 15, 31]))
    expected = [1 + 0.5 * torch.log1p(torch.tensor(float(step))) for step in (1, 0, 0, 1, 2)]
    torch.testing.assert_close(factors.flatten(), torch.stack(expected))


def test_layers_with_rotation_are_listed_or_all_but_every_nth(oracle_of):
    config = oracle_of("llama4-dense").config
    assert layers_with_rotation(config) == [True, False, True]
    listed = build(config_of(llama4(no_rope_layers=[0, 1, 1])))
    assert [attention.rotates for attention in attentions(listed)] == [False, True, True]


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"moe_layers": None}, UnsupportedModelError, r"moe_layers: layers with experts are not supported, got \[0, 1"),
        ({"moe_layers": [2]}, UnsupportedModelError, r"moe_layers: layers with experts are not supported, got \[2\]"),
        ({"moe_layers": None, "interleave_moe_layer_step": 2}, UnsupportedModelError, r"not supported, got \[1\]"),
        ({"attention_chunk_size": 127}, UnsupportedModelError, "attention_chunk_size=127.* to at most 127"),
        ({"layer_types": ["full_attention"] * 3}, UnsupportedModelError, "layer_types=.* is not supported"),
        ({"no_rope_layers": [1]}, CheckpointError, "no_rope_layers must have a 0 or 1 for each layer"),
    ],
)  # fmt: skip
def test_what_is_not_dense_or_longer_than_a_chunk_is_refused_by_name(options, error, named):
    with pytest.raises(error, match=named):
        build(config_of(llama4(**options)), max_model_len=128)


def test_requests_within_a_chunk_are_served():
    build(config_of(llama4(attention_chunk_size=64)), max_model_len=64)
