"""Small random checkpoints on disk, shaped as published ones are, for every test that needs a real model.

`make_checkpoint` writes config.json, safetensors (one file or an index with shards) and, when asked, a real
byte-level BPE tokenizer trained on a few sentences. Weights are scaled up so that attention is peaked and logits
are far apart: a wrong rotation, a dropped bias or a mixed-up cache row changes them visibly.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
SPECIAL_TOKENS = {
    "llama": ("<unk>", "<s>", "</s>"),
    "qwen2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}
BOS_EOS_IDS: dict[str, tuple[int | None, int]] = {"llama": (1, 2), "qwen2": (None, 2)}
TOKENIZER_VOCAB_SIZE = 384
VOCAB_SIZE_WITHOUT_TOKENIZER = 128

_SENTENCES = (
    "The capital of France is Paris, and the capital of Japan is Tokyo.",
    "A request is two counters: the tokens computed so far chase the tokens known so far.",
    "hello world, goodbye world; hello again and goodbye again.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, i + 1))\n",
    "Paging keeps keys and values in blocks, so memory is not wasted on lengths nobody reached.",
    "Zwei Wörter in anderen Sprachen: naïve café, déjà vu, 東京, привет, emoji 🙂.",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def make_checkpoint(
    path: str | Path,
    family: str = "llama",
    *,
    seed: int = 0,
    scale: float = 2.0,
    tokenizer: bool = True,
    vocab_size: int | None = None,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    max_position_embeddings: int = 256,
    tie_word_embeddings: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    dtype: str = "float32",
    num_shards: int = 1,
    new_spelling: bool = False,
    generation_config: dict[str, Any] | None = None,
    config_overrides: dict[str, Any] | None = None,
) -> Path:
    """Write a random checkpoint into `path` (created) and return it.

    vocab_size: rows of the embedding; None takes the tokenizer's size. More than the tokenizer's leaves ids that no
    token stands behind. seed: the same arguments give the same bytes. scale: standard deviation of every matrix,
    times 1/sqrt(fan in). new_spelling: `dtype` and `rope_parameters` instead of `torch_dtype`, `rope_theta` and
    `rope_scaling`. config_overrides: merged into config.json last (a value of None removes the key).
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_size = TOKENIZER_VOCAB_SIZE if tokenizer else 0
    if vocab_size is None:
        vocab_size = tokenizer_size or VOCAB_SIZE_WITHOUT_TOKENIZER
    if vocab_size < tokenizer_size:
        raise ValueError(f"vocab_size {vocab_size} is below the tokenizer's {tokenizer_size}")
    bos, eos = BOS_EOS_IDS[family]
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": bos,
        "eos_token_id": eos,
        **_rope_and_dtype(rope_theta, rope_scaling, dtype, new_spelling),
    }
    if head_dim is not None:
        config["head_dim"] = head_dim
    if family == "llama":
        config |= {"attention_bias": attention_bias, "mlp_bias": mlp_bias}
    config |= config_overrides or {}
    config = {key: value for key, value in config.items() if value is not None or key == "bos_token_id"}
    _write_json(folder / "config.json", config)
    tensors = random_tensors(config, family, seed=seed, scale=scale, dtype=getattr(torch, dtype))
    write_safetensors(folder, tensors, num_shards)
    if tokenizer:
        write_tokenizer(folder, family)
    if generation_config is not None:
        _write_json(folder / "generation_config.json", generation_config)
    return folder


def _rope_and_dtype(theta: float, scaling: dict[str, Any] | None, dtype: str, new_spelling: bool) -> dict[str, Any]:
    if not new_spelling:
        return {"torch_dtype": dtype, "rope_theta": theta, "rope_scaling": scaling}
    return {"dtype": dtype, "rope_parameters": {"rope_type": "default", "rope_theta": theta, **(scaling or {})}}


def random_tensors(
    config: dict[str, Any], family: str, *, seed: int, scale: float, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint under its published name, in a fixed order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = False) -> None:
        tensors[f"{name}.weight"] = normal(rows, columns, std=scale / math.sqrt(columns))
        if bias:
            tensors[f"{name}.bias"] = normal(rows, std=scale / 2)

    hidden, inter = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    qkv_bias = family == "qwen2" or config["attention_bias"]
    o_bias = family == "llama" and config["attention_bias"]
    mlp_bias = family == "llama" and config["mlp_bias"]

    tensors["model.embed_tokens.weight"] = normal(config["vocab_size"], hidden, std=1.0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = 1 + normal(hidden, std=0.3)
        linear(f"{prefix}.self_attn.q_proj", heads * head_dim, hidden, qkv_bias)
        linear(f"{prefix}.self_attn.k_proj", kv_heads * head_dim, hidden, qkv_bias)
        linear(f"{prefix}.self_attn.v_proj", kv_heads * head_dim, hidden, qkv_bias)
        linear(f"{prefix}.self_attn.o_proj", hidden, heads * head_dim, o_bias)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = 1 + normal(hidden, std=0.3)
        linear(f"{prefix}.mlp.gate_proj", inter, hidden, mlp_bias)
        linear(f"{prefix}.mlp.up_proj", inter, hidden, mlp_bias)
        linear(f"{prefix}.mlp.down_proj", hidden, inter, mlp_bias)
    tensors["model.norm.weight"] = 1 + normal(hidden, std=0.3)
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], hidden)
    return tensors


def write_safetensors(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int = 1) -> None:
    """`model.safetensors`, or `num_shards` files dealt out in turn with their index."""
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tokenizer(folder: Path, family: str = "llama") -> None:
    """tokenizer.json and tokenizer_config.json; llama's adds a BOS token to what it encodes, qwen2's does not."""
    (folder / "tokenizer.json").write_text(_tokenizer_json(family), encoding="utf-8")
    specials = SPECIAL_TOKENS[family]
    bos, eos = BOS_EOS_IDS[family]
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None if bos is None else specials[bos],
            "eos_token": specials[eos],
            "add_bos_token": bos is not None,
            "clean_up_tokenization_spaces": False,
            "chat_template": _LLAMA_CHAT_TEMPLATE if family == "llama" else _CHAT_TEMPLATE,
        },
    )


@functools.cache
def _tokenizer_json(family: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCAB_SIZE,
        min_frequency=1,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL_TOKENS[family]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    bos, _ = BOS_EOS_IDS[family]
    if bos is not None:
        text = SPECIAL_TOKENS[family][bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{text} $A", pair=f"{text} $A {text} $B", special_tokens=[(text, bos)]
        )
    if tokenizer.get_vocab_size() != TOKENIZER_VOCAB_SIZE:
        raise AssertionError(f"the tokenizer learned {tokenizer.get_vocab_size()} tokens, not {TOKENIZER_VOCAB_SIZE}")
    return str(tokenizer.to_str())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
