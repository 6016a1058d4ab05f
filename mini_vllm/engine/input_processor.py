"""Prompts become core `Request`s; whatever is wrong with one is said here, before the core sees anything.

The processor is handed the tokenizer, the model's sizes and its generation config. It promises that a request it
returns has at least one token, that every id has a row in the embedding, and that room for at least one output
token is left in the context.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mini_vllm.engine.parallel_sampling import child_ids
from mini_vllm.engine.param_checks import DEFAULT_MAX_LOGPROBS, ParamChecker
from mini_vllm.exceptions import CheckpointError, InvalidParameterError, PromptTooLongError
from mini_vllm.logger import init_logger
from mini_vllm.request import Request, Tenant
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.text.tokenizer import Tokenizer

logger = init_logger(__name__)

PromptType = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; dicts may add "cache_salt"."""

_MOST_SHRINKING = 4
"""How much shorter normalising may make a text before it becomes tokens. NFC comes to a third at best."""
_PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", "cache_salt"})
_DEFAULTS_FROM_GENERATION_CONFIG = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass
class TokenizedPrompt:
    """A prompt whose ids are known and valid. `text` is None when only ids were given."""

    token_ids: list[int]
    text: str | None = None
    cache_salt: str | None = None


class InputProcessor:
    """Validates prompts and parameters for one model.

    max_model_len: tokens a request may hold, prompt and output together.
    vocab_size: rows of the model's embedding.
    default_sampling_params: what a request without any gets; see `sampling_params_of`.
    default_max_tokens: what the model's configuration says of `max_tokens`; None when it says nothing.
    eos_token_ids: every id that ends a sequence by the model's configs; the tokenizer's own comes first.
    max_logprobs: the most that a request may ask for at a position; -1 is the whole vocabulary.
    takes_priority: whether the scheduling policy looks at priorities.

    default_max_tokens: what the generation config says; None where it does not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_model_len: int,
        vocab_size: int,
        default_sampling_params: SamplingParams | None = None,
        default_max_tokens: int | None = None,
        eos_token_ids: Sequence[int] = (),
        max_logprobs: int = DEFAULT_MAX_LOGPROBS,
        takes_priority: bool = True,
        clock: Callable[[], float],
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.takes_priority = takes_priority
        self.clock = clock
        self.checker = ParamChecker(tokenizer, vocab_size, max_logprobs)
        self.default_sampling_params = default_sampling_params or SamplingParams()
        self.default_max_tokens = default_max_tokens
        primary = tokenizer.eos_token_id
        self.eos_token_id = primary if primary is not None else next(iter(eos_token_ids), None)
        self._extra_eos_ids = tuple(i for i in dict.fromkeys(eos_token_ids) if i != self.eos_token_id)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence, the one that is always checked first."""
        return self._extra_eos_ids if self.eos_token_id is None else (self.eos_token_id, *self._extra_eos_ids)

    # -- prompts ----------------------------------------------------------------------------------------------

    def tokenize(self, prompts: Sequence[PromptType], add_special_tokens: bool = True) -> list[TokenizedPrompt]:
        """Parse, encode (all texts at once) and check prompts. Raises before anything is queued; with more than
        one prompt the message says which is wrong."""
        parsed = [self._located(i, len(prompts), self._parse, prompt) for i, prompt in enumerate(prompts)]
        for index, item in enumerate(parsed):
            if "prompt_token_ids" not in item:
                self._located(index, len(parsed), self._check_size, item["prompt"])
        texts = [item["prompt"] for item in parsed if "prompt_token_ids" not in item]
        encoded = iter(self.tokenizer.encode_batch(texts, add_special_tokens) if texts else [])
        tokenized = []
        for index, item in enumerate(parsed):
            ids = item["prompt_token_ids"] if "prompt_token_ids" in item else next(encoded)
            prompt = TokenizedPrompt(ids, item.get("prompt"), item.get("cache_salt"))
            self._located(index, len(prompts), self._check_ids, prompt)
            tokenized.append(prompt)
        return tokenized

    @staticmethod
    def _located(index: int, total: int, check: Callable[[Any], Any], value: Any) -> Any:
        """Run `check`; in a batch, its error says at which position."""
        if total == 1:
            return check(value)
        try:
            return check(value)
        except InvalidParameterError as error:
            message = str(error).removeprefix(f"{error.field}: ")
            raise type(error)(error.field, f"(prompt {index} of {total}) {message}") from None

    def _parse(self, prompt: Any) -> dict[str, Any]:
        """A dict with 'prompt' and/or 'prompt_token_ids' of the right types; ids win over text."""
        if isinstance(prompt, str):
            return {"prompt": self._checked_text(prompt)}
        if isinstance(prompt, Mapping):
            return self._parse_mapping(prompt)
        return {"prompt_token_ids": _as_ids(prompt, "prompt")}

    def _parse_mapping(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        unknown = sorted(str(key) for key in prompt if key not in _PROMPT_KEYS)
        if unknown:
            raise InvalidParameterError(
                "prompt", f"unknown keys {', '.join(unknown)}; a prompt dict has {', '.join(sorted(_PROMPT_KEYS))}"
            )
        parsed = {key: value for key, value in prompt.items() if value is not None}
        if "prompt" in parsed:
            if not isinstance(parsed["prompt"], str):
                raise InvalidParameterError("prompt", f"must be text, got {type(parsed['prompt']).__name__}")
            self._checked_text(parsed["prompt"])
        elif "prompt_token_ids" not in parsed:
            raise InvalidParameterError("prompt", "a prompt dict needs 'prompt' or 'prompt_token_ids'")
        if "prompt_token_ids" in parsed:
            parsed["prompt_token_ids"] = _as_ids(parsed["prompt_token_ids"], "prompt_token_ids")
        _check_salt(parsed.get("cache_salt"))
        return parsed

    @staticmethod
    def _checked_text(text: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidParameterError("prompt", f"is no valid Unicode: {error.reason} at {error.start}") from None
        return text

    def _check_size(self, text: str) -> None:
        """Before time is spent on tokenising a text that is too long by far."""
        most = self.max_model_len * self.tokenizer.longest_token * _MOST_SHRINKING
        if len(text) * 4 > most and (size := len(text.encode("utf-8"))) > most:
            raise PromptTooLongError(
                "prompt",
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt has {size} "
                f"bytes, and {self.max_model_len} tokens are at most {most}. Please shorten the prompt.",
            )

    def _check_ids(self, prompt: TokenizedPrompt) -> None:
        ids = prompt.token_ids
        if not ids:
            raise InvalidParameterError("prompt", "must have at least one token, got none")
        lowest, highest = min(ids), max(ids)
        if lowest < 0 or highest >= self.vocab_size:
            bad = lowest if lowest < 0 else highest
            raise InvalidParameterError(
                "prompt_token_ids",
                f"token id {bad} at position {ids.index(bad)} is out of range: the model's vocabulary has ids 0 to "
                f"{self.vocab_size - 1}",
            )
        if len(ids) >= self.max_model_len:
            raise PromptTooLongError(
                "prompt",
                f"This model's maximum context length is {self.max_model_len} tokens. However, the prompt has "
                f"{len(ids)} tokens, and at least one must be left for the output. Please shorten the prompt.",
            )

    # -- requests ---------------------------------------------------------------------------------------------

    def make_request(
        self,
        request_id: str,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        tenant: Tenant = Tenant(),  # noqa: B008 (frozen)
    ) -> Request:
        """The core's record of a request. `params` is what `resolve_params` returned. cache_salt: None takes the
        prompt's own."""
        _check_salt(cache_salt)
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidParameterError("priority", f"must be an integer, got {priority!r}")
        if priority and not self.takes_priority:
            raise InvalidParameterError("priority", f"needs --scheduling-policy priority, got {priority}")
        return Request(
            request_id,
            prompt.token_ids,
            params,
            eos_token_id=self.eos_token_id,
            arrival_time=self.clock() if arrival_time is None else arrival_time,
            priority=priority,
            max_model_len=self.max_model_len,
            cache_salt=prompt.cache_salt if cache_salt is None else cache_salt,
            child_ids=child_ids(request_id, params.n),
            bad_words_token_ids=self.checker.bad_words_token_ids(params) if params.bad_words else (),
            tenant=tenant,
        )

    def resolve_params(self, params: SamplingParams | None) -> SamplingParams:
        """The parameters a request really gets, checked against the model: the model's defaults for None, and its
        further end-of-sequence ids among the stop ids unless `ignore_eos`."""
        if params is None:
            params = self.default_sampling_params
        if not isinstance(params, SamplingParams):
            raise InvalidParameterError("sampling_params", f"must be SamplingParams, got {type(params).__name__}")
        self.checker.check(params)
        if params.ignore_eos or not self._extra_eos_ids:
            return params
        stop_ids = dict.fromkeys((*params.stop_token_ids, *self._extra_eos_ids))
        return replace(params, stop_token_ids=tuple(stop_ids))


def sampling_params_of(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What a parsed generation_config.json says. Raises `CheckpointError` if it asks for the impossible."""
    chosen = {
        ours: generation_config[theirs]
        for theirs, ours in _DEFAULTS_FROM_GENERATION_CONFIG.items()
        if generation_config.get(theirs) is not None
    }
    if chosen:
        logger.info("default sampling parameters from generation_config.json: %s", chosen)
    try:
        return SamplingParams(**chosen)
    except InvalidParameterError as error:
        raise CheckpointError(f"generation_config.json: {error}") from error


def _as_ids(value: Any, field: str) -> list[int]:
    """`value` as a list of plain ints (numpy integers are converted)."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise InvalidParameterError(field, f"must be text or a list of token ids, got {type(value).__name__}")
    ids = list(value)
    if set(map(type, ids)) <= {int}:
        return ids
    for position, token_id in enumerate(ids):
        if not is_integer(token_id):
            raise InvalidParameterError(field, f"token ids must be integers, got {token_id!r} at position {position}")
    return [operator.index(token_id) for token_id in ids]


def is_integer(value: Any) -> bool:
    """Whether `value` is a whole number, numpy's included; arrays of one element are not."""
    return not isinstance(value, bool) and hasattr(type(value), "__index__") and not hasattr(type(value), "__len__")


def _check_salt(salt: Any) -> None:
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise InvalidParameterError("cache_salt", f"must be a string that is not empty, got {salt!r}")
