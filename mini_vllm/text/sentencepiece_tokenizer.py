"""A SentencePiece model as a `tokenizers.Tokenizer`, which is fast, and the preparation of its text.

BPE models (Llama 2, Mistral, Gemma) and Unigram models (T5, XGLM) with byte fallback, control and user-defined
symbols. Promise: the ids are those of the `sentencepiece` library for every text without special tokens; special
tokens written in a text are taken as such, as transformers does. What cannot be reproduced exactly is refused with an
`UnsupportedModelError` naming the field.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.logger import init_logger
from mini_vllm.text.added_tokens import AddedTokens, place_in_vocab
from mini_vllm.text.reading import rust_errors
from mini_vllm.text.sentencepiece import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
)
from mini_vllm.text.sentencepiece_normalizer import VISIBLE_SPACE

logger = init_logger(__name__)

_MAX_PIECE_LENGTH = 256
_MAX_TOTAL_LENGTH = 1 << 24
"""Looking for merges costs a look-up for each character of each piece; Gemma's 256,000 pieces have 2 million."""

_LITERAL_BYTE = "<(?=0x[0-9A-F]{2}>)"


def build_sentencepiece(
    model: SentencePieceModel, tokens: AddedTokens, file: Path, *, add_dummy_prefix: bool
) -> RustTokenizer:
    """`model` as a tokenizer that is handed prepared text, with its symbols and without further added tokens.

    tokens: those declared with an id rename a piece there or extend the vocabulary.
    """
    _refuse_unsupported(model, file)
    pieces = _renamed(model.pieces, tokens)
    with rust_errors(file, "makes no tokenizer"):
        by_kind = _bpe if model.model_type == BPE else _unigram
        backend = RustTokenizer(by_kind(model, pieces, tokens, file))
        if model.model_type == UNIGRAM and model.byte_fallback:
            # The library would take "<0x41>" in a text for that byte; two words cannot be joined.
            backend.pre_tokenizer = pre_tokenizers.Split(Regex(_LITERAL_BYTE), "isolated")
        backend.decoder = _decoder(model, add_dummy_prefix)
        added = [
            AddedToken(piece.text, special=piece.kind != USER_DEFINED, normalized=False)
            for piece in pieces
            if piece.kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
        backend.add_tokens(added)
    return backend


def named_pieces(model: SentencePieceModel) -> dict[str, str]:
    """The model's own bos, eos, unk and pad token, as far as it has them."""
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id, "pad_token": model.pad_id}
    return {name: model.pieces[i].text for name, i in ids.items() if 0 <= i < len(model.pieces)}


def _refuse_unsupported(model: SentencePieceModel, file: Path) -> None:
    problem = None
    if model.model_type not in (BPE, UNIGRAM):
        problem = f"trainer_spec.model_type = {model.model_type} (WORD or CHAR) is not supported; BPE and UNIGRAM are"
    elif model.whitespace_as_suffix:
        problem = "trainer_spec.treat_whitespace_as_suffix is not supported"
    elif model.has_denormalizer:
        problem = "denormalizer_spec.precompiled_charsmap is not supported"
    if problem:
        raise UnsupportedModelError(f"{file}: {problem}")


def _renamed(pieces: tuple[Piece, ...], tokens: AddedTokens) -> list[Piece]:
    """Fine-tunes give placeholder pieces a new text in tokenizer_config.json and leave the model file alone."""
    renamed = list(pieces)
    taken = {piece.text for piece in pieces}
    for token_id, token in tokens.declared.items():
        if token_id < len(renamed) and token.content not in taken:
            kind = CONTROL if token.special else USER_DEFINED
            renamed[token_id] = Piece(token.content, renamed[token_id].score, kind)
    return renamed


def _bpe(model: SentencePieceModel, pieces: list[Piece], tokens: AddedTokens, file: Path) -> models.BPE:
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    merges = merges_from_scores(scores, file)
    unused = {piece.text for piece in pieces if piece.kind == UNUSED}
    if unused and merges_from_scores(scores, file, only=unused):
        raise UnsupportedModelError(f"{file}: pieces of type UNUSED that merges can reach are not supported")
    return models.BPE(
        place_in_vocab({piece.text: index for index, piece in enumerate(pieces)}, tokens, file),
        merges,
        unk_token=_unknown(pieces),
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def merges_from_scores(
    scores: Mapping[str, float], file: Path, *, only: Collection[str] | None = None
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the highest-scoring union first.

    SentencePiece keeps no merges: it joins the neighbours whose union scores highest, the leftmost of equals. As long
    as no two unions score the same, which holds for models that its trainer made, a list of merges says the same.
    only: the unions to consider, if not all.
    """
    ranked = []
    if (total := sum(map(len, scores))) > _MAX_TOTAL_LENGTH:
        raise CheckpointError(f"{file}: pieces have {total} characters together; at most {_MAX_TOTAL_LENGTH} are read")
    for piece in scores if only is None else only:
        if len(piece) > _MAX_PIECE_LENGTH:
            raise CheckpointError(f"{file}: the piece {piece[:40]!r}... has {len(piece)} characters")
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in scores and piece[cut:] in scores:
                ranked.append((scores.get(piece, 0.0), piece, cut))
    ranked.sort(key=lambda item: -item[0])  # stable: equals stay in the order of the file
    unions = len({piece for _, piece, _ in ranked})
    if only is None and len({score for score, _, _ in ranked}) < unions:
        logger.warning("%s: some pieces share a score; where they compete, another id may be chosen than by "
                       "sentencepiece, which takes the leftmost", file)  # fmt: skip
    return [(piece[:cut], piece[cut:]) for _, piece, cut in ranked]


def _unigram(model: SentencePieceModel, pieces: list[Piece], tokens: AddedTokens, file: Path) -> models.Unigram:
    if any(piece.kind == UNUSED for piece in pieces):
        raise UnsupportedModelError(f"{file}: pieces of type UNUSED are not supported in a UNIGRAM model")
    unknown = next(index for index, piece in enumerate(pieces) if piece.kind == UNKNOWN)
    return models.Unigram([(piece.text, piece.score) for piece in pieces], unknown, model.byte_fallback)


def _unknown(pieces: list[Piece]) -> str:
    return next(piece.text for piece in pieces if piece.kind == UNKNOWN)


def _decoder(model: SentencePieceModel, add_dummy_prefix: bool) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(VISIBLE_SPACE, " ")] if model.escape_whitespaces else []
    steps += [decoders.ByteFallback()] if any(piece.kind == BYTE for piece in model.pieces) else []
    steps += [decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if add_dummy_prefix else []
    return decoders.Sequence(steps)
