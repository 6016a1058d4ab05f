"""config.json files as they are published, with two of their layers: understood, and the same tensors as transformers'.

Nothing is computed, so the sizes are the real ones. Lists of longrope factors are made up: only their length counts.
"""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.attention import get_attention_layers
from mini_vllm.models.utils import expected_tensors
from tests.models.small import build

COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}
PHI3 = COMMON | {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 32, "rms_norm_eps": 1e-05, "attention_bias": False, "attention_dropout": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "pad_token_id": 32000, "eos_token_id": 32000,
    "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
}  # fmt: skip
FACTORS = {"long_factor": [1.0 + i for i in range(48)], "short_factor": [1.0] * 48, "type": "longrope"}
STABLELM = COMMON | {
    "architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "layer_norm_eps": 1e-05, "rope_theta": 10000,
    "partial_rotary_factor": 0.25, "vocab_size": 100352, "max_position_embeddings": 4096,
    "bos_token_id": 100257, "eos_token_id": 100257, "tie_word_embeddings": False, "num_attention_heads": 32,
    "rope_scaling": None, "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
MISTRAL = COMMON | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}  # fmt: skip

PUBLISHED = {
    "Mistral-7B-v0.1": MISTRAL | {
        "hidden_size": 4096, "num_hidden_layers": 32, "max_position_embeddings": 32768, "rope_theta": 10000.0,
        "sliding_window": 4096, "vocab_size": 32000,
    },
    "Mistral-Nemo": MISTRAL | {
        "hidden_size": 5120, "num_hidden_layers": 40, "max_position_embeddings": 1024000, "rope_theta": 1000000.0,
        "sliding_window": None, "vocab_size": 131072, "head_dim": 128, "attention_dropout": 0.0,
    },
    "Qwen3-0.6B": COMMON | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Phi-3-mini-4k": PHI3 | {
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "rope_scaling": None,
        "max_position_embeddings": 4096, "sliding_window": 2047,
    },
    "Phi-3-mini-128k": PHI3 | {
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "rope_scaling": FACTORS,
        "max_position_embeddings": 131072, "sliding_window": 262144,
    },
    "Phi-4-mini": PHI3 | {
        "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "rope_scaling": FACTORS,
        "max_position_embeddings": 131072, "sliding_window": 262144, "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True, "mlp_bias": False, "lm_head_bias": False,
        "bos_token_id": 199999, "eos_token_id": 199999, "pad_token_id": 199999,
    },
    "stablelm-2-1_6b": STABLELM | {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_key_value_heads": 32,
        "use_qkv_bias": True,
    },
    "stablelm-2-12b": STABLELM | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "use_qkv_bias": False, "qk_layernorm": True, "use_parallel_residual": True,
    },
    "Llama-3.2-1B": COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "head_dim": 64,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_size": 2048, "mlp_bias": False,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32, "pretraining_tp": 1,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": True, "vocab_size": 128256,
    },
    "Qwen2.5-7B with yarn": COMMON | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 152064,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
}  # fmt: skip
EXPECTED = {
    "Mistral-7B-v0.1": (32768, 32768, 128, 128, 4096),
    "Mistral-Nemo": (1024000, 1024000, 128, 128, None),
    "Qwen3-0.6B": (40960, 40960, 128, 128, None),
    "Phi-3-mini-4k": (4096, 4096, 96, 96, 2047),
    "Phi-3-mini-128k": (131072, 4096, 96, 96, 262144),
    "Phi-4-mini": (131072, 4096, 128, 96, 262144),
    "stablelm-2-1_6b": (4096, 4096, 64, 16, None),
    "stablelm-2-12b": (4096, 4096, 160, 40, None),
    "Llama-3.2-1B": (131072, 131072, 64, 64, None),
    "Qwen2.5-7B with yarn": (131072, 131072, 128, 128, None),
}
"""Longest request, longest unless more is asked for, head size, rotated part of it, window."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_lengths_heads_and_window_are_those_of_the_file(name):
    config = PUBLISHED[name] | {"num_hidden_layers": 2}
    hf_config, model = HFConfig.from_dict(config), build(config)
    (attention,) = {(layer.head_size, layer.sliding_window) for layer in get_attention_layers(model).values()}
    lengths = hf_config.derived_max_model_len, hf_config.default_max_model_len
    assert (*lengths, attention[0], model.model.rotary_emb.rotary_dim, attention[1]) == EXPECTED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_checkpoints_tensors_are_those_that_transformers_expects(name, tmp_path):
    config = PUBLISHED[name] | {"num_hidden_layers": 2}
    without_code = {key: value for key, value in config.items() if key != "auto_map"}
    (tmp_path / "config.json").write_text(json.dumps(without_code), encoding="utf-8")
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).state_dict()
    if config["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    ours = build(config)
    slots = expected_tensors(ours, ours.packed_modules_mapping)
    assert set(slots) == set(theirs)
    padding = sum(
        (module.num_embeddings_padded - module.org_vocab_size) * module.embedding_dim
        for module in [ours.model.embed_tokens, *([] if config["tie_word_embeddings"] else [ours.lm_head])]
    )
    params = {id(param): param for param in ours.parameters()}
    assert sum(param.numel() for param in params.values()) - padding == sum(t.numel() for t in theirs.values())
