"""Claims about the bytes of single tokens, for tokenizers of every kind."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from mini_vllm.engine.arg_utils import DEFAULT_MODEL
from mini_vllm.text.token_bytes import TokenBytes, token_bytes_of
from mini_vllm.text.tokenizer import Tokenizer
from tests.checkpoints import write_tokenizer

TEXT = "naïve café 🙂\n\tdéjà vu 東京"


@pytest.mark.parametrize("family", ["llama", "qwen2", "bundled"])
def test_the_bytes_of_all_tokens_are_the_bytes_of_the_text(family: str, tmp_path: Path) -> None:
    if family == "bundled":
        tokenizer = Tokenizer.from_folder(DEFAULT_MODEL)
    else:
        write_tokenizer(tmp_path, family)
        tokenizer = Tokenizer.from_folder(tmp_path)
    token_bytes = token_bytes_of(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(token_bytes[i] for i in ids) == TEXT.encode()
    assert any(token_bytes[i].decode(errors="replace") == "\ufffd" for i in ids), "some are half a character"


def test_added_tokens_are_their_own_text() -> None:
    tokenizer = Tokenizer.from_folder(DEFAULT_MODEL)
    assert TokenBytes(tokenizer)[0] == b"<|endoftext|>"


def test_an_id_without_a_token_has_no_bytes() -> None:
    assert TokenBytes(Tokenizer.from_folder(DEFAULT_MODEL))[10**6] == b""


def test_sentencepiece_tokens_keep_their_space_and_their_bytes() -> None:
    vocab = {"\u2581the": 0, "the": 1, "<0xF0>": 2, "\u2581": 3}
    backend = RustTokenizer(models.BPE(vocab, []))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    token_bytes = TokenBytes(Tokenizer(backend))
    assert [token_bytes[i] for i in range(4)] == [b" the", b"the", b"\xf0", b" "]


def test_other_vocabularies_are_decoded() -> None:
    backend = RustTokenizer(models.WordLevel({"one": 0, "[UNK]": 1}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TokenBytes(Tokenizer(backend))[0] == b"one"
