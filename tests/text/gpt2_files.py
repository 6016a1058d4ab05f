"""Small `vocab.json` + `merges.txt` checkpoints in the layouts of GPT-2, OPT and Qwen2."""

import functools
import json
from pathlib import Path
from typing import Any

from mini_vllm.text.bpe import BPEVocabulary, train_bpe
from mini_vllm.text.bpe_files import byte_alphabet
from mini_vllm.text.byte_level import GPT2_PATTERN, QWEN2_PATTERN
from tests.text.corpus import _SAMPLES

_END = "<|endoftext|>"
LAYOUTS: dict[str, dict[str, Any]] = {
    # GPT-2's repository says next to nothing: class and special tokens follow from the model type.
    "gpt2": {"model_type": "gpt2", "first": [], "last": [_END], "config": {"model_max_length": 1024}},
    "opt": {
        "model_type": "opt", "first": ["<s>", "<pad>", "</s>", "<unk>"], "last": [],
        "config": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False,
                   "bos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True,
                                 "rstrip": False, "single_word": False},
                   "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"},
    },
    "qwen2": {
        "model_type": "qwen2", "first": [], "last": [], "pattern": QWEN2_PATTERN,
        "added": [_END, "<|im_start|>", "<|im_end|>", ("<tool_call>", {"special": False, "normalized": False})],
        "config": {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "bos_token": None,
                   "eos_token": "<|im_end|>", "pad_token": _END, "unk_token": None,
                   "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    },
    "gpt2-prefix-space": {"model_type": "gpt2", "first": [], "last": [_END],
                          "config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
}  # fmt: skip
SPECIALS = ("</s>", "<s>", "<pad>", _END, "<|im_start|>", "<|im_end|>", "<tool_call>")


@functools.cache
def trained(pattern: str = GPT2_PATTERN) -> BPEVocabulary:
    return train_bpe(_SAMPLES * 2, 600, pattern=pattern)


def write_layout(folder: Path, name: str) -> Path:
    """vocab.json, merges.txt, config.json and tokenizer_config.json as the family's repositories have them."""
    layout = LAYOUTS[name]
    vocabulary = trained(layout.get("pattern", GPT2_PATTERN))
    alphabet = byte_alphabet()
    spelt = ["".join(alphabet[byte] for byte in token) for token in vocabulary.tokens]
    vocab = {token: i for i, token in enumerate([*layout["first"], *spelt, *layout["last"]])}
    config = dict(layout["config"])
    for token in layout.get("added", []):
        text, flags = (token, {"special": True, "normalized": False}) if isinstance(token, str) else token
        entry = {"content": text, "lstrip": False, "rstrip": False, "single_word": False, **flags}
        config.setdefault("added_tokens_decoder", {})[str(len(vocab) + len(config.get("added_tokens_decoder", {})))] = (
            entry
        )
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{spelt[left]} {spelt[right]}\n" for left, right in vocabulary.merges]
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(lines), encoding="utf-8", newline="\n")
    (folder / "config.json").write_text(json.dumps({"model_type": layout["model_type"]}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
