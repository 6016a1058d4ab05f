"""The models that engines are compared on: real checkpoint folders with random weights, made once and kept.

Shapes are those of published models. Numbers are random and small, so outputs mean nothing; the time they take does.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "mini_vllm" / "assets" / "stdlib-llama-3.7m"


@dataclass(frozen=True)
class Shape:
    """A dense decoder. family: llama or qwen2 (biases on queries, keys and values)."""

    family: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    def config(self) -> dict[str, Any]:
        architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.family]
        return {
            "architectures": [architecture], "model_type": self.family, "torch_dtype": "bfloat16",
            "hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab,
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 32768,
            "tie_word_embeddings": self.tied, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Matrices of one layer by name, [output, input]."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden), "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden), "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden), "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }  # fmt: skip

    @property
    def layer_weights(self) -> int:
        """Of all layers: what every token is multiplied with."""
        return self.layers * sum(rows * columns for rows, columns in self.matrices().values())

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    def decode_bytes(self, width: str) -> float | None:
        """Bytes of weights that mini_vllm reads for a step; None for a width it does not have."""
        width = width.removesuffix("-eager")
        body = {"bf16": 2, "f32": 4, "int8": 1, "int8-weights": 1, "int4": 4.5 / 8, "int4-head": 4.5 / 8}.get(width)
        head = {"int4": 1.0}.get(width, body)
        return None if body is None or head is None else self.layer_weights * body + self.head_weights * head

    def prefill_flops(self, tokens: int) -> float:
        """Multiplications and additions of a prompt's matrices and causal attention, logits of one row."""
        attention = 2 * self.layers * self.hidden * tokens * tokens  # half of all pairs, scores and values
        return 2.0 * self.layer_weights * tokens + 2.0 * self.head_weights + attention


SHAPES = {
    "tiny-15m": Shape("llama", 6, 288, 768, 6, 6, 32000, True),
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 4864, 14, 2, 151936, True),
    "llama-1.1b": Shape("llama", 22, 2048, 5632, 32, 4, 32000, False),
}


def default_cache() -> Path:
    """Where made and converted models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mini_vllm" / "bench"


def make_checkpoint(name: str, cache: Path) -> Path:
    """The folder of a shape's checkpoint; made if it is not there, complete or not at all."""
    folder = cache / name
    if folder.is_dir():
        return folder
    scratch = cache / f".{name}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    shape = SHAPES[name]
    (scratch / "config.json").write_text(json.dumps(shape.config(), indent=1), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, scratch / file)
    _write_weights(shape, scratch / "model.safetensors")
    scratch.rename(folder)
    return folder


def _write_weights(shape: Shape, file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * 0.02).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": random(shape.vocab, shape.hidden)}
    tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    if not shape.tied:
        tensors["lm_head.weight"] = random(shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in shape.matrices().items():
            tensors[f"{prefix}{name}.weight"] = random(rows, columns)
            if shape.family == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{prefix}{name}.bias"] = random(rows)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
