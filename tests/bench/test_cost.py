"""Bytes and operations of a step, against figures worked out by hand for a Qwen2.5-0.5B shape."""

import itertools
from typing import Any

import pytest

from mini_vllm.bench.cost import ModelShape, StepCost, attended_keys, attended_pairs, step_cost
from mini_vllm.hf_config import HFConfig

QWEN = HFConfig.from_dict(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
)
SHAPE = ModelShape.from_config(QWEN, "bfloat16")
EMBEDDING = 151_936 * 896
LAYER_MATRICES = 896 * 896 + 2 * 896 * 128 + 896 * 896 + 3 * 896 * 4864
LAYER_REST = (896 + 2 * 128) + 2 * 896  # q, k and v biases; two norms


def test_parameters_are_those_the_model_card_says() -> None:
    assert SHAPE.num_parameters == 494_032_768
    assert SHAPE.matmul_parameters == 24 * LAYER_MATRICES
    assert SHAPE.other_parameters == 24 * LAYER_REST + 896


@pytest.mark.parametrize(
    ("changes", "published"),
    [
        ({"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
          "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}, 596_049_920),
        ({"model_type": "gemma2", "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216,
          "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}, 2_614_341_888),
        ({"model_type": "llama", "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632,
          "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
          "tie_word_embeddings": False}, 1_100_048_384),
    ],
    ids=["qwen3-0.6b", "gemma-2-2b", "tinyllama-1.1b"],
)  # fmt: skip
def test_other_families_count_as_published(changes: dict[str, Any], published: int) -> None:
    assert ModelShape.from_config(HFConfig.from_dict(QWEN.raw | changes), "bfloat16").num_parameters == published


def test_a_decode_step_reads_988_megabytes_of_weights() -> None:
    assert SHAPE.weight_bytes_per_decode_step == 988_065_536
    cost = step_cost(SHAPE, [(128, 1)], sampled_rows=1)
    assert cost.weight_bytes == 988_065_536 + 896 * 2  # and one row of the embedding
    assert step_cost(SHAPE, [(128, 1)] * 32, sampled_rows=32).weight_bytes == 988_065_536 + 32 * 896 * 2


def test_a_token_has_12288_bytes_of_keys_and_values() -> None:
    assert SHAPE.kv_bytes_per_token == 12_288
    cost = step_cost(SHAPE, [(127, 1), (255, 1)], sampled_rows=2)
    assert cost.kv_write_bytes == 2 * 12_288
    assert cost.kv_read_bytes == (128 + 256) * 12_288


def test_float32_doubles_the_bytes_and_leaves_the_operations() -> None:
    half, full = (step_cost(ModelShape.from_config(QWEN, dtype), [(9, 3)], 1) for dtype in ("bfloat16", "float32"))
    assert full.num_bytes == 2 * half.num_bytes
    assert full.flops == half.flops


def test_a_decode_step_computes_two_operations_a_parameter() -> None:
    cost = step_cost(SHAPE, [(0, 1)], sampled_rows=1)
    assert cost.matmul_flops == 2 * (24 * LAYER_MATRICES + EMBEDDING) == 987_922_432
    assert cost.attention_flops == 4 * 24 * 14 * 64  # one pair a head: a score and a weighted sum over 64 numbers


def test_a_prefill_of_512_tokens_computes_its_logits_once() -> None:
    cost = step_cost(SHAPE, [(0, 512)], sampled_rows=1)
    assert cost.matmul_flops == 512 * 2 * 24 * LAYER_MATRICES + 2 * EMBEDDING
    assert cost.attention_flops == 4 * 24 * 14 * 64 * (512 * 513 // 2)
    assert cost.kv_read_bytes == cost.kv_write_bytes == 512 * 12_288


def test_a_chunk_that_samples_nothing_leaves_the_output_matrix_alone() -> None:
    cost = step_cost(SHAPE, [(0, 256)], sampled_rows=0)
    assert cost.matmul_flops == 256 * 2 * 24 * LAYER_MATRICES
    assert cost.weight_bytes == (24 * (LAYER_MATRICES + LAYER_REST) + 896 + 256 * 896) * 2


def test_chunks_of_a_prompt_add_up_to_the_whole_prompt_in_operations_but_not_in_bytes() -> None:
    whole = step_cost(SHAPE, [(0, 300)], 1)
    parts = step_cost(SHAPE, [(0, 100)], 0) + step_cost(SHAPE, [(100, 200)], 1)
    assert parts.flops == whole.flops
    assert parts.num_bytes > whole.num_bytes  # the weights are read twice, the first keys again


def test_an_untied_model_stores_two_matrices_and_reads_one_a_step() -> None:
    tied = SHAPE
    untied = ModelShape.from_config(HFConfig.from_dict({**QWEN.raw, "tie_word_embeddings": False}), "bfloat16")
    assert untied.num_parameters == tied.num_parameters + EMBEDDING
    assert untied.weight_bytes_per_decode_step == tied.weight_bytes_per_decode_step


@pytest.mark.parametrize("window", [None, 1, 2, 5, 16])
def test_attention_counts_equal_a_count_one_by_one(window: int | None) -> None:
    for start, count in itertools.product((0, 1, 4, 5, 9), (1, 2, 6, 13)):
        seen = [range(max(0, i + 1 - window) if window else 0, i + 1) for i in range(start, start + count)]
        assert attended_pairs(start, count, window) == sum(map(len, seen))
        assert attended_keys(start, count, window) == len(set().union(*seen))


def test_layers_with_a_window_read_less() -> None:
    mixed = ModelShape.from_config(QWEN, "bfloat16", [(None, 12), (100, 12)])
    cost = step_cost(mixed, [(999, 1)], 1)
    assert cost.kv_read_bytes == 12 * (1000 + 100) * mixed.kv_bytes_per_token_and_layer
    assert cost.attention_flops == 4 * 14 * 64 * 12 * (1000 + 100)


def test_a_step_without_tokens_costs_nothing() -> None:
    assert step_cost(SHAPE, [], 0) == StepCost()
