"""The bytes that each token stands for, exactly: what logprobs show of a token that is half a character.

Decoding one id alone cannot tell this: bytes that are no character come out as U+FFFD, and some decoders drop a
leading space. So the vocabulary's own spelling is read instead, by the alphabet its decoder has.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from mini_vllm.text.bpe_files import byte_alphabet
from mini_vllm.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_VISIBLE_SPACE = "\u2581"


class TokenBytes:
    """`TokenBytes(tokenizer)[token_id]`; an id that no token stands behind has no bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known = {
            token_id: token.content.encode() for token_id, token in tokenizer.backend.get_added_tokens_decoder().items()
        }
        kinds = set(_decoder_kinds(tokenizer))
        self._alphabet = {c: byte for byte, c in enumerate(byte_alphabet())} if "ByteLevel" in kinds else None
        self._is_sentencepiece = bool(kinds & {"ByteFallback", "Metaspace", "Replace"})

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._read(token_id)
        return known

    def _read(self, token_id: int) -> bytes:
        spelling = self._tokenizer.convert_ids_to_tokens(token_id)
        if spelling is None:
            return b""
        if self._alphabet is not None:
            return b"".join(self._byte_of(character) for character in spelling)
        if not self._is_sentencepiece:
            return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()
        if byte := _BYTE_TOKEN.fullmatch(spelling):
            return bytes([int(byte[1], 16)])
        return bytes(spelling.replace(_VISIBLE_SPACE, " ").encode())

    def _byte_of(self, character: str) -> bytes:
        assert self._alphabet is not None
        byte = self._alphabet.get(character)
        return character.encode() if byte is None else bytes([byte])


@lru_cache(maxsize=8)
def token_bytes_of(tokenizer: Tokenizer) -> TokenBytes:
    """The one table of a tokenizer, which fills as tokens are asked for."""
    return TokenBytes(tokenizer)


def _decoder_kinds(tokenizer: Tokenizer) -> Iterator[str]:
    decoder = tokenizer.backend.decoder
    state = None if decoder is None else json.loads(decoder.__getstate__())
    yield from _kinds(state)


def _kinds(state: Mapping[str, Any] | None) -> Iterator[str]:
    """Of a decoder and of the steps it is made of."""
    if state is not None:
        yield state["type"]
        for step in state.get("decoders") or ():
            yield from _kinds(step)
