"""Every model family and option that is compared with transformers: one row each.

`FAMILIES` drives parity (tests/models/test_family_parity.py), a subset of the master invariant over all families
(tests/integration/test_families_invariant.py) and the support table (scripts/support_table.py). A row is a config.json
as published checkpoints write it, tiny, and what it is there to show. The checkpoint gets random weights, scaled up so
that attention is peaked and logits are far apart, under the names that transformers gives the tensors.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB_SIZE = 128
MAX_MODEL_LEN = 128
FEATURES = (
    "tied",
    "bias",
    "window",
    "qk-norm",
    "partial rotary",
    "fused tensors",
    "layer norm",
    "no-rope layers",
    "soft caps",
    "learned positions",
)
"""What a row may say it has, beside its rope scaling."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """One row.

    config: config.json beyond `SIZES`, whose entries it may replace (None removes one). features: some of `FEATURES`;
    a test holds the row to them. max_model_len: what the engine is asked for, which decides between the two sides of
    a rope scaling. invariant: also runs through the master-invariant subset. std_of: standard deviation of a tensor by
    name and shape, where `default_std` is not right. norm_mean: what norm weights are spread around.
    """

    name: str
    config: Mapping[str, Any] = field(hash=False)
    features: tuple[str, ...] = ()
    max_model_len: int = MAX_MODEL_LEN
    invariant: bool = False
    std_of: Callable[[str, torch.Size], float] | None = None
    norm_mean: float = 1.0

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    def full_config(self) -> dict[str, Any]:
        """The whole config.json."""
        config = {**SIZES, **self.config}
        return {key: value for key, value in config.items() if value is not None or key in KEPT_NULLS}

    def write(self, folder: str | Path, *, seed: int = 0) -> Path:
        """Write the checkpoint into `folder` (created) and return it. Same seed, same bytes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.full_config(), indent=2), encoding="utf-8")
        save_file(self._random_tensors(folder, seed), folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def _random_tensors(self, folder: Path, seed: int) -> Tensors:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, meta in sorted(model.state_dict().items()):
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            std = (self.std_of or default_std)(name, meta.shape)
            mean = self.norm_mean if meta.dim() == 1 and name.endswith("weight") else 0.0
            tensors[name] = mean + std * torch.randn(meta.shape, generator=generator)
        return tensors


SCALE = 2.0
"""Standard deviation of a matrix times the square root of its inputs."""


def default_std(name: str, shape: torch.Size) -> float:
    """Matrices by their number of columns, embeddings 1, norms 0.3, biases half the outputs they are added to."""
    if len(shape) == 1:
        return SCALE / 2 if name.endswith("bias") and "norm" not in name else 0.3
    return 1.0 if "embed" in name else SCALE / math.sqrt(shape[-1])


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "rope_theta": 10000.0,
}
KEPT_NULLS = ("sliding_window", "bos_token_id")


def _config(architecture: str, model_type: str, **config: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **config}


def llama(**config: Any) -> dict[str, Any]:
    return _config("LlamaForCausalLM", "llama", **config)


def qwen2(**config: Any) -> dict[str, Any]:
    return _config("Qwen2ForCausalLM", "qwen2", **{"bos_token_id": None, **config})


def mistral(**config: Any) -> dict[str, Any]:
    return _config("MistralForCausalLM", "mistral", **{"sliding_window": None, **config})


def qwen3(**config: Any) -> dict[str, Any]:
    return _config("Qwen3ForCausalLM", "qwen3", **{"head_dim": 24, "attention_bias": False, **config})


def phi3(**config: Any) -> dict[str, Any]:
    return _config("Phi3ForCausalLM", "phi3", **{"sliding_window": None, "pad_token_id": 0, **config})


def stablelm(**config: Any) -> dict[str, Any]:
    return _config(
        "StableLmForCausalLM", "stablelm",
        **{"rms_norm_eps": None, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, **config},
    )  # fmt: skip


def llama4(**config: Any) -> dict[str, Any]:
    """Dense, one layer of each kind, sharpening every 16 tokens, a chunk as long as the longest request."""
    sizes = {"head_dim": 16, "intermediate_size_mlp": 80, "moe_layers": [], "num_hidden_layers": 3}
    attention = {"no_rope_layer_interval": 2, "floor_scale": 16, "attention_chunk_size": MAX_MODEL_LEN}
    return _config("Llama4ForCausalLM", "llama4_text", **{**sizes, **attention, "attn_scale": 0.5, **config})


def gemma2(**config: Any) -> dict[str, Any]:
    """Caps low enough to bend most scores and logits. Tied, and activated, by default of the family."""
    caps = {"attn_logit_softcapping": 10.0, "final_logit_softcapping": 2.0}
    return _gemma("Gemma2ForCausalLM", "gemma2", **caps, **config)


def gemma3(**config: Any) -> dict[str, Any]:
    return _gemma("Gemma3ForCausalLM", "gemma3_text", **config)


def _gemma(architecture: str, model_type: str, **config: Any) -> dict[str, Any]:
    ours = {"num_hidden_layers": 3, "head_dim": 24, "query_pre_attn_scalar": 40, "sliding_window": 16}
    usual = {"hidden_act": None, "tie_word_embeddings": None, "rope_theta": None, "pad_token_id": 0}
    return _config(architecture, model_type, **{**ours, **usual, **config})


def std_of_gemma(name: str, shape: torch.Size) -> float:
    """Small embeddings, which are scaled by 8 and tied: or every token would predict itself."""
    return 0.08 if "embed" in name else default_std(name, shape)


def opt(**config: Any) -> dict[str, Any]:
    others = ("intermediate_size", "num_key_value_heads", "hidden_act", "rms_norm_eps", "tie_word_embeddings")
    removed = dict.fromkeys((*others, "rope_theta"))
    return _config("OPTForCausalLM", "opt", **{**removed, "ffn_dim": 96, "pad_token_id": 0, **config})


def std_of_opt(name: str, shape: torch.Size) -> float:
    """Embeddings are tied: large ones would make every token predict itself. Large biases would drown them."""
    if len(shape) == 1:
        return 0.3
    return 0.6 if "embed" in name else default_std(name, shape)


def gpt2(**config: Any) -> dict[str, Any]:
    kept = ("vocab_size", "bos_token_id", "eos_token_id", "torch_dtype")
    removed = dict.fromkeys(key for key in SIZES if key not in kept)
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": MAX_MODEL_LEN}
    return _config("GPT2LMHeadModel", "gpt2", **{**removed, **sizes, **config})


def std_of_gpt2(name: str, shape: torch.Size) -> float:
    """As OPT's; matrices have their inputs in rows."""
    if len(shape) == 1:
        return 0.3
    embeds = (".wte.", ".wpe.", "lm_head.")
    return 0.6 if any(embed in name for embed in embeds) else SCALE / math.sqrt(shape[0])


def rope_scaling(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, **values}}


def longrope(pairs: int) -> dict[str, Any]:
    """Phi-3's spelling: the lists in the object, the original context beside it. Both lists matter to every pair."""
    short = [1.0 + 0.05 * pair for pair in range(pairs)]
    long = [1.2 + 1.5 * pair for pair in range(pairs)]
    return {
        "rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long},
        "original_max_position_embeddings": ORIGINAL,
    }


ORIGINAL = 64
"""The context before scaling, half of what the scaled rows are asked for."""
LLAMA3 = rope_scaling(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=ORIGINAL
)
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}

FAMILIES: tuple[Family, ...] = (
    Family("llama", llama(), invariant=True),
    Family("llama-tied-biased", llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True), ("tied", "bias")),
    Family("llama-rope-linear", llama(**rope_scaling("linear", factor=4.0), max_position_embeddings=32)),
    Family("llama-rope-llama3", llama(**LLAMA3, rope_theta=5e5)),
    Family("llama-rope-yarn", llama(**rope_scaling("yarn", **YARN), max_position_embeddings=32)),
    Family(
        "llama-rope-yarn-options",
        llama(**rope_scaling("yarn", **YARN, truncate=False, beta_fast=4, beta_slow=1, mscale=2.0, mscale_all_dim=0.5)),
    ),
    Family(
        "llama-rope-dynamic-within",
        llama(**rope_scaling("dynamic", factor=4.0), max_position_embeddings=ORIGINAL),
        max_model_len=ORIGINAL,
    ),
    Family(
        "llama-rope-dynamic-beyond",
        llama(**rope_scaling("dynamic", factor=4.0), max_position_embeddings=ORIGINAL),
        invariant=True,
    ),
    Family("llama4-dense", llama4(), ("qk-norm", "no-rope layers"), invariant=True),
    Family(
        "llama4-dense-without-norms",
        llama4(use_qk_norm=False, attn_temperature_tuning=False, attention_bias=True, rope_theta=1e4, **LLAMA3),
        ("bias", "no-rope layers"),
    ),
    Family("qwen2", qwen2(), ("bias",)),
    Family("qwen2-window-tied", qwen2(**SLIDING, tie_word_embeddings=True), ("bias", "window", "tied"), invariant=True),
    Family("qwen2-rope-yarn", qwen2(rope_scaling={"type": "yarn", **YARN}, max_position_embeddings=32), ("bias",)),
    Family("mistral-window", mistral(sliding_window=16), ("window",), invariant=True),
    Family("mistral-wide-heads", mistral(head_dim=24, rope_theta=1e6)),
    Family("qwen3", qwen3(), ("qk-norm",), invariant=True),
    Family(
        "qwen3-window-tied-biased",
        qwen3(**SLIDING, tie_word_embeddings=True, attention_bias=True),
        ("qk-norm", "bias", "window", "tied"),
    ),
    Family("phi3-window", phi3(sliding_window=15), ("window", "fused tensors"), invariant=True),
    Family("phi3-longrope-within", phi3(**longrope(8)), ("fused tensors",), max_model_len=ORIGINAL),
    Family("phi3-longrope-beyond", phi3(**longrope(8)), ("fused tensors",), invariant=True),
    Family(
        "phi4-mini",
        phi3(**longrope(6), partial_rotary_factor=0.75, tie_word_embeddings=True),
        ("fused tensors", "partial rotary", "tied"),
    ),
    Family("stablelm", stablelm(use_qkv_bias=True), ("layer norm", "partial rotary", "bias"), invariant=True),
    Family(
        "stablelm-2-12b",
        stablelm(qk_layernorm=True, use_parallel_residual=True, partial_rotary_factor=0.5),
        ("layer norm", "partial rotary", "qk-norm"),
        invariant=True,
    ),
    Family("gemma2", gemma2(), ("tied", "window", "soft caps"), invariant=True, std_of=std_of_gemma),
    Family(
        "gemma2-all-windows-biased",
        gemma2(layer_types=["sliding_attention"] * 3, attention_bias=True, tie_word_embeddings=False),
        ("bias", "window", "soft caps"),
        std_of=std_of_gemma,
    ),
    Family(
        "gemma3-rope-linear",
        gemma3(
            sliding_window_pattern=3, rope_theta=5e4, rope_local_base_freq=2e3, **rope_scaling("linear", factor=8.0)
        ),
        ("tied", "window", "qk-norm"),
        std_of=std_of_gemma,
        invariant=True,
    ),
    Family(
        "gemma3-new-spelling",
        gemma3(
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
            final_logit_softcapping=2.0,
        ),
        ("tied", "window", "qk-norm", "soft caps"),
        std_of=std_of_gemma,
    ),
    Family("opt", opt(), ("tied", "bias", "learned positions", "layer norm"), invariant=True, std_of=std_of_opt),
    Family(
        "opt-350m",
        opt(do_layer_norm_before=False, word_embed_proj_dim=32),
        ("tied", "bias", "learned positions", "layer norm"),
        std_of=std_of_opt,
        invariant=True,
    ),
    Family(
        "opt-galactica",
        opt(activation_function="gelu", enable_bias=False, _remove_final_layer_norm=True, tie_word_embeddings=False),
        ("learned positions", "layer norm"),
        std_of=std_of_opt,
    ),
    Family(
        "gpt2",
        gpt2(),
        ("tied", "bias", "learned positions", "layer norm", "fused tensors"),
        std_of=std_of_gpt2,
        invariant=True,
    ),
    Family(
        "gpt2-untied-scores-by-layer",
        gpt2(n_inner=96, activation_function="gelu", scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False),
        ("bias", "learned positions", "layer norm", "fused tensors"),
        std_of=std_of_gpt2,
    ),
)
KNOWN_AS: dict[str, str] = {
    "GPT2LMHeadModel": "GPT-2 small to XL, DistilGPT2",
    "Gemma2ForCausalLM": "Gemma 2 2B, 9B, 27B",
    "Gemma3ForCausalLM": "Gemma 3 270M, 1B",
    "Llama4ForCausalLM": "Llama 4 text where dense; the published ones have experts, and are refused by name",
    "LlamaForCausalLM": "Llama 2, 3, 3.1, 3.2, 3.3; TinyLlama, SmolLM, Yi, Vicuna",
    "MistralForCausalLM": "Mistral 7B, Nemo, Small",
    "OPTForCausalLM": "OPT 125M to 66B, Galactica",
    "Phi3ForCausalLM": "Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4 mini",
    "Qwen2ForCausalLM": "Qwen2, Qwen2.5",
    "Qwen3ForCausalLM": "Qwen3 (dense)",
    "StableLmForCausalLM": "StableLM 3B, Zephyr 3B, StableLM 2 1.6B and 12B",
}
"""Checkpoints that are published under an architecture."""
BY_NAME = {family.name: family for family in FAMILIES}
