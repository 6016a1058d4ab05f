"""Log-probabilities in the shapes of the two APIs.

Tokens are named by their exact bytes: one that is half a character shows them escaped (`bytes:\\xe2\\x80` in
/v1/completions, without the word before it in chats, as OpenAI writes them), so that no two tokens share a name by
accident.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from mini_vllm.entrypoints.openai.bodies import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from mini_vllm.outputs import Logprob, LogprobsAtPosition
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.text.detokenizer import IncrementalDetokenizer
from mini_vllm.text.token_bytes import TokenBytes, token_bytes_of
from mini_vllm.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class TokenNames(dict[int, str]):
    """What tokens are called, each worked out once. as_ids: `token_id:N` instead of their text. mark: before bytes that
    are no text."""

    def __init__(self, token_bytes: TokenBytes, as_ids: bool, mark: str = "") -> None:
        super().__init__()
        self.bytes = token_bytes
        self._as_ids = as_ids
        self._mark = mark

    def __missing__(self, token_id: int) -> str:
        self[token_id] = name = f"token_id:{token_id}" if self._as_ids else self._read(self.bytes[token_id])
        return name

    def _read(self, raw: bytes) -> str:
        text = _text_of(raw)
        return self._mark + "".join(f"\\x{byte:02x}" for byte in raw) if text is None else text


@lru_cache(maxsize=16)
def token_names_of(tokenizer: Tokenizer, as_ids: bool, mark: str = "") -> TokenNames:
    """The one table of a tokenizer for each way to name tokens."""
    return TokenNames(token_bytes_of(tokenizer), as_ids, mark)


class ChatLogprobsShaper:
    """For the choices of one chat. params: what was asked for."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, as_ids: bool) -> None:
        self._names = token_names_of(tokenizer, as_ids)
        self._num_top = params.logprobs or 0
        self._by_id = frozenset(params.logprob_token_ids or ())

    def shape(self, token_ids: Sequence[int], positions: Sequence[LogprobsAtPosition]) -> ChatLogprobs:
        return ChatLogprobs([self._position(*pair) for pair in zip(token_ids, positions, strict=True)])

    def _position(self, token_id: int, entries: LogprobsAtPosition) -> ChatLogprob:
        top = [self._top(other, entry) for other, entry in self._wanted(entries)]
        return ChatLogprob(
            self._names[token_id], _finite(entries[token_id]), list(self._names.bytes[token_id]), top
        )  # fmt: skip

    def _wanted(self, entries: LogprobsAtPosition) -> Iterable[tuple[int, Logprob]]:
        """The likeliest in order (-1 is all), then those asked for by id."""
        ranked = [item for item in entries.items() if item[1].rank is not None]
        if self._num_top >= 0:
            ranked = [item for item in ranked if (item[1].rank or 0) <= self._num_top]
        ranked.sort(key=lambda item: item[1].rank or 0)
        listed = {token_id for token_id, _ in ranked}
        return [*ranked, *((i, e) for i, e in entries.items() if i in self._by_id and i not in listed)]

    def _top(self, token_id: int, entry: Logprob) -> TopLogprob:
        return TopLogprob(self._names[token_id], _finite(entry), list(self._names.bytes[token_id]))


class CompletionLogprobsShaper:
    """For one choice of a completion, which it is handed piece by piece.

    prompt_token_ids: what the output follows. offset: characters in front of the output, those of an echoed prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, as_ids: bool, prompt_token_ids: Sequence[int], offset: int
    ) -> None:
        self._names = token_names_of(tokenizer, as_ids, mark="bytes:")
        self._tokenizer = tokenizer
        self._params = params
        self._prompt_token_ids = prompt_token_ids
        self._detokenizer = self._new_detokenizer(prompt_token_ids)
        self._offset = offset

    def _new_detokenizer(self, context: Sequence[int]) -> IncrementalDetokenizer:
        params = self._params
        return IncrementalDetokenizer(
            self._tokenizer, context, params.skip_special_tokens, params.spaces_between_special_tokens
        )

    def prompt(self, positions: Sequence[LogprobsAtPosition | None]) -> CompletionLogprobs:
        """Of an echoed prompt."""
        offsets, _ = self._offsets(self._new_detokenizer(()), self._prompt_token_ids, 0)
        return self._shape(self._prompt_token_ids, positions, offsets)

    def output(self, token_ids: Sequence[int], positions: Sequence[LogprobsAtPosition]) -> CompletionLogprobs:
        """Of the next tokens of the output."""
        offsets, self._offset = self._offsets(self._detokenizer, token_ids, self._offset)
        return self._shape(token_ids, positions, offsets)

    def _offsets(
        self, detokenizer: IncrementalDetokenizer, token_ids: Sequence[int], start: int
    ) -> tuple[list[int], int]:
        """Where each token's text begins, and where the next one's will. Tokens of one character begin where it does; a
        token that shows bytes before it to be broken begins behind what stands for them."""
        offsets = []
        for token_id in token_ids:
            piece = detokenizer.update((token_id,))
            own = _text_of(self._names.bytes[token_id])
            offsets.append(start + len(piece.removesuffix(own)) if own and piece.endswith(own) else start)
            start += len(piece)
        return offsets, start

    def _shape(
        self, token_ids: Sequence[int], positions: Sequence[LogprobsAtPosition | None], offsets: list[int]
    ) -> CompletionLogprobs:
        pairs = list(zip(token_ids, positions, strict=True))
        return CompletionLogprobs(
            text_offset=offsets,
            token_logprobs=[None if entries is None else _finite(entries[token_id]) for token_id, entries in pairs],
            tokens=[self._names[token_id] for token_id in token_ids],
            top_logprobs=[None if entries is None else self._top(entries) for _, entries in pairs],
        )

    def _top(self, entries: LogprobsAtPosition) -> dict[str, float]:
        """With the token itself, likely or not. Of two tokens with one name the likelier stays."""
        named: dict[str, float] = {}
        for token_id, entry in entries.items():
            name = self._names[token_id]
            named[name] = max(_finite(entry), named.get(name, LEAST_LOGPROB))
        return named


def _text_of(raw: bytes) -> str | None:
    """None for bytes that are no whole characters."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """A prompt's and its output's."""
    return CompletionLogprobs(
        first.text_offset + second.text_offset,
        first.token_logprobs + second.token_logprobs,
        first.tokens + second.tokens,
        first.top_logprobs + second.top_logprobs,
    )


def prompt_logprobs(positions: Sequence[LogprobsAtPosition | None] | None) -> PromptLogprobs | None:
    """As vLLM shows them, by token id."""
    if positions is None:
        return None
    return [None if entries is None else _by_id(entries) for entries in positions]


def _by_id(entries: LogprobsAtPosition) -> dict[int, PromptLogprob]:
    return {i: PromptLogprob(_finite(entry), entry.rank, entry.decoded_token) for i, entry in entries.items()}


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, LEAST_LOGPROB)
