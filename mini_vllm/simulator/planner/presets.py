"""Shapes of well-known models under short names, so that a plan needs no file.

Each is the part of the published config.json that decides sizes, in its own spelling, and is read the way a file is
(`config.py`). `BUNDLED` names the model that comes with the package and is read from its folder.
"""

import difflib
from pathlib import Path
from typing import Any

from mini_vllm.exceptions import ConfigError
from mini_vllm.hf_config import CONFIG_FILE
from mini_vllm.hf_config.reader import read_json
from mini_vllm.simulator.planner.config import geometry_from_config
from mini_vllm.simulator.planner.geometry import ModelGeometry

BUNDLED = "stdlib-llama-3.7m"
_ASSETS = Path(__file__).resolve().parents[2] / "assets"


def _config(family: str, layers: int, hidden: int, inter: int, heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    """The keys every family has; `more` wins."""
    return {
        "architectures": [family],
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
        **more,
    }


def _opt(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    more = {"max_position_embeddings": 2048, "torch_dtype": "float16", "ffn_dim": 4 * hidden}
    return _config("opt", layers, hidden, 4 * hidden, heads, 50272, **more)


_LLAMA3 = {"num_key_value_heads": 8, "max_position_embeddings": 8192}
_LLAMA31 = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN25 = {"max_position_embeddings": 32768}
_QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960}
_DEEPSEEK_V3 = {
    "num_key_value_heads": 128, "max_position_embeddings": 163840, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "topk_method": "noaux_tc",
}  # fmt: skip
_DEEPSEEK_V2_LITE = {
    "num_key_value_heads": 16, "max_position_embeddings": 163840, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
}  # fmt: skip
_JAMBA = {
    "num_key_value_heads": 8, "max_position_embeddings": 262144, "attn_layer_period": 8, "attn_layer_offset": 4,
    "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 16, "num_experts_per_tok": 2,
    "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_dt_rank": 256,
}  # fmt: skip

MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12,
        "n_positions": 1024, "vocab_size": 50257, "torch_dtype": "float32",
    },
    "opt-125m": _opt(12, 768, 12),
    "opt-1.3b": _opt(24, 2048, 32),
    "llama-2-7b": _config("llama", 32, 4096, 11008, 32, 32000, max_position_embeddings=4096, torch_dtype="float16"),
    "llama-3-8b": _config("llama", 32, 4096, 14336, 32, 128256, **_LLAMA3),
    "llama-3-70b": _config("llama", 80, 8192, 28672, 64, 128256, **_LLAMA3),
    "llama-3.1-8b": _config("llama", 32, 4096, 14336, 32, 128256, **_LLAMA31),
    "llama-3.1-70b": _config("llama", 80, 8192, 28672, 64, 128256, **_LLAMA31),
    "llama-3.1-405b": _config("llama", 126, 16384, 53248, 128, 128256, **_LLAMA31),
    "llama-3.2-1b": _config("llama", 16, 2048, 8192, 32, 128256, **_LLAMA31, tie_word_embeddings=True),
    "llama-3.2-3b": _config("llama", 28, 3072, 8192, 24, 128256, **_LLAMA31, tie_word_embeddings=True),
    "mistral-7b": _config(
        "mistral", 32, 4096, 14336, 32, 32000, num_key_value_heads=8, sliding_window=4096, max_position_embeddings=32768
    ),
    "mixtral-8x7b": _config(
        "mixtral", 32, 4096, 14336, 32, 32000, num_key_value_heads=8, max_position_embeddings=32768,
        num_local_experts=8, num_experts_per_tok=2,
    ),
    "qwen2.5-0.5b": _config(
        "qwen2", 24, 896, 4864, 14, 151936, num_key_value_heads=2, tie_word_embeddings=True, **_QWEN25
    ),
    "qwen2.5-1.5b": _config(
        "qwen2", 28, 1536, 8960, 12, 151936, num_key_value_heads=2, tie_word_embeddings=True, **_QWEN25
    ),
    "qwen2.5-7b": _config("qwen2", 28, 3584, 18944, 28, 152064, num_key_value_heads=4, **_QWEN25),
    "qwen2.5-72b": _config("qwen2", 80, 8192, 29568, 64, 152064, num_key_value_heads=8, **_QWEN25),
    "qwen3-0.6b": _config("qwen3", 28, 1024, 3072, 16, 151936, tie_word_embeddings=True, **_QWEN3),
    "qwen3-8b": _config("qwen3", 36, 4096, 12288, 32, 151936, **_QWEN3),
    "gemma-2-9b": _config(
        "gemma2", 42, 3584, 14336, 16, 256000, num_key_value_heads=8, max_position_embeddings=8192
    ),
    "deepseek-v2-lite": _config("deepseek_v2", 27, 2048, 10944, 16, 102400, **_DEEPSEEK_V2_LITE),
    "deepseek-v3": _config("deepseek_v3", 61, 7168, 18432, 128, 129280, **_DEEPSEEK_V3),
    "jamba-v0.1": _config("jamba", 32, 4096, 14336, 32, 65536, **_JAMBA),
}  # fmt: skip


def preset_names() -> list[str]:
    return [*MODEL_PRESETS, BUNDLED]


def preset_config(name: str) -> dict[str, Any]:
    """The config.json of a preset, as far as it matters here. Raises `ConfigError` with the nearest names."""
    key = name.lower()
    if key == BUNDLED:
        return read_json(_ASSETS / BUNDLED / CONFIG_FILE)
    if key not in MODEL_PRESETS:
        raise ConfigError(f"preset: no model is called {name!r}{nearest(key, preset_names())}")
    return MODEL_PRESETS[key]


def preset_geometry(name: str) -> ModelGeometry:
    return geometry_from_config(preset_config(name), name.lower())


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean ...' where something is near, else all there is."""
    begun = [other for other in known if name.startswith(f"{other}-")]  # 'h100-80g': more was said than there is to say
    close = begun or difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(known)}"
