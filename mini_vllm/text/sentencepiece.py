"""SentencePiece model files (`tokenizer.model`, `spiece.model`) as plain data.

Such a file is one protocol-buffer message. Of that format this reader needs four wire types and a dozen fields, so it
is written out here: shorter than the code protoc generates, no dependency at run time, and each error names the field.
`read_sentencepiece` is handed a path and returns a `SentencePieceModel`, or raises a `CheckpointError`; what the model
means as a tokenizer is `sentencepiece_tokenizer.py`'s business.

Source: the fields' numbers and defaults are those of sentencepiece_model.proto.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mini_vllm.exceptions import CheckpointError
from mini_vllm.text.reading import read_bytes

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces."""

UNIGRAM, BPE, WORD, CHAR = range(1, 5)
"""Kinds of models."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_Value = int | bytes
_Fields = dict[int, _Value]


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The message's fields that decide ids; ids that are not there are -1."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    whitespace_as_suffix: bool
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    precompiled_charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    has_denormalizer: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a model file. Raises `CheckpointError` naming the file and the field at fault."""
    data = read_bytes(path)
    try:
        return _parse_model(data)
    except _FormatError as error:
        raise CheckpointError(f"{path}: not a sound SentencePiece model: {error}") from error


class _FormatError(ValueError):
    """What is wrong, without the file's name."""


def _parse_model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    specs: dict[int, _Fields] = {2: {}, 3: {}, 5: {}}
    for number, value in _fields(data, "ModelProto"):
        if number == 1:
            pieces.append(_parse_piece(_as_bytes(value, "pieces"), len(pieces)))
        elif number in specs:
            specs[number].update(_fields(_as_bytes(value, f"field {number}"), f"field {number} of ModelProto"))
    if not pieces:
        raise _FormatError("it has no pieces")
    trainer, normalizer, denormalizer = specs[2], specs[3], specs[5]
    model = SentencePieceModel(
        pieces=tuple(pieces),
        model_type=_integer(trainer, 3, UNIGRAM, "trainer_spec.model_type"),
        byte_fallback=bool(_integer(trainer, 35, 0, "trainer_spec.byte_fallback")),
        whitespace_as_suffix=bool(_integer(trainer, 24, 0, "trainer_spec.treat_whitespace_as_suffix")),
        unk_id=_integer(trainer, 40, 0, "trainer_spec.unk_id"),
        bos_id=_integer(trainer, 41, 1, "trainer_spec.bos_id"),
        eos_id=_integer(trainer, 42, 2, "trainer_spec.eos_id"),
        pad_id=_integer(trainer, 43, -1, "trainer_spec.pad_id"),
        precompiled_charsmap=_as_bytes(normalizer.get(2, b""), "normalizer_spec.precompiled_charsmap"),
        add_dummy_prefix=bool(_integer(normalizer, 3, 1, "normalizer_spec.add_dummy_prefix")),
        remove_extra_whitespaces=bool(_integer(normalizer, 4, 1, "normalizer_spec.remove_extra_whitespaces")),
        escape_whitespaces=bool(_integer(normalizer, 5, 1, "normalizer_spec.escape_whitespaces")),
        has_denormalizer=bool(denormalizer.get(2)),
    )
    _check_pieces(model)
    return model


def _parse_piece(data: bytes, index: int) -> Piece:
    fields = dict(_fields(data, f"pieces[{index}]"))
    raw = _as_bytes(fields.get(1, b""), f"pieces[{index}].piece")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _FormatError(f"pieces[{index}].piece is not UTF-8: {raw!r:.60}") from error
    score = fields.get(2, b"\0\0\0\0")
    if not isinstance(score, bytes) or len(score) != 4:
        raise _FormatError(f"pieces[{index}].score must be a 32-bit float")
    return Piece(text, struct.unpack("<f", score)[0], _integer(fields, 3, NORMAL, f"pieces[{index}].type"))


def _check_pieces(model: SentencePieceModel) -> None:
    seen: dict[str, int] = {}
    unknown = []
    for index, piece in enumerate(model.pieces):
        if not piece.text:
            raise _FormatError(f"pieces[{index}].piece is empty")
        if seen.setdefault(piece.text, index) != index:
            raise _FormatError(f"pieces[{index}].piece repeats pieces[{seen[piece.text]}]: {piece.text!r:.60}")
        if not math.isfinite(piece.score):
            raise _FormatError(f"pieces[{index}].score of {piece.text!r:.60} is {piece.score}")
        if not NORMAL <= piece.kind <= BYTE:
            raise _FormatError(f"pieces[{index}].type is {piece.kind}, must be from {NORMAL} to {BYTE}")
        if piece.kind == UNKNOWN:
            unknown.append(index)
    if len(unknown) != 1:
        raise _FormatError(f"pieces must have exactly one of type UNKNOWN, have {len(unknown)}")
    if model.byte_fallback and (missing := [b for b in range(256) if f"<0x{b:02X}>" not in seen]):
        raise _FormatError(f"trainer_spec.byte_fallback is set, but pieces has no <0x{missing[0]:02X}>")


def _integer(fields: _Fields, number: int, default: int, name: str) -> int:
    """An int32, bool or enum; negative ones are written as 64-bit two's complement."""
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise _FormatError(f"{name} must be an integer")
    return value - (1 << 64) if value >= 1 << 63 else value


def _as_bytes(value: _Value, name: str) -> bytes:
    if not isinstance(value, bytes):
        raise _FormatError(f"{name} must be bytes")
    return value


def _fields(data: bytes, name: str) -> Iterator[tuple[int, _Value]]:
    """(number, value) of each field of a message: integers as they are, everything else as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position, name)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position, name)
            yield number, value
            continue
        if wire_type == _BYTES:
            length, position = _varint(data, position, name)
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
        else:
            raise _FormatError(f"{name} has a field of unknown wire type {wire_type} before byte {position}")
        if position + length > len(data):
            raise _FormatError(f"{name} ends within field {number} (byte {position})")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int, name: str) -> tuple[int, int]:
    """The number that starts at `position`, 7 bits a byte, low bits first; and where it ends."""
    value = 0
    for index in range(10):
        if position + index >= len(data):
            raise _FormatError(f"{name} ends within a number (byte {position})")
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & (1 << 64) - 1, position + index + 1
    raise _FormatError(f"{name} has a number of more than 64 bits (byte {position})")
