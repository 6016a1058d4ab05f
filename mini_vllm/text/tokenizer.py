"""Text to token ids and back, by a checkpoint's own tokenizer.

`Tokenizer.from_folder` is handed a folder (or one of its tokenizer files), which `load.py` reads, whatever the kind;
the `tokenizers` library does the work. Promises: the ids are those the model was trained with, a beginning-of-sequence
token is added exactly once, nothing is ever truncated or padded, and no code from a checkpoint runs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from mini_vllm.exceptions import InvalidParameterError


class Tokenizer:
    """A checkpoint's tokenizer. Safe to share between threads: nothing changes after construction.

    special_tokens: the named ones ('bos_token', 'eos_token', ...) as text; chat templates see them.
    chat_templates: by name; 'default' is the one used unless another is asked for.
    normalize: applied to a text before `backend` sees it, where its own normalisers cannot do it (SentencePiece).
    """

    def __init__(
        self,
        backend: RustTokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        add_bos_token: bool = False,
        normalize: Callable[[str], str] | None = None,
        name_or_path: str = "",
    ) -> None:
        self.backend = backend
        self._normalize = normalize
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
        """Read a checkpoint folder, or one of its tokenizer files. Raises `CheckpointError` naming the file."""
        from mini_vllm.text.load import load_tokenizer  # which builds objects of this class

        return load_tokenizer(path)

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def _post_processor_adds_bos(self) -> bool:
        return self.backend.encode("a", add_special_tokens=True).ids[:1] == [self.bos_token_id]

    # -- encoding ---------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. With `add_special_tokens`, whatever the tokenizer frames a text with (BOS)."""
        return self.encode_batch([text], add_special_tokens)[0]  # the library's `encode` would hold the GIL

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts at once, on several threads, without the offsets nobody reads."""
        prepared = [self._prepared(text) for text in texts]
        encodings = self.backend.encode_batch_fast(prepared, add_special_tokens=add_special_tokens)
        return [self._framed(encoding.ids, add_special_tokens) for encoding in encodings]

    def _prepared(self, text: str) -> str:
        """Raises `InvalidParameterError` for half a surrogate pair, which is no character and has no bytes."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidParameterError("prompt", f"is not valid Unicode: {error}") from error
        return text if self._normalize is None else self._normalize(text)

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
        """Highest id + 1, added tokens included (ids may have holes).

        Where each of the ids below the number of tokens has a token, that number it is, and no list of all has to be
        made, which is half a second for a large vocabulary.
        """
        count: int = self.backend.get_vocab_size(with_added_tokens=True)
        if count and all(self.backend.id_to_token(token_id) is not None for token_id in range(count - 1, -1, -1)):
            return count
        return max(self.get_vocab().values(), default=-1) + 1

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        vocab: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        return vocab

    def __len__(self) -> int:
        return self.vocab_size

    @cached_property
    def longest_token(self) -> int:
        """UTF-8 bytes of the longest spelling in the vocabulary; no token stands for more of a normalised text."""
        return max((len(token.encode("utf-8")) for token in self.get_vocab()), default=1)

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
