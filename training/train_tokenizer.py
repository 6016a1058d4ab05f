"""Train the byte-level BPE tokenizer of the bundled model.

The vocabulary holds exactly 2,048 ids: 32 special tokens first (fixed low ids,
so that they never move when the tokenizer is retrained), then the 256 bytes,
then the merges learnt from the training split. Every byte has an id, so
`decode(encode(text)) == text` for any Unicode text. Encoding adds the
beginning-of-document token once, in the post-processor.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from corpus import load_corpus, split_corpus

VOCAB_SIZE = 2048
NUM_SPECIAL = 32
BOS = "<|endoftext|>"
PAD = "<|pad|>"
# BOS is also the end and the document separator. The rest is reserved for the
# chat, reasoning, tool and fill-in-the-middle formats of later checkpoints.
NAMED_SPECIAL = (
    BOS,
    PAD,
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
)
# These carry content that a reader of the text wants to see: `skip_special_tokens`
# must keep them, or the reasoning and tool-call parsers would get nothing to parse.
VISIBLE = frozenset(t for t in NAMED_SPECIAL if not t.startswith("<|"))

# The widely used GPT-4-style split with single digits (as in Qwen2), kept exact so
# that other engines and GGUF files know it by name. A run of blanks before a word
# stays together except for its last one, which belongs to the word: indentation
# is one token, and text may be cut after any line end without surprising the model.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def special_tokens() -> list[AddedToken]:
    """Return the 32 special tokens in id order."""
    names = list(NAMED_SPECIAL)
    names += [f"<|reserved_{i}|>" for i in range(NUM_SPECIAL - len(names))]
    return [AddedToken(name, special=True, normalized=False) for name in names]


def build_tokenizer() -> Tokenizer:
    """Return an untrained tokenizer with the splitting and decoding rules."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(texts: list[str]) -> Tokenizer:
    """Learn the merges from `texts` and add the post-processor."""
    tokenizer = build_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, 0)]
    )
    return mark_visible(tokenizer)


def mark_visible(tokenizer: Tokenizer) -> Tokenizer:
    """Undo what the trainer does: it marks all of its special tokens as skippable."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] not in VISIBLE
    return Tokenizer.from_str(json.dumps(content))


def check(tokenizer: Tokenizer) -> None:
    """Fail loudly when a promise of the module docstring does not hold."""
    ids = {token.content: i for i, token in enumerate(special_tokens())}
    if tokenizer.get_vocab_size() != VOCAB_SIZE or tokenizer.token_to_id(BOS) != 0:
        raise RuntimeError("unexpected vocabulary")
    for name, token_id in ids.items():
        if tokenizer.token_to_id(name) != token_id or tokenizer.encode(name).ids != [0, token_id]:
            raise RuntimeError(f"special token {name} has moved")
    if tokenizer.decode(tokenizer.encode("<think>a</think>").ids) != "<think>a</think>":
        raise RuntimeError("a visible token was skipped")
    every_char = "".join(chr(c) for c in range(0x11000) if not 0xD800 <= c < 0xE000)
    for text in (every_char, "a \t\r\n\u3000é\U0001f600 \u202e\x00", " x", "x ", "\n\n  \n"):
        if tokenizer.decode(tokenizer.encode(text).ids[1:], skip_special_tokens=False) != text:
            raise RuntimeError("decode(encode(text)) != text")


def tokenizer_config() -> dict[str, object]:
    """Return what `AutoTokenizer` needs beside `tokenizer.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "bos_token": BOS,
        "eos_token": BOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="model folder to write into")
    args = parser.parse_args()
    train_docs, held_out = split_corpus(load_corpus())
    tokenizer = train([d.text for d in train_docs])
    check(tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = json.dumps(tokenizer_config(), indent=2) + "\n"
    (args.out / "tokenizer_config.json").write_text(config, encoding="utf-8")
    for name, documents in (("train", train_docs), ("held_out", held_out)):
        tokens = sum(len(e.ids) for e in tokenizer.encode_batch([d.text for d in documents]))
        size = sum(d.num_bytes for d in documents)
        print(f"{name}: {size} bytes, {tokens} tokens, {size / tokens:.3f} bytes/token")


if __name__ == "__main__":
    main()
