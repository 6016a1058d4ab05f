"""Norm, rotary, activation, embedding and logits, each against its formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from mini_vllm.distributed.parallel_state import use_tp_group
from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig, RopeConfig
from mini_vllm.layers.activation import SiluAndMul, get_act_and_mul
from mini_vllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from mini_vllm.layers.logits import LogitsProcessor
from mini_vllm.layers.norm import RMSNorm
from mini_vllm.layers.rotary import RotaryEmbedding, apply_rotary
from tests.layers.test_linear import FakeGroup, on_ranks, randn

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
}


def test_rms_norm_is_its_formula_and_carries_the_residual():
    norm = RMSNorm(16, 1e-5, dtype=torch.float32)
    norm.weight.weight_loader(norm.weight, randn(16))
    x, residual = randn(3, 16, seed=1), randn(3, 16, seed=2)
    total = x + residual
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    normed, carried = norm(x, residual)
    torch.testing.assert_close(normed, expected)
    assert carried.equal(total)
    alone, carried = norm(x)
    assert carried is x
    torch.testing.assert_close(alone, norm(x, torch.zeros_like(x))[0])
    assert not torch.allclose(alone, normed, atol=1e-2)


def test_rms_norm_refuses_a_weight_of_another_size():
    norm = RMSNorm(16, 1e-5, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"has shape \[8\], expected \[16\]"):
        norm.weight.weight_loader(norm.weight, randn(8))


def theirs(rope, head_dim, x, positions):
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=4096,
        rope_parameters=rope,
    )  # fmt: skip
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    heads = x.transpose(0, 1)[None]
    return apply_rotary_pos_emb(heads, heads, cos, sin)[0][0].transpose(0, 1)


def our_rope(rope):
    base = {"architectures": ["x"], "vocab_size": 2, "hidden_size": 64, "intermediate_size": 2, "num_hidden_layers": 1}
    d = base | {"num_attention_heads": 4, "max_position_embeddings": 4096, "rope_parameters": rope}
    return HFConfig.from_dict(d).rope


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("head_dim", [16, 24])
def test_rotary_turns_heads_as_transformers_does(name, head_dim):
    positions = torch.tensor([0, 1, 2, 63, 64, 1000, 4095])
    x = randn(len(positions), 4, head_dim)
    ours = apply_rotary(x, RotaryEmbedding(head_dim, our_rope(ROPES[name]))(positions))
    torch.testing.assert_close(ours, theirs(ROPES[name], head_dim, x, positions), atol=1e-5, rtol=1e-5)
    for other in ROPES.keys() - {name}:
        wrong = apply_rotary(x, RotaryEmbedding(head_dim, our_rope(ROPES[other]))(positions))
        assert (ours - wrong).abs().max() > 0.1, other


def test_partial_rotary_turns_the_first_dimensions_only():
    x, positions = randn(3, 2, 16), torch.tensor([0, 5, 9])
    rotary = RotaryEmbedding(16, RopeConfig(partial_rotary_factor=0.5))
    turned = apply_rotary(x, rotary(positions))
    assert turned[..., 8:].equal(x[..., 8:])
    whole = apply_rotary(x[..., :8], RotaryEmbedding(8, RopeConfig())(positions))
    assert turned[..., :8].equal(whole)


def test_rotary_keeps_norms_and_depends_on_distance_only():
    rotary, q, k = RotaryEmbedding(16, RopeConfig()), randn(1, 1, 16), randn(1, 1, 16, seed=1)

    def score(query_position, key_position):
        turn = [apply_rotary(x, rotary(torch.tensor([p]))) for x, p in ((q, query_position), (k, key_position))]
        return float((turn[0] * turn[1]).sum())

    assert math.isclose(score(9, 4), score(109, 104), abs_tol=1e-4)
    assert not math.isclose(score(9, 4), score(9, 5), abs_tol=1e-2)


def test_rotary_angles_stay_exact_in_bfloat16_models():
    x = randn(1, 2, 16).bfloat16()
    turned = apply_rotary(x, RotaryEmbedding(16, RopeConfig())(torch.tensor([3001])))
    exact = apply_rotary(x.float(), RotaryEmbedding(16, RopeConfig())(torch.tensor([3001])))
    assert turned.dtype is torch.bfloat16
    torch.testing.assert_close(turned, exact.bfloat16(), atol=0, rtol=0)


def test_an_odd_number_of_rotated_dimensions_is_refused():
    with pytest.raises(CheckpointError, match=r"head_dim 10 \* partial_rotary_factor 0.5"):
        RotaryEmbedding(10, RopeConfig(partial_rotary_factor=0.5))


def test_silu_and_mul_takes_the_gate_first():
    gate, up = randn(3, 8), randn(3, 8, seed=1)
    torch.testing.assert_close(SiluAndMul()(torch.cat((gate, up), -1)), F.silu(gate) * up)


def test_other_activations_are_refused_by_name():
    assert isinstance(get_act_and_mul("silu"), SiluAndMul)
    with pytest.raises(UnsupportedModelError, match="hidden_act 'relu' is not supported; supported are silu"):
        get_act_and_mul("relu")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_embedding_ranks_sum_to_the_whole_and_padding_rows_are_zero(world_size):
    table, ids = randn(70, 8), torch.tensor([0, 69, 31, 32, 35, 0])
    layers = on_ranks(world_size, lambda: VocabParallelEmbedding(70, 8, dtype=torch.float32, padding_size=16))
    for layer in layers:
        layer.weight.data.fill_(float("nan"))
        layer.weight.weight_loader(layer.weight, table)
        assert (layer.org_vocab_size, layer.num_embeddings_padded) == (
            70,
            80 if world_size == 1 else 96 if world_size == 2 else 128,
        )
    assert torch.cat([layer.weight for layer in layers])[70:].eq(0).all()
    assert sum(layer(ids) for layer in layers).equal(table[ids])


def test_embedding_refuses_a_table_of_another_size():
    layer = VocabParallelEmbedding(70, 8, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"has shape \[64, 8\], expected \[70, 8\]"):
        layer.weight.weight_loader(layer.weight, randn(64, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32_rows_of_the_original_vocabulary(dtype):
    head = ParallelLMHead(70, 8, dtype=dtype)
    table, hidden = randn(70, 8).to(dtype), randn(3, 8, seed=1).to(dtype)
    head.weight.weight_loader(head.weight, table)
    logits = LogitsProcessor()(head, hidden)
    assert logits.dtype is torch.float32
    assert logits.shape == (3, 70)
    torch.testing.assert_close(logits, F.linear(hidden, table).float(), atol=1e-6, rtol=1e-2)


def test_the_head_is_no_look_up_table():
    with pytest.raises(RuntimeError, match="LogitsProcessor"):
        ParallelLMHead(70, 8, dtype=torch.float32)(torch.tensor([1]))


def test_a_tied_head_shares_the_table_and_packing_it_leaves_the_embedding_intact():
    embedding = VocabParallelEmbedding(70, 16, dtype=torch.bfloat16)
    head = ParallelLMHead(70, 16, dtype=torch.bfloat16).tie_weights(embedding)
    table, hidden = randn(70, 16).bfloat16(), randn(3, 16, seed=1).bfloat16()
    embedding.weight.weight_loader(embedding.weight, table)
    for layer in (embedding, head):
        layer.quant_method.process_weights_after_loading(layer)
    assert embedding(torch.tensor([5, 69])).equal(table[[5, 69]])
    torch.testing.assert_close(LogitsProcessor()(head, hidden), F.linear(hidden, table).float(), atol=2e-2, rtol=2e-2)


def test_vocabulary_rows_are_dealt_to_ranks_in_order():
    with use_tp_group(FakeGroup(1, 2)):
        layer = VocabParallelEmbedding(128, 4, dtype=torch.float32)
    assert (layer.vocab_start, layer.num_embeddings_per_partition) == (64, 64)
