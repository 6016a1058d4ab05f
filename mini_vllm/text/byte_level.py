"""GPT-2-style tokenizers from `vocab.json` and `merges.txt`: byte-level BPE as it was published before tokenizer.json.

The two files hold the vocabulary (token -> id) and the merges, best first. How text is split into words before
merging is in neither: it belongs to the family, which tokenizer_config.json names as `tokenizer_class` (or config.json
as `model_type`). `build_byte_level` is handed the folder and the added tokens and returns a `tokenizers.Tokenizer`;
anything wrong with the files is a `CheckpointError` naming the file and the line or token.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.logger import init_logger
from mini_vllm.text.added_tokens import AddedTokens, place_in_vocab
from mini_vllm.text.reading import read_text, rust_errors

logger = init_logger(__name__)

VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Words with the space before them, numbers, punctuation, white space; English contractions apart."""

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""Digits one by one, line ends kept with what they end."""

_MAX_ID = 1 << 24


@dataclass(frozen=True)
class ByteLevelFamily:
    """add_bos: whether a text begins with BOS unless the config says. defaults: named tokens where no file has them."""

    pattern: str = GPT2_PATTERN
    nfc: bool = False
    add_bos: bool = False
    defaults: dict[str, str] = field(default_factory=dict)


_END = "<|endoftext|>"
_GPT2 = ByteLevelFamily(defaults={"bos_token": _END, "eos_token": _END, "unk_token": _END})
_QWEN2 = ByteLevelFamily(QWEN2_PATTERN, nfc=True, defaults={"eos_token": _END, "pad_token": _END})
_OPT = ByteLevelFamily(
    add_bos=True, defaults={"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
)

_BY_CLASS = {
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "Qwen2Tokenizer": _QWEN2,
}
_BY_MODEL_TYPE = {
    "gpt2": _GPT2, "gpt_neo": _GPT2, "gptj": _GPT2, "codegen": _GPT2, "phi": _GPT2, "gpt_bigcode": _GPT2,
    "opt": _OPT, "qwen2": _QWEN2, "qwen2_moe": _QWEN2, "qwen3": _QWEN2, "qwen3_moe": _QWEN2,
}  # fmt: skip
_GENERIC_CLASSES = ("", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")


def find_family(folder: Path, tokenizer_class: str, model_type: str) -> ByteLevelFamily:
    """OPT says GPT2Tokenizer and differs in its special tokens only, so the model type goes first where both match."""
    class_name = tokenizer_class.removesuffix("Fast") if tokenizer_class not in _GENERIC_CLASSES else ""
    if class_name == "GPT2Tokenizer" and model_type == "opt":
        return _OPT
    if class_name in _BY_CLASS:
        return _BY_CLASS[class_name]
    if class_name:
        raise UnsupportedModelError(
            f"{folder}: has {VOCAB_FILE} and {MERGES_FILE}, but how {tokenizer_class} splits text is not known here "
            f"(known are {', '.join(_BY_CLASS)}); convert it once to tokenizer.json with transformers"
        )
    if model_type not in _BY_MODEL_TYPE:
        logger.warning("%s: neither tokenizer_class nor model_type says how text is split; GPT-2's way is used", folder)
    return _BY_MODEL_TYPE.get(model_type, _GPT2)


def build_byte_level(
    folder: Path, family: ByteLevelFamily, tokens: AddedTokens, config: Mapping[str, Any]
) -> RustTokenizer:
    """The tokenizer of `vocab.json` and `merges.txt`, without its added tokens. Raises `CheckpointError`."""
    vocab = read_vocab(folder / VOCAB_FILE)
    merges = read_merges(folder / MERGES_FILE, vocab)
    vocab = place_in_vocab(vocab, tokens, folder / VOCAB_FILE)
    with rust_errors(folder / VOCAB_FILE, f"makes no tokenizer with {MERGES_FILE}"):
        backend = RustTokenizer(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(family.pattern), "isolated")
    spaced = bool(config.get("add_prefix_space", False))
    if family.pattern == GPT2_PATTERN:  # the library's own loop for this pattern is faster than its regex engine
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=True)
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if family.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def read_vocab(file: Path) -> dict[str, int]:
    """Token -> id, each id once. Raises `CheckpointError` naming the token."""
    try:
        vocab = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not readable JSON: {error}") from error
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{file}: must hold an object of tokens and their ids, holds {type(vocab).__name__}")
    seen: dict[int, str] = {}
    for token, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < _MAX_ID:
            raise CheckpointError(
                f"{file}: the id of {token!r:.80} must be from 0 to {_MAX_ID - 1}, is {token_id!r:.40}"
            )
        if token_id in seen:
            raise CheckpointError(f"{file}: {seen[token_id]!r:.80} and {token!r:.80} both have id {token_id}")
        seen[token_id] = token
    return vocab


def read_merges(file: Path, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs in their order. A merge whose parts or whole are no tokens is a `CheckpointError` naming its line.

    As a merge makes a longer token out of two that exist, a list that passes can hold no circle.
    """
    merges = []
    # Only "\n" ends a line: other separators of Unicode may stand in a token.
    for number, raw in enumerate(read_text(file).split("\n"), start=1):
        line = raw.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise CheckpointError(f"{file}, line {number}: must be two tokens and one space, is {line!r:.80}")
        for text in (parts[0], parts[1], parts[0] + parts[1]):
            if text not in vocab:
                raise CheckpointError(f"{file}, line {number}: merges {line!r:.80}, but {text!r:.80} is no token")
        merges.append((parts[0], parts[1]))
    return merges
