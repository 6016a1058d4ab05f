"""Tokens beside the learned vocabulary: special ones and those a user added, from every file that may declare them.

Newer checkpoints keep them in tokenizer_config.json (`added_tokens_decoder`: id -> token with its flags), older ones
in special_tokens_map.json and added_tokens.json. `read_added_tokens` is handed the folder's files and returns one
`AddedTokens`; `install` puts them into a tokenizer at the ids declared, or raises a `CheckpointError`.

Flags, as the `tokenizers` library has them: `lstrip`/`rstrip` swallow white space on that side, `single_word` matches
between word boundaries only, `normalized` matches after normalisation, `special` is left out of decoded text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from mini_vllm.exceptions import CheckpointError
from mini_vllm.text.reading import read_json_object, rust_errors

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_MAX_ID = 1 << 24


@dataclass(frozen=True)
class AddedTokens:
    """named: 'bos_token' and the like. declared: by id. listed: special tokens without an id of their own."""

    named: dict[str, AddedToken]
    declared: dict[int, AddedToken]
    listed: list[AddedToken]

    @property
    def special_tokens(self) -> dict[str, str]:
        """The text of each named token."""
        return {name: token.content for name, token in self.named.items()}

    def with_defaults(self, defaults: Mapping[str, str]) -> "AddedTokens":
        """With those names that no file gave, as a family of tokenizers has them."""
        missing = {
            name: AddedToken(text, special=True, normalized=False)
            for name, text in defaults.items()
            if name not in self.named
        }
        return AddedTokens(self.named | missing, self.declared, self.listed)


def read_added_tokens(folder: Path, config: Mapping[str, Any]) -> AddedTokens:
    """`config` is tokenizer_config.json's; the older files count only where it has no `added_tokens_decoder`."""
    file = folder / CONFIG_FILE
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        file = folder / SPECIAL_TOKENS_FILE
        config = {**config, **read_json_object(file)}
    named = {
        name: token for name in NAMED_SPECIAL_TOKENS if (token := _token(config.get(name), file, name, special=True))
    }
    listed = _listed_tokens(config, file)
    if decoder is not None:
        return AddedTokens(named, _declared_tokens(decoder, file), listed)
    special = {token.content for token in (*named.values(), *listed)}
    return AddedTokens(named, _legacy_tokens(folder / ADDED_TOKENS_FILE, special), listed)


def _token(value: Any, file: Path, key: str, *, special: bool | None = None) -> AddedToken | None:
    """A token is its text, or an object with 'content' and flags; None where there is none."""
    flags: dict[str, bool] = {}
    if isinstance(value, Mapping):
        flags = {name: bool(value[name]) for name in _FLAGS if value.get(name) is not None}
        value = value.get("content")
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise CheckpointError(f"{file}: {key} must be a token or an object with its content, got {value!r:.80}")
    if special is not None:
        flags["special"] = special
    flags.setdefault("normalized", not flags.get("special", False))
    return AddedToken(value, **flags)


def _listed_tokens(config: Mapping[str, Any], file: Path) -> list[AddedToken]:
    listed = []
    for key in _LISTS:
        entries = config.get(key) or []
        if isinstance(entries, Mapping):  # name of an attribute -> token
            entries = list(entries.values())
        if not isinstance(entries, list):
            raise CheckpointError(f"{file}: {key} must be a list of tokens, got {type(entries).__name__}")
        listed += [token for entry in entries if (token := _token(entry, file, key, special=True))]
    return listed


def _declared_tokens(decoder: Any, file: Path) -> dict[int, AddedToken]:
    if not isinstance(decoder, Mapping):
        raise CheckpointError(f"{file}: added_tokens_decoder must be an object, got {type(decoder).__name__}")
    declared = {}
    for key, entry in decoder.items():
        token = _token(entry, file, f"added_tokens_decoder[{key!r}]")
        if token is None:
            raise CheckpointError(f"{file}: added_tokens_decoder[{key!r}] has no content")
        declared[_checked_id(key, file, f"added_tokens_decoder: {token.content!r}")] = token
    return dict(sorted(declared.items()))


def _legacy_tokens(file: Path, special: set[str]) -> dict[int, AddedToken]:
    declared: dict[int, AddedToken] = {}
    for text, value in read_json_object(file).items():
        token_id = _checked_id(value, file, repr(text))
        if token_id in declared:
            raise CheckpointError(f"{file}: {text!r} and {declared[token_id].content!r} both have id {token_id}")
        declared[token_id] = AddedToken(text, special=text in special, normalized=text not in special)
    return dict(sorted(declared.items()))


def _checked_id(value: Any, file: Path, what: str) -> int:
    if isinstance(value, str) and value.isdecimal() and value.isascii():
        value = int(value) if len(value) < 10 else -1
    if type(value) is not int or not 0 <= value < _MAX_ID:
        raise CheckpointError(f"{file}: {what} must have an id from 0 to {_MAX_ID - 1}, has {value!r:.40}")
    return value


def place_in_vocab(vocab: dict[str, int], tokens: AddedTokens, file: Path) -> dict[str, int]:
    """`vocab` with the declared tokens at their ids, so that ids may have holes. Raises `CheckpointError`."""
    by_id = {token_id: text for text, token_id in vocab.items()}
    placed = dict(vocab)
    for token_id, token in tokens.declared.items():
        if placed.get(token.content, token_id) != token_id or by_id.get(token_id, token.content) != token.content:
            holder = by_id.get(token_id)
            has = f"id {token_id} is {holder!r}" if holder is not None else f"it has id {placed[token.content]}"
            raise CheckpointError(
                f"{file}: {token.content!r} is declared as id {token_id}, but in the vocabulary {has}"
            )
        placed[token.content] = token_id
        by_id[token_id] = token.content
    return placed


def install(backend: RustTokenizer, tokens: AddedTokens, folder: Path) -> None:
    """Add what `backend` does not know yet: declared tokens at their ids, then named and listed ones, which become
    special; those without an id take the next free ones. Raises `CheckpointError`."""
    known = backend.get_added_tokens_decoder()
    named = {token.content for token in (*tokens.named.values(), *tokens.listed)}
    with rust_errors(folder / CONFIG_FILE, "its added tokens are refused"):
        for token_id, token in tokens.declared.items():
            if token_id in known and known[token_id].content == token.content:
                continue
            token.special = token.special or token.content in named
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != token_id:
                raise CheckpointError(
                    f"{folder / CONFIG_FILE}: added_tokens_decoder puts {token.content!r} at id {token_id}, "
                    f"but the vocabulary would give it id {backend.token_to_id(token.content)}"
                )
        marked = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        for token in (*tokens.named.values(), *tokens.listed):
            if token.content not in marked:
                backend.add_special_tokens([token])
