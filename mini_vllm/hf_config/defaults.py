"""How families differ in what they call a key of config.json, and in what it means to leave one out."""

from typing import Any

KEY_NAMES: dict[str, dict[str, str]] = {
    "gemma2": {"hidden_act": "hidden_activation"},
    "gemma3_text": {"hidden_act": "hidden_activation"},
    "gpt2": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
    },
    "opt": {"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
}
"""What files of a model_type call a key that most call otherwise. The usual name is read where theirs is not given."""
_GEMMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
MODEL_TYPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {
        **_GEMMA_DEFAULTS,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**_GEMMA_DEFAULTS, "sliding_window_pattern": 6},
    "gpt2": {
        "hidden_act": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    "opt": {
        "hidden_act": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    "llama4_text": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "intermediate_size_mlp": 16384,
        "interleave_moe_layer_step": 1,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "phi3": {"rms_norm_eps": 1e-5},
    "qwen3": {"head_dim": 128},
    "stablelm": {"layer_norm_eps": 1e-5},
}
"""What a key that changes results means where a file of this model_type omits it, when not what others mean."""
