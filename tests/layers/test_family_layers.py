"""Layers that only some families use, each against its formula or transformers' layer."""

import math

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from mini_vllm.exceptions import CheckpointError, ConfigError, UnsupportedModelError
from mini_vllm.layers.activation import get_act, get_act_and_mul
from mini_vllm.layers.embedding import LearnedPositionEmbedding, ParallelLMHead
from mini_vllm.layers.linear import Transposed
from mini_vllm.layers.logits import LogitsProcessor
from mini_vllm.layers.norm import GemmaRMSNorm
from tests.layers.test_linear import NarrowOnly, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemmas_norm_equals_transformers_bit_for_bit_and_adds_one_in_float32(dtype):
    weight = (randn(64) * 0.01).to(dtype)
    ours, theirs = GemmaRMSNorm(64, 1e-6, dtype=dtype), Gemma2RMSNorm(64, 1e-6).to(dtype)
    ours.weight.weight_loader(ours.weight, weight)
    theirs.weight.data.copy_(weight)
    x, residual = (randn(50, 64, seed=1) * 30).to(dtype), randn(50, 64, seed=2).to(dtype)
    normed, carried = ours(x, residual)
    assert normed.dtype is dtype
    assert carried.equal(x + residual)
    torch.testing.assert_close(normed, theirs(x + residual), atol=2e-6 if dtype is torch.float32 else 0, rtol=1e-6)
    if dtype is torch.bfloat16:
        ours.weight.data = (1 + weight).float()  # added in bfloat16
        assert not ours(x, residual)[0].equal(normed)


@pytest.mark.parametrize("name", ["relu", "silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
def test_activations_are_those_of_transformers(name):
    x = randn(1000) * 3
    torch.testing.assert_close(get_act(name)(x), ACT2FN[name](x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_gated_activations_take_the_gate_first(name):
    gate, up = randn(3, 200) * 3, randn(3, 200, seed=1)
    output = get_act_and_mul(name)(torch.cat((gate, up), -1))
    torch.testing.assert_close(output, ACT2FN[name](gate) * up, atol=2e-6, rtol=1e-5)


def test_the_two_gelus_are_told_apart():
    x = randn(1000) * 3
    assert 1e-4 < (get_act("gelu")(x) - get_act("gelu_new")(x)).abs().max() < 1e-3


@pytest.mark.parametrize("make", [get_act, get_act_and_mul])
def test_other_activations_are_refused_with_the_supported_ones(make):
    with pytest.raises(UnsupportedModelError, match=r"hidden_act 'quick_gelu' is not supported; supported are .*gelu"):
        make("quick_gelu")


@pytest.mark.parametrize("offset", [0, 2])
def test_learned_positions_are_rows_of_the_table_from_the_offset_on(offset):
    layer, table = LearnedPositionEmbedding(10, 4, offset=offset, dtype=torch.float32), randn(10 + offset, 4)
    layer.weight.weight_loader(layer.weight, table)
    positions = torch.tensor([9, 0, 3, 3])
    assert layer(positions).equal(table[positions + offset])
    with pytest.raises(IndexError):
        layer(torch.tensor([10]))


def test_more_positions_than_were_learned_are_refused_before_anything_runs():
    LearnedPositionEmbedding(10, 4, offset=2, max_model_len=10, dtype=torch.float32)
    with pytest.raises(ConfigError, match="max_model_len: 11 is more than the 10 positions that the model has learned"):
        LearnedPositionEmbedding(10, 4, offset=2, max_model_len=11, dtype=torch.float32)


def test_a_table_without_the_rows_before_the_first_position_is_refused():
    layer = LearnedPositionEmbedding(10, 4, offset=2, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"has shape \[10, 4\], expected \[12, 4\]"):
        layer.weight.weight_loader(layer.weight, randn(10, 4))


def test_capped_logits_keep_their_order_and_stay_below_the_cap():
    head, hidden = ParallelLMHead(70, 8, dtype=torch.float32), randn(3, 8, seed=1) * 1.5
    head.weight.weight_loader(head.weight, randn(70, 8))
    plain, capped = LogitsProcessor()(head, hidden), LogitsProcessor(soft_cap=5.0)(head, hidden)
    torch.testing.assert_close(capped, 5 * torch.tanh(plain / 5))
    assert capped.shape == plain.shape
    assert capped.abs().max() < 5 < plain.abs().max()
    assert capped.argmax(-1).equal(plain.argmax(-1))


def test_a_transposed_matrix_reads_what_is_asked_for_and_no_more():
    matrix = randn(6, 10)
    file = NarrowOnly(matrix)
    view = Transposed(file)
    assert tuple(view.shape) == (10, 6)
    assert view.narrow(0, 2, 3).equal(matrix.t()[2:5])
    assert file.read == 3 * 6
    assert view.narrow(1, 1, 2).equal(matrix.t()[:, 1:3])
    assert file.read == 3 * 6 + 2 * 10
    assert math.prod(view.narrow(0, 0, 10).shape) == matrix.numel()
