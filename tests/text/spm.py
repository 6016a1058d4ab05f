"""Small SentencePiece models of every kind, trained on the spot by the `sentencepiece` library."""

import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.text.corpus import _SAMPLES

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False, "split_digits": True,
              "normalization_rule_name": "identity", "allow_whitespace_only_pieces": True},
    "gemma": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False,
              "normalization_rule_name": "identity", "add_dummy_prefix": False, "split_digits": True,
              "user_defined_symbols": ["▁▁", "▁▁▁▁", "\n\n", "<table>"], "control_symbols": ["<turn>"],
              "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
    "bpe-nfkc": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["<sep>", "[X]"]},
    "bpe-nfkc_cf": {"model_type": "bpe", "normalization_rule_name": "nfkc_cf", "byte_fallback": True},
    "t5": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "pad_id": 0, "eos_id": 1, "unk_id": 2,
           "bos_id": -1},
    "unigram-bytes": {"model_type": "unigram", "normalization_rule_name": "identity", "byte_fallback": True,
                      "remove_extra_whitespaces": False, "user_defined_symbols": ["<sep>"]},
}  # fmt: skip


@functools.cache
def model_bytes(kind: str) -> bytes:
    """The model file of a kind; the library's own trainer makes it within a fraction of a second."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for sample in _SAMPLES[:7] for line in sample.split("\n") if line.strip()]
    lines += ["x  y   z    four        eight", "12345 67 890", "hello world hello again and again"]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 8), model_writer=out, vocab_size=700, hard_vocab_limit=False,
        character_coverage=0.98, num_threads=1, minloglevel=2, **KINDS[kind],
    )  # fmt: skip
    return out.getvalue()


def processor(kind: str) -> Any:
    """The library's own reading of the model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_proto=model_bytes(kind))


def write_folder(folder: Path, kind: str, config: dict[str, Any] | None = None, name: str = "tokenizer.model") -> Path:
    """A checkpoint's tokenizer files: the model, and tokenizer_config.json if given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(model_bytes(kind))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
