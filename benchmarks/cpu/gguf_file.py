"""A Llama or Qwen2 checkpoint as a GGUF file, for llama.cpp: with its `gguf` package, so that nobody needs its scripts.

Matrices become bf16, f32, q8_0 or q4_0; norms and biases stay float32. As llama-quantize does by default, a q4_0 file
keeps the output matrix (or the embedding that is tied to it) wider: here in q8_0. The vocabulary is one of made-up
words, since only token ids go in and out.
"""

import json
import re
from pathlib import Path
from typing import Any

LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"{name}: no tensor of a Llama or Qwen2")
    layer, rest = match.groups()
    for hf, gguf in LAYER_NAMES.items():
        if rest == hf or rest.startswith(f"{hf}."):
            return f"blk.{layer}.{gguf}{rest.removeprefix(hf)}"
    raise ValueError(f"{name}: no tensor of a Llama or Qwen2")


def interleaved(matrix: Any, heads: int) -> Any:
    """Rows of queries or keys in the order of llama.cpp's Llama, which turns neighbours, not halves."""
    return matrix.reshape(heads, 2, len(matrix) // heads // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def read_tensors(folder: Path) -> dict[str, Any]:
    """float32 arrays by name, from bfloat16 or float32 safetensors."""
    import numpy as np

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            if entry["dtype"] == "BF16":
                words = np.frombuffer(data[begin:end], dtype=np.uint16).astype(np.uint32) << 16
                array = words.view(np.float32)
            else:
                array = np.frombuffer(data[begin:end], dtype=np.float32)
            found[name] = array.reshape(entry["shape"])
    return found


def write_gguf(folder: Path, file: Path, width: str) -> None:
    """Convert `folder` to `file`, complete or not at all."""
    import gguf
    from gguf.quants import quantize

    config = json.loads((folder / "config.json").read_text())
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(str(file.with_suffix(".tmp")), architecture)
    _write_header(writer, config)
    wide = {"q4_0": "q8_0"}.get(width, width)
    tied = config["tie_word_embeddings"]
    for name, array in read_tensors(folder).items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            array = interleaved(array, heads)
        kind = width if array.ndim == 2 else "f32"
        if name == "lm_head.weight" or (tied and name == "model.embed_tokens.weight"):
            kind = wide
        quantized = gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor(gguf_name(name), quantize(array, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".tmp").rename(file)


def _write_header(writer: Any, config: dict[str, Any]) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"w{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["w 0"])
