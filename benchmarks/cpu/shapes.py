"""The models that engines are compared on: real checkpoint folders with random weights, made once and kept.

Shapes are those of published models (the planner's preset where it has one). Numbers are random and small, so outputs
mean nothing; the time they take does.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from mini_vllm.bench.cost import ModelShape
from mini_vllm.hf_config import HFConfig
from mini_vllm.simulator.planner.presets import preset_config

SPECIAL = ("<unk>", "<s>", "</s>")
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_COMMON = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 32000, "tie_word_embeddings": tied,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "tiny-15m": _llama(6, 288, 768, 6, 6, tied=True),
    "qwen2.5-0.5b": preset_config("qwen2.5-0.5b"),
    "llama-1.1b": _llama(22, 2048, 5632, 32, 4, tied=False),
}


def config_of(name: str) -> dict[str, Any]:
    """The whole config.json of a shape."""
    shape = SHAPES[name]
    return _COMMON | shape | {"architectures": [ARCHITECTURES[shape["model_type"]]]}


def model_shape(name: str) -> ModelShape:
    """What decides bytes and operations, counted as the package's own benchmarks count."""
    return ModelShape.from_config(HFConfig.from_dict(config_of(name)), "bfloat16")


def layer_matrices(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Matrices of one layer by name, [output, input]."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip


def default_cache() -> Path:
    """Where made and converted models are kept: $MINI_VLLM_CACHE or ~/.cache/mini_vllm, under bench/."""
    if named := os.environ.get("MINI_VLLM_CACHE"):
        return Path(named) / "bench"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mini_vllm" / "bench"


def make_checkpoint(name: str, cache: Path) -> Path:
    """The folder of a shape's checkpoint; made if it is not there, complete or not at all."""
    folder = cache / name
    if folder.is_dir():
        return folder
    scratch = cache / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    config = config_of(name)
    (scratch / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    _write_tokenizer(config["vocab_size"], scratch)
    _write_weights(config, scratch / "model.safetensors")
    scratch.rename(folder)
    return folder


def _write_tokenizer(size: int, folder: Path) -> None:
    """One in which every id has text: ids without are never sampled by some engines, which then have less to do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {text: i for i, text in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    vocab |= {f"Ġw{i}": i for i in range(len(vocab), size)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(known), encoding="utf-8")


def _write_weights(config: dict[str, Any], file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * 0.02).to(torch.bfloat16)

    vocab, hidden = config["vocab_size"], config["hidden_size"]
    tensors = {"model.embed_tokens.weight": random(vocab, hidden), "model.norm.weight": _ones(hidden)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = random(vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in layer_matrices(config).items():
            tensors[f"{prefix}{name}.weight"] = random(rows, columns)
            if config["model_type"] == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{prefix}{name}.bias"] = random(rows)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = _ones(hidden)
    save_file(tensors, file, metadata={"format": "pt"})


def _ones(size: int) -> Any:
    import torch

    return torch.ones(size, dtype=torch.bfloat16)
