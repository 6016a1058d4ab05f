"""Which tokenizer a checkpoint folder has, and reading it.

In order of preference: `tokenizer.json` (everything in one file), `vocab.json` with `merges.txt` (`byte_level.py`), a
SentencePiece model (`sentencepiece.py`). tokenizer_config.json and its older companions add special tokens, the chat
template, and whether a text is framed by BOS and EOS. `load_tokenizer` is handed a folder or one of those files and
returns a `Tokenizer`; everything wrong with the files is a `CheckpointError` that names the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors

from mini_vllm.exceptions import CheckpointError
from mini_vllm.text.added_tokens import CONFIG_FILE, AddedTokens, install, read_added_tokens
from mini_vllm.text.byte_level import MERGES_FILE, VOCAB_FILE, build_byte_level, find_family
from mini_vllm.text.reading import read_bytes, read_json_object, read_text, rust_errors
from mini_vllm.text.sentencepiece import BPE, CONTROL, USER_DEFINED, read_sentencepiece
from mini_vllm.text.sentencepiece_normalizer import SentencePieceNormalizer
from mini_vllm.text.sentencepiece_tokenizer import build_sentencepiece, named_pieces
from mini_vllm.text.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CHAT_TEMPLATE_DIR = "additional_chat_templates"

_FOREIGN_FILES = ("tekken.json", "tiktoken.model", "qwen.tiktoken", "vocab.txt")


@dataclass(frozen=True)
class _Source:
    """A tokenizer before framing: what encodes, what prepares its text, and the family's defaults.

    is_complete: the file says itself how a text is framed.
    """

    backend: RustTokenizer
    tokens: AddedTokens
    is_complete: bool = False
    add_bos: bool = False
    add_eos: bool = False
    normalize: Callable[[str], str] | None = None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder, or the one in a given file. Raises `CheckpointError`."""
    given = Path(path)
    folder = given.parent if given.is_file() else given
    config = read_json_object(folder / CONFIG_FILE)
    tokens = read_added_tokens(folder, config)
    source = _read_source(given, folder, config, tokens)
    special = {
        name: text
        for name, text in source.tokens.special_tokens.items()
        if source.backend.token_to_id(text) is not None
    }
    _frame(source, special, config)
    return Tokenizer(
        source.backend,
        special_tokens=special,
        chat_templates=_read_chat_templates(folder, config),
        normalize=source.normalize,
        name_or_path=str(folder),
    )


def _read_source(given: Path, folder: Path, config: Mapping[str, Any], tokens: AddedTokens) -> _Source:
    if given.is_file() and given.suffix == ".model":
        return _from_sentencepiece(given, config, tokens)
    if (folder / TOKENIZER_FILE).is_file():
        return _from_tokenizer_json(folder / TOKENIZER_FILE, tokens)
    if (folder / VOCAB_FILE).is_file() and (folder / MERGES_FILE).is_file():
        return _from_vocab_and_merges(folder, config, tokens)
    for name in SENTENCEPIECE_FILES:
        if (folder / name).is_file():
            return _from_sentencepiece(folder / name, config, tokens)
    raise CheckpointError(_missing_message(folder))


def _missing_message(folder: Path) -> str:
    looked = f"{TOKENIZER_FILE}, {VOCAB_FILE} with {MERGES_FILE}, {', '.join(SENTENCEPIECE_FILES)}"
    if not folder.is_dir():
        return f"tokenizer: no such folder: {folder} (looked there for {looked})"
    foreign = [name for name in (*_FOREIGN_FILES, VOCAB_FILE, MERGES_FILE) if (folder / name).is_file()]
    hint = (
        f"; it has {', '.join(foreign)}, which alone this engine does not read: convert it once with "
        "transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        if foreign
        else ""
    )
    return f"tokenizer: {folder} has none (looked for {looked}){hint}"


# -- the three kinds of sources -----------------------------------------------------------------------------------


def _from_tokenizer_json(file: Path, tokens: AddedTokens) -> _Source:
    text = read_text(file)
    with rust_errors(file, "not a readable tokenizer.json"):
        backend = RustTokenizer.from_str(text)
    install(backend, tokens, file.parent)
    return _Source(backend, tokens, is_complete=True)


def _from_vocab_and_merges(folder: Path, config: Mapping[str, Any], tokens: AddedTokens) -> _Source:
    family = find_family(folder, _class_name(config), _model_type(folder))
    backend = build_byte_level(folder, family, tokens, config)
    known = {name: text for name, text in family.defaults.items() if backend.token_to_id(text) is not None}
    tokens = tokens.with_defaults(known)
    install(backend, tokens, folder)
    return _Source(backend, tokens, add_bos=family.add_bos)


def _from_sentencepiece(file: Path, config: Mapping[str, Any], tokens: AddedTokens) -> _Source:
    _refuse_tiktoken(file)
    model = read_sentencepiece(file)
    add_prefix_space = config.get("add_prefix_space")
    prefix = model.add_dummy_prefix if add_prefix_space is None else bool(add_prefix_space)
    backend = build_sentencepiece(model, tokens, file, add_dummy_prefix=prefix)
    tokens = tokens.with_defaults(named_pieces(model))
    install(backend, tokens, file.parent)
    added = backend.get_added_tokens_decoder()
    own = {piece.text for piece in model.pieces if piece.kind == USER_DEFINED}
    normalize = SentencePieceNormalizer(
        model, added.values(), own, add_dummy_prefix=prefix, prefix_every_text=bool(config.get("legacy", False))
    )
    has_bos = 0 <= model.bos_id < len(model.pieces) and model.pieces[model.bos_id].kind == CONTROL
    is_t5 = _class_name(config).startswith("T5Tokenizer")
    generates = has_bos and model.model_type == BPE  # Llama, Mistral, Gemma
    return _Source(backend, tokens, add_bos=generates, add_eos=is_t5, normalize=normalize)


def _refuse_tiktoken(file: Path) -> None:
    """Llama 3's original `tokenizer.model` is lines of base64 and a rank, not a SentencePiece model."""
    line = read_bytes(file)[:200].split(b"\n", 1)[0].split(b" ")
    if len(line) == 2 and line[1].strip().isdigit():
        raise CheckpointError(
            f"{file}: is a tiktoken vocabulary, which is not read here; take the checkpoint's tokenizer.json"
        )


def _class_name(config: Mapping[str, Any]) -> str:
    name = config.get("tokenizer_class")
    return name if isinstance(name, str) else ""


def _model_type(folder: Path) -> str:
    value = read_json_object(folder / "config.json").get("model_type")
    return value if isinstance(value, str) else ""


# -- BOS and EOS --------------------------------------------------------------------------------------------------


def _frame(source: _Source, special: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Have the post-processor add BOS and EOS where they belong.

    What a tokenizer.json adds by itself stays; of the config only `add_bos_token: true` counts beside it, for files
    of models that need a BOS and do not say so. Elsewhere the config decides, or else the family.
    """
    backend = source.backend
    bos, eos = special.get("bos_token"), special.get("eos_token")
    has_bos, has_eos = _framed_by(backend, bos, eos)
    if source.is_complete:
        wants_bos, wants_eos = has_bos or _flag(config, "add_bos_token", False), has_eos
    else:
        wants_bos = _flag(config, "add_bos_token", source.add_bos)
        wants_eos = _flag(config, "add_eos_token", source.add_eos)
    before = [bos] if wants_bos and bos is not None else []
    after = [eos] if wants_eos and eos is not None else []
    if (bool(before), bool(after)) == (has_bos, has_eos):
        return
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(text, backend.token_to_id(text)) for text in {*before, *after}],
    )


def _framed_by(backend: RustTokenizer, bos: str | None, eos: str | None) -> tuple[bool, bool]:
    """Whether a text gets BOS in front and EOS behind as the tokenizer is."""
    bare = backend.encode("a", add_special_tokens=False).ids
    ids = backend.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(ids)) if bare and ids[i : i + len(bare)] == bare), None)
    before, after = (ids, ids) if start is None else (ids[:start], ids[start + len(bare) :])
    return (
        bos is not None and before[:1] == [backend.token_to_id(bos)],
        eos is not None and after[-1:] == [backend.token_to_id(eos)],
    )


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    return default if value is None else bool(value)


# -- chat templates -----------------------------------------------------------------------------------------------


def _read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template files win over tokenizer_config.json, whose entry is one template or a list of named ones."""
    files = {path.stem: path for path in sorted((folder / CHAT_TEMPLATE_DIR).glob("*.jinja"))}
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        files["default"] = folder / CHAT_TEMPLATE_FILE
    if files:
        return {name: read_text(path) for name, path in files.items()}
    entry = config.get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, Mapping):
        return {str(name): str(template) for name, template in entry.items()}
    if isinstance(entry, list):
        named = [item for item in entry if isinstance(item, Mapping) and {"name", "template"} <= item.keys()]
        return {str(item["name"]): str(item["template"]) for item in named}
    return {}
