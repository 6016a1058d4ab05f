"""A checkpoint in the shape of Qwen2.5-0.5B for `startup.py`: real files, random weights, a tokenizer of full size.

About 1 GB of bfloat16 in safetensors files as the hub has them, and a byte-level BPE of 151,643 tokens, since reading
that many takes its share of a start. The tokens are made up: bytes, pairs and triples of bytes.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sampling import QWEN_05B

NUM_TOKENS = 151643
SHARDS = 2
WEIGHTS_STD = 0.02


def make_checkpoint(folder: Path) -> None:
    """Write it unless it is there. The index comes last: a folder that has it is whole."""
    if (folder / "model.safetensors.index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN_05B), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": QWEN_05B["eos_token_id"]}))
    (folder / "tokenizer.json").write_text(json.dumps(make_tokenizer()), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    save_weights(folder)


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, size in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (size, hidden)
            shapes[f"{at}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,)}


def save_weights(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = list(tensor_shapes(QWEN_05B).items())
    index: dict[str, str] = {}
    size = -(-len(shapes) // SHARDS)
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if name.endswith("norm.weight")
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, WEIGHTS_STD, generator=generator)
            for name, shape in shapes[number * size : (number + 1) * size]
        }
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def make_tokenizer() -> dict[str, Any]:
    """tokenizer.json: a byte-level BPE in which every token beyond the bytes is one before it and one byte more."""
    alphabet = byte_alphabet()
    vocab, merges = list(alphabet), []
    shorter = itertools.product(vocab[:], alphabet)
    for first, second in shorter:
        vocab.append(first + second)
        merges.append([first, second])
    for first, second in itertools.product(vocab[len(alphabet) :], alphabet):
        if len(vocab) == NUM_TOKENS:
            break
        vocab.append(first + second)
        merges.append([first, second])
    end = {"id": NUM_TOKENS, "content": "<|endoftext|>", "special": True, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocab)}, "merges": merges},
    }


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte: https://github.com/openai/gpt-2/blob/master/src/encoder.py."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(code) for code in (*shown, *range(256, 256 + len(hidden)))]
