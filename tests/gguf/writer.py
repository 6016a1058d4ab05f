"""From a small safetensors checkpoint to a GGUF file, as converters for that format do it, for tests alone.

Written against the GGUF specification, with none of the package's own tables: names, the interleaved rows of a llama's
query and key, and quantisation by the `gguf` package. `round_trip` gives what reading a type back must give.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_layernorm.norms": "attn_q_norm",
    "self_attn.k_layernorm.norms": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GPT2_NAMES = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
TOP = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
}  # fmt: skip
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
"""model_type -> general.architecture, where they differ."""

ChooseType = Callable[[str, np.ndarray], Type]
Encode = Callable[[str, np.ndarray, Type], np.ndarray]
"""(checkpoint name, array as stored, type) -> the stored bytes."""


def matrices_as(kind: Type) -> ChooseType:
    """Vectors stay F32, as all converters have it; matrices become `kind`."""
    return lambda name, array: kind if array.ndim > 1 else Type.F32


def gguf_name(name: str, architecture: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    match = re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)", module)
    assert match is not None, name
    names = GEMMA_NAMES if "gemma" in architecture else GPT2_NAMES if architecture == "gpt2" else NAMES
    return f"blk.{match[1]}.{names[match[2]]}.{leaf}"


def as_stored(name: str, array: np.ndarray, config: dict[str, Any], architecture: str) -> np.ndarray:
    """What converters do to numbers: pairs side by side for llama, the 1 of Gemma's norms, GPT-2's other way round."""
    if architecture == "llama" and ".q_proj." in name:
        return interleave(array, config["num_attention_heads"])
    if architecture == "llama" and ".k_proj." in name:
        return interleave(array, config["num_key_value_heads"])
    if "gemma" in architecture and name.endswith("norm.weight"):
        return array + 1
    return array.T if architecture == "gpt2" and ".c_" in name else array


def stack_heads(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of one head each, `...norms.3.weight`, as rows of one."""
    stacked: dict[str, list[np.ndarray]] = {}
    for name, array in arrays.items():
        stacked.setdefault(re.sub(r"norms\.\d+", "norms", name), []).append(array)
    return {name: np.stack(parts) if "norms" in name else parts[0] for name, parts in stacked.items()}


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from [first half, second half] to pairs side by side."""
    return array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def deinterleave(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    return array.reshape(heads, len(array) // heads // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def round_trip(array: np.ndarray, kind: Type) -> np.ndarray:
    """What a file that stores `array` as `kind` says its numbers are."""
    return np.asarray(gguf.dequantize(gguf.quantize(array, kind), kind), dtype=np.float32).reshape(array.shape)


def load_arrays(folder: Path) -> dict[str, np.ndarray]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def write_gguf(
    folder: Path,
    file: Path,
    choose: ChooseType | None = None,
    *,
    permute: bool = True,
    drop: tuple[str, ...] = (),
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    tokenizer: bool = True,
    encode: Encode = lambda name, array, kind: gguf.quantize(np.ascontiguousarray(array), kind),
    **writer_arguments: Any,
) -> Path:
    """`folder`'s checkpoint as `file`. permute: convert numbers too. change: adds or replaces metadata last."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(file, architecture, **writer_arguments)
    add_config(writer, config)
    if tokenizer and (folder / "tokenizer.json").is_file():
        add_bpe_tokenizer(writer, folder, padded_to=config["vocab_size"])
    if change is not None:
        change(writer)
    for name, array in stack_heads(load_arrays(folder)).items():
        if name in drop:
            continue
        stored = as_stored(name, array, config, architecture) if permute else array
        kind = (choose or matrices_as(Type.F32))(name, stored)
        writer.add_tensor(gguf_name(name, architecture), encode(name, stored, kind), raw_dtype=kind)
    finish(writer)
    return file


def add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config.get("num_attention_heads") or config["n_head"]
    hidden = config.get("hidden_size") or config["n_embd"]
    writer.add_embedding_length(hidden)
    writer.add_head_count(heads)
    writer.add_context_length(config.get("max_position_embeddings") or config["n_positions"])
    writer.add_block_count(config.get("num_hidden_layers") or config["n_layer"])
    writer.add_feed_forward_length(config.get("intermediate_size") or 4 * hidden)
    add_epsilon(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] == "gpt2":
        return
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_rope_dimension_count(int(head_dim * config.get("partial_rotary_factor", 1)))
    if "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    add_family_options(writer, config)
    add_rope_scaling(writer, config, head_dim)


def add_epsilon(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    for key in ("layer_norm_eps", "layer_norm_epsilon"):
        if key in config:
            return writer.add_layer_norm_eps(config[key])
    if config["model_type"] == "gpt2":
        return writer.add_layer_norm_eps(1e-5)
    return writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def add_family_options(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    if config["model_type"] == "phi3" or config.get("sliding_window") is not None:
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if "use_parallel_residual" in config:
        writer.add_parallel_residual(config["use_parallel_residual"])
    if config.get("attn_logit_softcapping") is not None:
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping") is not None:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def add_rope_scaling(writer: gguf.GGUFWriter, config: dict[str, Any], head_dim: int) -> None:
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if kind == "llama3":
        add_tensor(writer, "rope_freqs.weight", llama3_factors(config, head_dim), Type.F32)
    if kind == "longrope":
        original = config["original_max_position_embeddings"]
        stretch = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretch) / math.log(original)))
        for length in ("long", "short"):
            factors = np.asarray(scaling[f"{length}_factor"], dtype=np.float32)
            add_tensor(writer, f"rope_factors_{length}.weight", factors, Type.F32)


def llama3_factors(config: dict[str, Any], head_dim: int) -> np.ndarray:
    """What each frequency is divided by, from the published rule."""
    scaling = config["rope_scaling"]
    frequencies = 1.0 / config["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    old, low, high = (scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    smooth = (old / wavelengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    long = np.where(wavelengths > old / low, scaling["factor"], blended)
    return np.where(wavelengths < old / high, 1.0, long).astype(np.float32)


def add_bpe_tokenizer(writer: gguf.GGUFWriter, folder: Path, *, padded_to: int, pre: str = "gpt-2") -> None:
    """tokenizer.json (byte-level BPE) and tokenizer_config.json as metadata."""
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = dict(spec["model"]["vocab"]) | {token["content"]: token["id"] for token in spec["added_tokens"]}
    special = {token["content"]: token["special"] for token in spec["added_tokens"]}
    by_id = {index: text for text, index in ids.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(padded_to)])
    writer.add_token_types([token_kind(by_id.get(index), special) for index in range(padded_to)])
    merges = spec["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if settings.get("bos_token"):
        writer.add_bos_token_id(ids[settings["bos_token"]])
    writer.add_eos_token_id(ids[settings["eos_token"]])
    writer.add_add_bos_token(settings["add_bos_token"])
    if "chat_template" in settings:
        writer.add_chat_template(settings["chat_template"])


def token_kind(text: str | None, special: dict[str, bool]) -> int:
    if text is None:
        return int(gguf.TokenType.UNUSED)
    if text not in special:
        return int(gguf.TokenType.NORMAL)
    return int(gguf.TokenType.CONTROL if special[text] else gguf.TokenType.USER_DEFINED)


def add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: Type) -> None:
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantised_copy(folder: Path, copy: Path, choose: ChooseType) -> Path:
    """The checkpoint whose float32 numbers are what the GGUF file's are: the exact oracle."""
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}), encoding="utf-8")
    arrays = {name: round_trip(array, choose(name, array)) for name, array in load_arrays(folder).items()}
    save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, copy / "model.safetensors")
    return copy
