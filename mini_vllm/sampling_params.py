"""What a caller may ask of decoding, validated when it is constructed.

A `SamplingParams` that exists is valid: nothing after this file checks ranges again. Names, defaults
and meanings are vLLM's.
"""

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from mini_vllm.exceptions import InvalidParameterError

_MAX_SEED = 2**63 - 1
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

    temperature: 0 is greedy (argmax, ties to the lowest id, no randomness drawn).
    top_p: keep the smallest set of tokens whose probability reaches this; in (0, 1].
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    seed: the same seed gives the same tokens whoever shares the batch; None draws fresh entropy.
    max_tokens: output tokens at most; None means as many as the context holds.
    ignore_eos: go on after the end-of-sequence token.
    stop_token_ids: stop after any of these ids, which is kept in the output.
    skip_special_tokens: leave special tokens out of the text (never out of the ids).
    detokenize: produce text at all.
    extra_args: room for out-of-tree processors; the engine itself reads nothing from it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    extra_args: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        _require_number("temperature", self.temperature)
        if self.temperature < 0:
            raise InvalidParameterError("temperature", f"must be 0 (greedy) or more, got {self.temperature}")
        _require_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise InvalidParameterError("top_p", f"must be in (0, 1], got {self.top_p}")
        _require_int("top_k", self.top_k)
        if self.top_k < -1:
            raise InvalidParameterError("top_k", f"must be 0 or -1 (off) or a positive integer, got {self.top_k}")
        if self.seed is not None:
            _require_int("seed", self.seed)
            if not -_MAX_SEED - 1 <= self.seed <= _MAX_SEED:
                raise InvalidParameterError("seed", f"must fit 64 signed bits, got {self.seed}")
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens)
            if self.max_tokens < 1:
                raise InvalidParameterError("max_tokens", f"must be at least 1, got {self.max_tokens}")
        object.__setattr__(self, "stop_token_ids", self._checked_stop_ids())
        for name in ("ignore_eos", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameterError(name, f"must be a bool, got {getattr(self, name)!r}")

    def _checked_stop_ids(self) -> tuple[int, ...]:
        try:
            ids = tuple(self.stop_token_ids or ())
        except TypeError:
            raise InvalidParameterError(
                "stop_token_ids", f"must be a list of ids, got {self.stop_token_ids!r}"
            ) from None
        for token_id in ids:
            _require_int("stop_token_ids", token_id)
            if token_id < 0:
                raise InvalidParameterError("stop_token_ids", f"ids are 0 or more, got {token_id}")
        return ids

    @property
    def is_greedy(self) -> bool:
        """True when this request takes the argmax and draws nothing."""
        return self.temperature < GREEDY_EPSILON


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidParameterError(name, f"must be a finite number, got {value!r}")


def _require_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameterError(name, f"must be an integer, got {value!r}")
