"""A trained `BPEVocabulary` as files: tokenizer.json, and GPT-2's vocab.json with merges.txt.

`save_bpe` is handed a vocabulary and a folder; what it writes gives the same ids through the `tokenizers` library and
through this package's `Tokenizer`.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from mini_vllm.text.bpe import BPEVocabulary

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


def byte_alphabet() -> list[str]:
    """A visible character for each byte: itself where Latin-1 has one, else one of those from U+0100 on, in order."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


def to_tokenizers(vocabulary: BPEVocabulary) -> RustTokenizer:
    """The same tokenizer in the `tokenizers` library."""
    spelt = _spelling(vocabulary)
    merges = [(spelt[left], spelt[right]) for left, right in vocabulary.merges]
    backend = RustTokenizer(models.BPE({text: token_id for token_id, text in enumerate(spelt)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if vocabulary.pattern is None:
        backend.pre_tokenizer = byte_level
    else:
        split = pre_tokenizers.Split(Regex(vocabulary.pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in vocabulary.special_tokens])
    return backend


def save_bpe(vocabulary: BPEVocabulary, folder: str | Path) -> list[Path]:
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt into `folder` (created)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spelt = _spelling(vocabulary)
    vocab = {text: token_id for token_id, text in enumerate(spelt)} | vocabulary.special_tokens
    merges = "".join(f"{spelt[left]} {spelt[right]}\n" for left, right in vocabulary.merges)
    contents = {
        TOKENIZER_FILE: to_tokenizers(vocabulary).to_str(pretty=True),
        CONFIG_FILE: _json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "additional_special_tokens": list(vocabulary.special_tokens),
                "clean_up_tokenization_spaces": False,
            }
        ),
        "vocab.json": _json(vocab),
        "merges.txt": "#version: 0.2\n" + merges,
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return [folder / name for name in contents]


def _spelling(vocabulary: BPEVocabulary) -> list[str]:
    alphabet = byte_alphabet()
    return ["".join(alphabet[byte] for byte in token) for token in vocabulary.tokens]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"
