"""Text to token ids and back, by a checkpoint's own `tokenizer.json`.

`Tokenizer.from_folder` is handed a folder (or a tokenizer.json) and reads tokenizer.json, tokenizer_config.json,
special_tokens_map.json and the chat templates; the `tokenizers` library does the work. Promises: the ids are those
that transformers' fast tokenizers give, a beginning-of-sequence token is added exactly once, nothing is ever
truncated or padded, and no code from a checkpoint runs.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from mini_vllm.exceptions import CheckpointError, InvalidParameterError
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CHAT_TEMPLATE_DIR = "additional_chat_templates"

_NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FOREIGN_FORMATS = ("tokenizer.model", "vocab.json", "merges.txt", "tekken.json", "tiktoken.model", "vocab.txt")


class Tokenizer:
    """A checkpoint's tokenizer. Safe to share between threads: nothing changes after construction.

    special_tokens: the named ones ('bos_token', 'eos_token', ...) as text; chat templates see them.
    chat_templates: by name; 'default' is the one used unless another is asked for.
    """

    def __init__(
        self,
        backend: RustTokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        add_bos_token: bool = False,
        name_or_path: str = "",
    ) -> None:
        self.backend = backend
        self.name_or_path = name_or_path
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        backend.no_truncation()  # a truncated prompt would be answered as if it were the whole one
        backend.no_padding()
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token")
        self._prepend_bos = add_bos_token and self.bos_token_id is not None and not self._post_processor_adds_bos()

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Read a checkpoint folder. Raises `CheckpointError` naming the file at fault."""
        folder = Path(path)
        if folder.is_file():
            folder = folder.parent
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            raise CheckpointError(_missing_message(folder))
        try:
            backend = RustTokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises a bare Exception
            raise CheckpointError(f"{file}: not a readable tokenizer.json: {error}") from error
        config = _read_json(folder / CONFIG_FILE)
        if "added_tokens_decoder" not in config:  # the older layout keeps the names in a file of their own
            config = config | _read_json(folder / SPECIAL_TOKENS_FILE)
        special = {name: text for name in _NAMED_SPECIAL_TOKENS if (text := _token_text(config.get(name)))}
        _add_missing_tokens(backend, config, special, folder)
        return cls(
            backend,
            special_tokens=special,
            chat_templates=_read_chat_templates(folder, config),
            add_bos_token=bool(config.get("add_bos_token", False)),
            name_or_path=str(folder),
        )

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def _post_processor_adds_bos(self) -> bool:
        return self.backend.encode("a", add_special_tokens=True).ids[:1] == [self.bos_token_id]

    # -- encoding ---------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. With `add_special_tokens`, whatever the tokenizer frames a text with (BOS)."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self._framed(ids, add_special_tokens)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts at once, on several threads, without the offsets nobody reads."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [self._framed(encoding.ids, add_special_tokens) for encoding in encodings]

    def _framed(self, ids: list[int], add_special_tokens: bool) -> list[int]:
        if add_special_tokens and self._prepend_bos and self.bos_token_id is not None:
            return [self.bos_token_id, *ids]
        return ids

    # -- decoding ---------------------------------------------------------------------------------------------

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are no valid UTF-8 become U+FFFD."""
        tokens = [ids] if isinstance(ids, int) else list(ids)
        text: str = self.backend.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The vocabulary's own spelling of one id (str) or of several (list[str]); None for an unused id."""
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        return [self.backend.id_to_token(token_id) for token_id in ids]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of one token (int) or of several (list[int]); None for a token that is not in the vocabulary."""
        if isinstance(tokens, str):
            return self.backend.token_to_id(tokens)
        return [self.backend.token_to_id(token) for token in tokens]

    # -- vocabulary -------------------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included (ids may have holes)."""
        return max(self.get_vocab().values(), default=-1) + 1

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        vocab: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        return vocab

    def __len__(self) -> int:
        return self.vocab_size

    @cached_property
    def all_special_ids(self) -> list[int]:
        """Ids that `skip_special_tokens` leaves out, in order."""
        added = self.backend.get_added_tokens_decoder()
        return sorted(token_id for token_id, token in added.items() if token.special)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    # -- chat -------------------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The default chat template, or None."""
        return self.chat_templates.get("default")

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template to use: the one given (as a template, or by the name the checkpoint has for it), else the
        checkpoint's 'tool_use' when there are tools, else its default."""
        if chat_template is not None:
            return self.chat_templates.get(chat_template, chat_template)
        if tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if "default" in self.chat_templates:
            return self.chat_templates["default"]
        known = f"; it has {sorted(self.chat_templates)} and no 'default'" if self.chat_templates else ""
        raise InvalidParameterError(
            "chat_template",
            f"the tokenizer of {self.name_or_path or 'this model'} has no default chat template{known}. "
            "Pass chat_template=..., or use generate() for plain completion",
        )

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation; `tokenize` gives ids (list[int]), else the text.

        The template writes the special tokens itself, so none are added on encoding. `kwargs` reach the template.
        Raises `InvalidParameterError` when the template refuses the conversation or is broken or hostile.
        """
        from mini_vllm.text.chat_template import render_chat  # jinja2 loads with the first chat only

        text = render_chat(
            self.get_chat_template(chat_template, tools),
            conversation,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self.special_tokens, **kwargs},
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def __repr__(self) -> str:
        return f"Tokenizer({self.name_or_path!r}, vocab_size={self.vocab_size})"


def _missing_message(folder: Path) -> str:
    looked = ", ".join((TOKENIZER_FILE, CONFIG_FILE))
    if not folder.is_dir():
        return f"tokenizer: no such folder: {folder} (looked there for {looked})"
    foreign = [name for name in _FOREIGN_FORMATS if (folder / name).is_file()]
    hint = (
        f"; it has {', '.join(foreign)}, a format this engine does not read: convert it once with "
        "transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        if foreign
        else ""
    )
    return f"tokenizer: {folder} has no {TOKENIZER_FILE} (looked for {looked}){hint}"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


def _token_text(value: Any) -> str | None:
    """A token in a config is its text, or an object whose 'content' is its text."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _add_missing_tokens(
    backend: RustTokenizer, config: Mapping[str, Any], special: Mapping[str, str], folder: Path
) -> None:
    """Tokens that only tokenizer_config.json knows, at the ids it gives; and named tokens become special."""
    declared = config.get("added_tokens_decoder") or {}
    known = backend.get_added_tokens_decoder()
    for key, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        token_id, token = int(key), _added_token(entry)
        if token_id in known:
            continue
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: added_tokens_decoder puts {token.content!r} at id {token_id}, "
                f"but {TOKENIZER_FILE} would give it id {backend.token_to_id(token.content)}"
            )
    unmarked = [text for text in special.values() if backend.token_to_id(text) is not None]
    marked = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in unmarked if text not in marked]
    )


def _added_token(entry: Any) -> AddedToken:
    if isinstance(entry, str):
        return AddedToken(entry, special=True, normalized=False)
    flags = {
        name: bool(entry[name])
        for name in ("lstrip", "rstrip", "single_word", "normalized", "special")
        if name in entry
    }
    return AddedToken(str(entry.get("content", "")), **flags)


def _read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template files win over tokenizer_config.json, whose entry is one template or a list of named ones."""
    files = {path.stem: path for path in sorted((folder / CHAT_TEMPLATE_DIR).glob("*.jinja"))}
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        files["default"] = folder / CHAT_TEMPLATE_FILE
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    entry = config.get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, Mapping):
        return {str(name): str(template) for name, template in entry.items()}
    if isinstance(entry, list):
        return {str(item["name"]): str(item["template"]) for item in entry if isinstance(item, Mapping)}
    return {}
