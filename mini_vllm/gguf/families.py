"""What is particular to each architecture that a GGUF file may hold: one row a family.

A row says which model class serves it, how its tensors are called in a Hugging Face checkpoint, how they are stored
differently there, and which config.json values the architecture itself fixes. Names on the GGUF side are those of
ggml's tensor naming standard; a name stands for its `.weight` and its `.bias`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mini_vllm.exceptions import UnsupportedModelError
from mini_vllm.gguf.metadata import Metadata
from mini_vllm.gguf.reader import GGUFFile


@dataclass(frozen=True)
class Family:
    """One architecture.

    blocks: module of a block (after `blk.N.`) -> module below `{layers}.N.` in the checkpoint's names. top: the same
    outside the blocks. constants: config.json values the architecture implies. options: reads the config.json values
    only this family has. rotary_pairs: modules whose rows are stored for interleaved rotary embedding, a pair of
    rotated dimensions side by side, where checkpoints have the two halves of a head one after the other. transposed:
    modules whose matrix checkpoints store the other way round. per_head: modules whose rows, one a head, are tensors of
    their own in checkpoints. norms_plus_one: norm weights include the 1 that the model adds.
    """

    architecture: str
    model_type: str
    blocks: Mapping[str, str]
    top: Mapping[str, str] = field(
        default_factory=lambda: {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    )
    layers: str = "model.layers"
    constants: Mapping[str, Any] = field(default_factory=dict)
    options: Callable[[Metadata], dict[str, Any]] = lambda metadata: {}
    rotary_pairs: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    per_head: Mapping[str, str] = field(default_factory=dict)
    norms_plus_one: bool = False


_LLAMA_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_FUSED = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
_WITHOUT_FUSED = {name: ours for name, ours in _LLAMA_BLOCKS.items() if name not in _FUSED}

_GEMMA2_BLOCKS = {
    **_LLAMA_BLOCKS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GPT2_BLOCKS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62

IGNORED_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Read with the config, not with the weights."""


def _llama_options(metadata: Metadata) -> dict[str, Any]:
    """Biases show in the tensors alone; a window makes it Mistral, which GGUF files as a llama."""
    tensors = metadata.file.tensors
    options: dict[str, Any] = {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }
    if window := _window(metadata):
        options |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return options


def _window(metadata: Metadata) -> int | None:
    """The sliding window; files of models without one may say 0."""
    return metadata.integer("attention.sliding_window", 0, minimum=0) or None


def _phi3_options(metadata: Metadata) -> dict[str, Any]:
    return {"sliding_window": _window(metadata)}


def _stablelm_options(metadata: Metadata) -> dict[str, Any]:
    tensors = metadata.file.tensors
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
        "use_parallel_residual": metadata.boolean("use_parallel_residual", "blk.0.ffn_norm.weight" not in tensors),
    }


def _gemma2_options(metadata: Metadata) -> dict[str, Any]:
    return {
        "sliding_window": metadata.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(metadata, _GEMMA2_27B_LAYERS),
    }


def _gemma3_options(metadata: Metadata) -> dict[str, Any]:
    pattern = metadata.get("attention.sliding_window_pattern")
    if pattern is not None and not isinstance(pattern, int):
        raise metadata.unsupported("attention.sliding_window_pattern", "given per layer is not supported")
    return {
        "sliding_window": metadata.integer("attention.sliding_window"),
        "sliding_window_pattern": pattern or 6,
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": metadata.get("final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scalar(metadata, _GEMMA3_27B_LAYERS),
    }


def _query_scalar(metadata: Metadata, layers_of_27b: int) -> int:
    """What scores are divided by the root of. The format has no key for it: the 27B models alone, known by their
    number of layers, take hidden size over heads, the others the size of a head."""
    if metadata.integer("block_count") == layers_of_27b:
        return metadata.integer("embedding_length") // metadata.integer("attention.head_count")
    return metadata.integer("attention.key_length")


def _gpt2_options(metadata: Metadata) -> dict[str, Any]:
    return {"layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon")}


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", "llama", _LLAMA_BLOCKS,
        constants={"hidden_act": "silu"}, options=_llama_options, rotary_pairs=("attn_q", "attn_k"),
    ),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", _LLAMA_BLOCKS, constants={"hidden_act": "silu"}),
    "qwen3": Family(
        "Qwen3ForCausalLM", "qwen3",
        {**_LLAMA_BLOCKS, **_QK_NORMS}, constants={"hidden_act": "silu"},
    ),
    "phi3": Family(
        "Phi3ForCausalLM", "phi3",
        {**_WITHOUT_FUSED, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        constants={"hidden_act": "silu"}, options=_phi3_options,
    ),
    "stablelm": Family(
        "StableLmForCausalLM", "stablelm", _LLAMA_BLOCKS,
        constants={"hidden_act": "silu"}, options=_stablelm_options,
        per_head={"attn_q_norm": "self_attn.q_layernorm.norms", "attn_k_norm": "self_attn.k_layernorm.norms"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", "gemma2", _GEMMA2_BLOCKS,
        constants={"hidden_act": "gelu_pytorch_tanh"}, options=_gemma2_options, norms_plus_one=True,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM", "gemma3_text", {**_GEMMA2_BLOCKS, **_QK_NORMS},
        constants={"hidden_act": "gelu_pytorch_tanh"}, options=_gemma3_options, norms_plus_one=True,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel", "gpt2", _GPT2_BLOCKS, _GPT2_TOP, "transformer.h",
        constants={"hidden_act": "gelu_new"}, options=_gpt2_options,
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}  # fmt: skip
"""general.architecture -> its family."""


def family_of(file: GGUFFile) -> Family:
    """The row of this file's architecture. Raises `UnsupportedModelError` listing those that are supported."""
    if file.architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"{file.path.name}: general.architecture {file.architecture!r} is not supported in GGUF files; supported "
            f"are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[file.architecture]
