"""A request is two counters, `num_computed_tokens` chasing `num_tokens`.

`Request` is the core's own mutable record of one sequence. There is no prefill or decode flag: a request
whose gap is large is prefilling, one whose gap is 1 is decoding, and one that was preempted has its
computed counter back at 0. Only the scheduler writes these fields.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mini_vllm.sampling_params import SamplingParams


class RequestStatus(enum.IntEnum):
    """Where a request is in its life. The order is logic: everything after PREEMPTED is finished."""

    WAITING = enum.auto()
    WAITING_FOR_GRAMMAR = enum.auto()
    WAITING_FOR_REMOTE_KVS = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED_STOPPED = enum.auto()
    FINISHED_LENGTH_CAPPED = enum.auto()
    FINISHED_ABORTED = enum.auto()
    FINISHED_ERROR = enum.auto()

    FINISHED_LENGTH = FINISHED_LENGTH_CAPPED

    @property
    def is_finished(self) -> bool:
        return self > RequestStatus.PREEMPTED


LAST_UNFINISHED = RequestStatus.PREEMPTED
"""Looked up once: members of an enumeration are slow to reach, and this is asked for every token."""

_NO_LIMIT = 2**62

FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH_CAPPED: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
    RequestStatus.FINISHED_ERROR: "error",
}
"""What the API calls each way to end."""


class WaitingReason(enum.StrEnum):
    """Why a request waits; stored when it changes, never rescanned."""

    NOT_TRIED = "not tried yet"
    BEHIND_HEAD = "behind the head of the queue"
    TOKEN_BUDGET = "token budget of the step spent (max_num_batched_tokens)"
    MAX_NUM_SEQS = "batch full (max_num_seqs)"
    KV_CACHE_FULL = "no free KV cache blocks"
    PREEMPTION = "running requests were preempted this step"
    PREEMPTED = "preempted, to be recomputed"
    RULE = "held back by an admission rule"
    GRAMMAR = "grammar still compiling"
    REMOTE_KVS = "waiting for remote KV"


@dataclass(frozen=True)
class LoRARequest:
    """The adapter a request uses. Name and load epoch are part of its block hashes."""

    lora_name: str
    lora_path: str
    load_epoch: int = 0


@dataclass(frozen=True)
class Tenant:
    """Whose request it is: what the policy `fair` shares between, and nothing else looks at.

    name: of the API key, or '' where there are none. user: what the request itself says, told apart inside a key only.
    """

    name: str = ""
    user: str = ""


@dataclass(frozen=True)
class MultiModalFeature:
    """One image (or other input) of a prompt: content hash and the prompt positions it fills.

    is_embed: which of these positions take an embedding (the others are markers); None means all.
    """

    content_hash: str
    offset: int
    length: int
    is_embed: tuple[bool, ...] | None = None
    data: Any = None


class Request:
    """One sequence inside the core.

    num_tokens: prompt plus output tokens known so far.
    num_computed_tokens: tokens whose KV the plans made so far cover; advances in `schedule()`.
    num_output_placeholders: tokens scheduled whose value has not come back yet (asynchronous mode).
    epoch: which life this is, unique in its scheduler and new after each preemption, so that results of an
        earlier life (or of an aborted request with the same id) are dropped.
    unborn_ids: ids of the requests that will part from this one when its first token is sampled (`n` of the sampling
        parameters is 1 + their number). sample_index: 0, or which of those this one is.
    bad_words_token_ids: the sequences of ids that `bad_words` stands for.
    new_to_worker: the worker has no row for it, so that the next plan says everything about it.
    tenant: who shares the engine with others under the policy `fair`.
    arrival_index: how many requests its scheduler was given before it and with it; children have their parent's.
    queued_time, scheduled_time: seconds on the core's clock when it was queued and first admitted; None before.
    times_told: whether its news has told these two.
    length_limit: at how many tokens it ends, by `max_tokens` or the context.
    quiet_until: up to so many computed tokens it only fills the last block it has; the block manager's note.
    """

    __slots__ = (
        "request_id", "prompt_token_ids", "sampling_params", "pooling_params", "eos_token_id", "arrival_time",
        "priority", "max_model_len", "max_tokens", "cache_salt", "lora_request", "mm_features", "kv_transfer_params",
        "status", "all_token_ids", "output_token_ids", "num_prompt_tokens", "num_tokens", "num_computed_tokens",
        "num_cached_tokens", "num_output_placeholders", "spec_token_ids", "num_preemptions", "epoch", "stop_reason",
        "error", "waiting_reason", "waiting_detail", "block_hashes", "stop_ids", "new_to_worker",
        "unborn_ids", "sample_index", "bad_words_token_ids", "tenant", "arrival_index",
        "queued_time", "scheduled_time", "times_told", "length_limit", "quiet_until", "_tokens_may_stop",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        *,
        eos_token_id: int | None = None,
        arrival_time: float = 0.0,
        priority: int = 0,
        max_model_len: int | None = None,
        cache_salt: str | None = None,
        lora_request: LoRARequest | None = None,
        mm_features: Sequence[MultiModalFeature] = (),
        pooling_params: Any = None,
        kv_transfer_params: dict[str, Any] | None = None,
        child_ids: Sequence[str] = (),
        sample_index: int = 0,
        bad_words_token_ids: Sequence[Sequence[int]] = (),
        tenant: Tenant = Tenant(),
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.sampling_params = sampling_params
        self.pooling_params = pooling_params
        self.eos_token_id = eos_token_id
        self.arrival_time = arrival_time
        self.priority = priority
        self.max_model_len = max_model_len
        self.max_tokens = sampling_params.max_tokens
        self.cache_salt = cache_salt
        self.lora_request = lora_request
        self.mm_features = mm_features
        self.kv_transfer_params = kv_transfer_params

        self.unborn_ids = tuple(child_ids)
        self.sample_index = sample_index
        self.bad_words_token_ids = bad_words_token_ids
        self.tenant = tenant
        self.stop_ids = frozenset(sampling_params.stop_token_ids)
        self._tokens_may_stop = bool(self.stop_ids) or (eos_token_id is not None and not sampling_params.ignore_eos)
        self._begin()

    def _begin(self) -> None:
        """What the scheduler writes, before it has."""
        self.status = RequestStatus.WAITING
        self.all_token_ids = list(self.prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.num_prompt_tokens = len(self.all_token_ids)
        self.num_tokens = self.num_prompt_tokens
        self.num_computed_tokens = 0
        self.num_cached_tokens = -1  # not known before the first admission
        self.num_output_placeholders = 0
        self.spec_token_ids: list[int] = []
        self.num_preemptions = 0
        self.epoch = 0
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.waiting_reason = WaitingReason.NOT_TRIED
        self.waiting_detail = ""
        self.block_hashes: list[bytes] = []
        self.new_to_worker = True
        self.arrival_index = 0
        self.queued_time: float | None = None
        self.scheduled_time: float | None = None
        self.times_told = False
        self.length_limit = self._length_limit()
        self.quiet_until = 0

    def _length_limit(self) -> int:
        by_context = _NO_LIMIT if self.max_model_len is None else self.max_model_len
        return by_context if self.max_tokens is None else min(by_context, self.num_prompt_tokens + self.max_tokens)

    def bear_children(self) -> list["Request"]:
        """The requests that part from this one now; each is to get its own first token. Asked once."""
        if not self.unborn_ids:
            return []
        params = replace(self.sampling_params, n=1, prompt_logprobs=None)
        children = [self._child(child_id, index, params) for index, child_id in enumerate(self.unborn_ids, start=1)]
        self.unborn_ids = ()
        return children

    def _child(self, child_id: str, sample_index: int, params: SamplingParams) -> "Request":
        child = Request(
            child_id,
            self.prompt_token_ids,
            params,
            eos_token_id=self.eos_token_id,
            arrival_time=self.arrival_time,
            priority=self.priority,
            max_model_len=self.max_model_len,
            cache_salt=self.cache_salt,
            lora_request=self.lora_request,
            mm_features=self.mm_features,
            sample_index=sample_index,
            bad_words_token_ids=self.bad_words_token_ids,
            tenant=self.tenant,
        )
        child.arrival_index = self.arrival_index
        child.queued_time, child.scheduled_time = self.queued_time, self.scheduled_time
        child.num_cached_tokens = self.num_cached_tokens  # its prompt was computed with the parent's
        return child

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def all_stop_token_ids(self) -> list[int]:
        """The ids that would end it now: end of sequence unless ignored, and the stop ids."""
        eos = () if self.eos_token_id is None or self.sampling_params.ignore_eos else (self.eos_token_id,)
        return sorted(self.stop_ids.union(eos))

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether cached blocks may stand in for computing. Not while prompt logprobs are wanted: they come of the
        hidden states, which no cache holds."""
        return self.sampling_params.prompt_logprobs is None or bool(self.output_token_ids)

    @property
    def num_tokens_with_spec(self) -> int:
        return self.num_tokens + len(self.spec_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.status > LAST_UNFINISHED

    @property
    def finish_reason(self) -> str | None:
        """'stop', 'length', 'abort' or 'error'; None while unfinished."""
        return FINISH_REASONS.get(self.status)

    def ends_with_placeholders(self) -> bool:
        """Whether the tokens that are being sampled bring it to a limit of length, whatever they are."""
        return self.num_tokens + self.num_output_placeholders >= self.length_limit

    def append_output_token(self, token_id: int) -> None:
        self.output_token_ids.append(token_id)
        self.all_token_ids.append(token_id)
        self.num_tokens += 1

    def append_and_check(self, token_id: int) -> bool:
        """Whether this token is the last: end of sequence first, then stop ids, then length (so a tie is 'stop').

        Neither end of sequence nor stop ids count among the first `min_tokens`.
        """
        self.append_output_token(token_id)
        if self._tokens_may_stop and self._stops_at(token_id):
            self.status = RequestStatus.FINISHED_STOPPED
        elif self.num_tokens >= self.length_limit:
            self.status = RequestStatus.FINISHED_LENGTH_CAPPED
        else:
            return False
        return True

    def _stops_at(self, token_id: int) -> bool:
        params = self.sampling_params
        if len(self.output_token_ids) <= params.min_tokens:
            return False
        if token_id == self.eos_token_id and not params.ignore_eos:
            return True
        if token_id in self.stop_ids:
            self.stop_reason = token_id
            return True
        return False

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.name}, computed={self.num_computed_tokens}, "
            f"tokens={self.num_tokens})"
        )
