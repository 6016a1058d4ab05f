"""What a caller may ask of decoding, validated when it is constructed.

A `SamplingParams` that exists is valid: nothing after this file checks ranges again. Names, defaults
and meanings are vLLM's. What takes the model to decide (its vocabulary, `max_logprobs`, how bad words are
tokenised) is checked by `engine.input_processor`.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from mini_vllm.exceptions import InvalidParameterError

_MAX_SEED = 2**63 - 1
_MAX_TOP_K = 2**31 - 1
GREEDY_EPSILON = 1e-5
"""Temperatures below this are greedy: dividing logits by them would overflow."""


class RequestOutputKind(IntEnum):
    """What each `RequestOutput` holds: all tokens so far, those since the last one, or only the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises `InvalidParameterError` naming the field.

    The order in which these act on the logits is in `docs/sampling.md`.

    n: sequences for one prompt, each with random numbers of its own; the prompt is computed once.
    temperature: 0 is greedy (argmax, ties to the lowest id, no randomness drawn); at most 1e6.
    top_p: keep the smallest set of tokens whose probability reaches this; in (0, 1].
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    min_p: keep tokens at least this fraction as probable as the most probable one; in [0, 1], 0 keeps all.
    repetition_penalty: positive logits of tokens in prompt or output are divided by it, negative ones multiplied;
        in [1e-4, 1e4], so that no logit overflows; 1 is off.
    presence_penalty: subtracted from the logit of every token in the output; in [-2, 2], 0 is off.
    frequency_penalty: the same, times how often it is there.
    seed: the same seed gives the same tokens whoever shares the batch; None draws fresh entropy.
    stop: end when the text contains one of these strings. A single string is taken too.
    stop_token_ids: stop after any of these ids, which is kept in the output.
    include_stop_str_in_output: leave the stop string in the text.
    bad_words: texts that may not appear, be it at the start of a word or inside one.
    logit_bias: added to the raw logits of these ids; None or {} is off.
    allowed_token_ids: only these may be sampled; None allows all.
    min_tokens: neither end of sequence nor stop ids nor stop strings end the output before this many tokens.
    max_tokens: output tokens at most; None means as many as the context holds.
    ignore_eos: go on after the end-of-sequence token.
    logprobs: report log-probabilities of the sampled token and of this many of the likeliest; -1 is the whole
        vocabulary, None reports none.
    prompt_logprobs: the same for the tokens of the prompt.
    logprob_token_ids: report the log-probabilities of these ids beside each sampled token.
    skip_special_tokens: leave special tokens out of the text (never out of the ids).
    spaces_between_special_tokens: put spaces around special tokens that are shown.
    detokenize: produce text at all.
    logits_processors: callables `(output token ids, logits [vocab]) -> logits [vocab]` for this request alone, run in
        the process of the engine. One that raises fails its request.
    extra_args: room for out-of-tree processors; the engine itself reads nothing from it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    bad_words: tuple[str, ...] = ()
    logit_bias: dict[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logits_processors: tuple[Callable[..., Any], ...] = ()
    extra_args: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        self._normalise()
        self._check_numbers()
        self._check_lengths()
        self._check_logit_bias()
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameterError(name, f"must be a bool, got {getattr(self, name)!r}")
        for processor in self.logits_processors:
            if not callable(processor):
                raise InvalidParameterError("logits_processors", f"must be callables, got {processor!r}")

    def with_max_tokens(self, max_tokens: int) -> "SamplingParams":
        """The same with another limit. Nothing is checked again that does not depend on it: that would cost as much as
        making the parameters did."""
        limited = copy.copy(self)
        limited._set("max_tokens", max_tokens)
        limited._check_lengths()
        return limited

    @property
    def is_greedy(self) -> bool:
        """True when this request takes the argmax and draws nothing."""
        return self.temperature < GREEDY_EPSILON

    @property
    def has_penalties(self) -> bool:
        """Whether what was generated so far changes the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities of sampled tokens are reported."""
        return self.logprobs is not None or bool(self.logprob_token_ids)

    # -- checks ----------------------------------------------------------------------------------------------

    def _normalise(self) -> None:
        """Lists become tuples, one string a tuple of one, and every item is checked."""
        for name in ("stop", "bad_words"):
            self._set(name, _strings(name, getattr(self, name)))
        self._set("stop_token_ids", _ids("stop_token_ids", self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise InvalidParameterError("allowed_token_ids", "must allow at least one id; None allows all")
        if self.logprob_token_ids is not None:
            self._set("logprob_token_ids", _ids("logprob_token_ids", self.logprob_token_ids))
        self._set("logits_processors", _items("logits_processors", self.logits_processors or (), "callables"))
        try:
            self._set("output_kind", RequestOutputKind(self.output_kind))
        except ValueError:
            kinds = ", ".join(kind.name for kind in RequestOutputKind)
            raise InvalidParameterError("output_kind", f"must be one of {kinds}, got {self.output_kind!r}") from None

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            _require_number(name, value)
            if not least <= value <= most:
                raise InvalidParameterError(name, f"must be in [{least:g}, {most:g}], got {value}")
        _require_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise InvalidParameterError("top_p", f"must be in (0, 1], got {self.top_p}")
        _require_int("top_k", self.top_k)
        if not -1 <= self.top_k <= _MAX_TOP_K:
            raise InvalidParameterError(
                "top_k", f"must be 0 or -1 (off) or a positive integer of 31 bits, got {self.top_k}"
            )
        if self.seed is not None:
            _require_int("seed", self.seed)
            if not -_MAX_SEED - 1 <= self.seed <= _MAX_SEED:
                raise InvalidParameterError("seed", f"must fit 64 signed bits, got {self.seed}")

    def _check_lengths(self) -> None:
        _require_at_least("n", self.n, 1)
        _require_at_least("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            _require_at_least("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidParameterError(
                    "min_tokens", f"must be at most max_tokens={self.max_tokens}, got {self.min_tokens}"
                )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is None:
                continue
            _require_int(name, value)
            if value < -1:
                raise InvalidParameterError(name, f"must be -1 (the whole vocabulary), 0 or more, got {value}")
        if self.stop and not self.detokenize:
            raise InvalidParameterError("stop", "stop strings need text: set detokenize=True, or use stop_token_ids")

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, dict):
            raise InvalidParameterError("logit_bias", f"must be a dict of ids and biases, got {self.logit_bias!r}")
        for token_id, bias in self.logit_bias.items():
            _require_id("logit_bias", token_id)
            _require_number("logit_bias", bias)


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How `LLM.beam_search` looks for likely continuations. Raises `InvalidParameterError` naming the field.

    beam_width: hypotheses kept, and returned. max_tokens: output tokens at most.
    ignore_eos: go on after the end-of-sequence token. temperature: must be 0, since nothing is sampled.
    length_penalty: hypotheses are ranked by (sum of logprobs) / (number of output tokens ** length_penalty): more than
        0 favours long ones, less than 0 short ones.
    include_stop_str_in_output: keep the end-of-sequence token in tokens and text.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _require_at_least("beam_width", self.beam_width, 1)
        _require_at_least("max_tokens", self.max_tokens, 1)
        _require_number("length_penalty", self.length_penalty)
        _require_number("temperature", self.temperature)
        if self.temperature != 0:
            raise InvalidParameterError("temperature", f"must be 0: beams are not sampled; got {self.temperature}")
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameterError(name, f"must be a bool, got {getattr(self, name)!r}")


_RANGES = {
    "temperature": (0.0, 1e6),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-4, 1e4),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_FLAGS = (
    "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "detokenize",
)  # fmt: skip


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidParameterError(name, f"must be a finite number, got {value!r}")


def _require_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameterError(name, f"must be an integer, got {value!r}")


def _require_at_least(name: str, value: int, least: int) -> None:
    _require_int(name, value)
    if value < least:
        raise InvalidParameterError(name, f"must be at least {least}, got {value}")


def _require_id(name: str, value: object) -> None:
    _require_int(name, value)
    if value < 0:  # type: ignore[operator]
        raise InvalidParameterError(name, f"ids are 0 or more, got {value}")


def _items(name: str, values: object, what: str) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
        raise InvalidParameterError(name, f"must be a list of {what}, got {values!r}")
    return tuple(values)


def _ids(name: str, values: object) -> tuple[int, ...]:
    ids = _items(name, values, "ids")
    for token_id in ids:
        _require_id(name, token_id)
    return ids


def _strings(name: str, values: object) -> tuple[str, ...]:
    """The strings of a list, or one alone; None is none of them, an empty string is an error."""
    texts = (values,) if isinstance(values, str) else _items(name, values or (), "strings")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise InvalidParameterError(name, f"must be strings that are not empty, got {text!r}")
    return texts
