"""The tokenizer that a GGUF file carries, as a `tokenizers.Tokenizer` like any other.

Two kinds: `gpt2` is byte-level BPE, whose merges are listed and whose splitting into words goes by a name
(`tokenizer.ggml.pre`, see `pre_tokenizers.py`); `llama` is SentencePiece's BPE, whose merges follow from the scores
of its pieces. Promise: ids are those of the tokenizer.json the file was made from, as far as the format keeps it (it
does not keep `lstrip`, `rstrip` and normalisers).
"""

from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as RustTokenizer

from mini_vllm.gguf.metadata import Metadata
from mini_vllm.gguf.pre_tokenizers import find_splitting
from mini_vllm.gguf.reader import GGUFFile
from mini_vllm.gguf.vocab import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, token_id, token_kinds, token_texts
from mini_vllm.logger import init_logger
from mini_vllm.text.reading import rust_errors
from mini_vllm.text.sentencepiece_tokenizer import merges_from_scores
from mini_vllm.text.tokenizer import Tokenizer

logger = init_logger(__name__)

SPACE = "\u2581"
"""SentencePiece's visible space."""

_ROLES = {
    "bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token",
    "seperator": "sep_token", "cls": "cls_token", "mask": "mask_token",
}  # fmt: skip
"""Role in the file's key (spelt as the format spells it) -> name of the special token."""


def gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """Raises `CheckpointError` naming file and key; `UnsupportedModelError` for a kind of tokenizer not known here."""
    metadata = Metadata(file)
    kind = metadata.string("tokenizer.ggml.model", "none")
    if kind not in _BUILDERS:
        raise metadata.unsupported(
            "tokenizer.ggml.model",
            f"= {kind!r} is not supported (supported are {', '.join(sorted(_BUILDERS))}); pass a folder with "
            "tokenizer.json as the tokenizer (--tokenizer DIR)",
        )
    tokens = token_texts(metadata)
    with rust_errors(file.path, "tokenizer.ggml.tokens make no tokenizer"):
        backend = _BUILDERS[kind](metadata, tokens)
    special = _special_tokens(metadata, tokens)
    _add_tokens(backend, metadata, tokens, special)
    _append_eos(backend, metadata)
    return Tokenizer(
        backend,
        special_tokens=special,
        chat_templates=_chat_templates(metadata),
        add_bos_token=_adds_bos(metadata, kind),
        name_or_path=str(file.path),
    )


def _ids(metadata: Metadata, tokens: list[str]) -> dict[str, int]:
    """Token -> id. Of tokens listed twice the first counts: the others can be generated, never read."""
    vocab: dict[str, int] = {}
    for index, text in enumerate(tokens):
        vocab.setdefault(text, index)
    if len(vocab) < len(tokens):
        logger.warning("%s: %d tokens are listed twice", metadata.file.path.name, len(tokens) - len(vocab))
    return vocab


def _byte_level_bpe(metadata: Metadata, tokens: list[str]) -> RustTokenizer:
    splitting = find_splitting(metadata)
    merges = []
    for merge in metadata.items("tokenizer.ggml.merges", str):
        space = merge.find(" ", 1)  # a token may begin with a space in files of some converters
        if space < 1:
            raise metadata.fail("tokenizer.ggml.merges", f"must hold pairs of tokens, has {merge!r}")
        merges.append((merge[:space], merge[space + 1 :]))
    backend = RustTokenizer(models.BPE(_ids(metadata, tokens), merges, ignore_merges=splitting.ignore_merges))
    if splitting.normal_form == "NFC":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitting.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(metadata: Metadata, tokens: list[str]) -> RustTokenizer:
    """SentencePiece joins the neighbours whose union scores highest; spaces are made visible first."""
    scores = metadata.items("tokenizer.ggml.scores", (int, float))
    kinds = token_kinds(metadata, len(metadata.items("tokenizer.ggml.tokens", str)))
    if len(scores) < len(tokens):
        raise metadata.fail("tokenizer.ggml.scores", f"has {len(scores)} entries for {len(tokens)} tokens")
    pieces = {text: scores[i] for i, text in enumerate(tokens) if kinds[i] in (NORMAL, USER_DEFINED)}
    has_bytes = BYTE in kinds
    unknown = token_id(metadata, "unknown")
    model = models.BPE(
        _ids(metadata, tokens),
        merges_from_scores(pieces, metadata.file.path),
        fuse_unk=True,
        byte_fallback=has_bytes,
        unk_token=None if unknown is None else tokens[unknown],
    )
    backend = RustTokenizer(model)
    prefix = metadata.boolean("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


_BUILDERS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}


def _special_tokens(metadata: Metadata, tokens: list[str]) -> dict[str, str]:
    roles = {name: token_id(metadata, role) for role, name in _ROLES.items()}
    return {name: tokens[index] for name, index in roles.items() if index is not None and index < len(tokens)}


def _add_tokens(backend: RustTokenizer, metadata: Metadata, tokens: list[str], special: dict[str, str]) -> None:
    """Control tokens are special, the user's own are matched whole; neither is normalised or split."""
    kinds = token_kinds(metadata, len(metadata.items("tokenizer.ggml.tokens", str)))
    named = set(special.values())
    added = [
        AddedToken(text, special=kinds[i] != USER_DEFINED, normalized=False)
        for i, text in enumerate(tokens)
        if text and (kinds[i] in (CONTROL, USER_DEFINED, UNKNOWN) or text in named)
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])


def _adds_bos(metadata: Metadata, kind: str) -> bool:
    """Files that do not say: SentencePiece and Llama 3 begin a text with BOS."""
    by_default = kind == "llama" or find_splitting(metadata, quiet=True).adds_bos
    return metadata.boolean("tokenizer.ggml.add_bos_token", by_default)


def _append_eos(backend: RustTokenizer, metadata: Metadata) -> None:
    eos = token_id(metadata, "eos")
    if eos is None or not metadata.boolean("tokenizer.ggml.add_eos_token", False):
        return
    text = backend.id_to_token(eos)
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", text], pair=["$A", text, "$B", text], special_tokens=[(text, eos)]
    )


def _chat_templates(metadata: Metadata) -> dict[str, str]:
    templates = {}
    if metadata.get("tokenizer.chat_template") is not None:
        templates["default"] = metadata.string("tokenizer.chat_template")
    for name in metadata.items("tokenizer.chat_templates", str, default=[]):
        if metadata.get(f"tokenizer.chat_template.{name}") is not None:
            templates[name] = metadata.string(f"tokenizer.chat_template.{name}")
    return templates
