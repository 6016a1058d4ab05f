"""The plan of one step and what came of it: plain data, nothing else.

`SchedulerOutput` is all that a worker, a tensor-parallel rank, the simulator or a trace is told.
Full data travels once (`new_reqs`, on first admission and on resumption after a preemption), deltas after
that. Everything here survives a msgspec round trip.
"""

from dataclasses import dataclass, field
from typing import Any

from mini_vllm.sampling_params import SamplingParams

BlockIds = tuple[list[int], ...]
"""One list of physical block ids per KV cache group."""


@dataclass
class NewRequestData:
    """A request the worker does not hold (new, or resumed after a preemption)."""

    req_id: str
    token_ids: list[int]
    """Prompt and, after a preemption, the output so far."""
    num_prompt_tokens: int
    sampling_params: SamplingParams
    block_ids: BlockIds
    num_computed_tokens: int
    """Before this step; more than 0 on a prefix-cache hit."""
    lora_name: str | None = None
    mm_features: list[Any] = field(default_factory=list)
    sample_index: int = 0
    """Which of the samples of one prompt this is; its random numbers are its own."""
    all_stop_token_ids: list[int] = field(default_factory=list)
    """What must not be sampled among the first `min_tokens`: end of sequence (unless ignored) and the stop ids."""
    bad_words_token_ids: list[list[int]] = field(default_factory=list)
    """The sequences of ids that `bad_words` stands for."""


@dataclass
class CachedRequestData:
    """Deltas for requests the worker holds already, as parallel lists in plan order."""

    req_ids: list[str] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    """Before this step."""
    new_block_ids: dict[str, BlockIds] = field(default_factory=dict)
    """Blocks to append to the table; only requests that got any have an entry."""
    new_token_ids: dict[str, list[int]] = field(default_factory=dict)
    """Tokens the worker cannot know by itself (none when it sampled them)."""


@dataclass
class BlockCopy:
    """Copy one physical block of a group onto another before the step writes anything."""

    group: int
    source: int
    destination: int


@dataclass
class SchedulerOutput:
    """How far each request may advance in one step. Obeyed by everything, changed by nobody."""

    step_id: int = 0
    new_reqs: list[NewRequestData] = field(default_factory=list)
    cached_reqs: CachedRequestData = field(default_factory=CachedRequestData)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    """In batch order: running requests first, then the newly admitted."""
    total_num_scheduled_tokens: int = 0
    epochs: dict[str, int] = field(default_factory=dict)
    """`Request.epoch` when planned; a result of another epoch is dropped."""
    spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)
    encoder_inputs: dict[str, list[int]] = field(default_factory=dict)
    free_encoder_hashes: list[str] = field(default_factory=list)
    block_copies: list[BlockCopy] = field(default_factory=list)
    forks: dict[str, list[str]] = field(default_factory=dict)
    """Only in the step in which a parent samples its first token: child i of the list (`sample_index` i + 1) draws its
    own from the same logits. It has no row yet; a later plan brings it in `new_reqs`."""
    finished_req_ids: list[str] = field(default_factory=list)
    """Ended since the previous plan: the worker drops their rows."""
    preempted_req_ids: list[str] = field(default_factory=list)
    kv_connector_meta: Any = None


@dataclass
class TokenLogprobs:
    """Raw log-probabilities (of the logits as the model gave them) at one position.

    token_ids, logprobs: the position's own token, then the likeliest ones in order (which may name it again), then
    those asked for by id.
    rank: how many tokens are at least as likely as the position's own, itself included; 1 is the likeliest.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


@dataclass
class PromptLogprobs:
    """Those of the prompt's tokens from position `start` (1 or more) on, as far as this step computed them.

    After a preemption in the middle of the prompt, positions come again from 1 on.
    """

    start: int
    positions: list[TokenLogprobs]


@dataclass
class KVConnectorOutput:
    """What a KV connector's worker half has to report."""

    finished_sending: list[str] = field(default_factory=list)
    finished_recving: list[str] = field(default_factory=list)
    invalid_block_ids: list[int] = field(default_factory=list)


@dataclass
class ModelRunnerOutput:
    """What one step produced, keyed by position in `req_ids`.

    Children of `SchedulerOutput.forks` follow the requests of the plan, with a token each.
    """

    req_ids: list[str] = field(default_factory=list)
    sampled_token_ids: list[list[int]] = field(default_factory=list)
    """Ragged: none for a request in mid-prefill, 1 for a decode, up to k+1 under speculation."""
    draft_token_ids: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    """One for each sampled token, for the requests that asked."""
    prompt_logprobs: dict[str, PromptLogprobs] = field(default_factory=dict)
    pooler_output: dict[str, Any] = field(default_factory=dict)
    kv_connector_output: KVConnectorOutput | None = None
    errors: dict[str, str] = field(default_factory=dict)
    """A row that could not be computed (say, no token allowed) fails its request alone, and its forks with it."""
    expert_load: list[list[int]] | None = None


@dataclass
class EngineCoreOutput:
    """News of one request for the shell that owns its text.

    Without slots, so that what is not said needs no room: it is the default, which the class has. See `news_of`.
    """

    request_id: str
    new_token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    pooler_output: Any = None
    kv_transfer_params: dict[str, Any] | None = None
    times: tuple[float, float | None] | None = None
    """Seconds on the core's clock when the request was queued and first admitted (None if never). Comes once: with the
    first news of a sequence."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class SchedulerStats:
    """The gauges and counters of one step (vLLM's names where it has them)."""

    step_id: int = 0
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    """Of all reasons."""
    num_waiting_deferred_reqs: int = 0
    """Of these, how many wait for something other than room: a grammar, remote KV, an admission rule."""
    kv_cache_usage: float = 0.0
    num_scheduled_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    """Tokens looked up since the start."""
    prefix_cache_hits: int = 0
    """Tokens found since the start."""


@dataclass
class EngineCoreOutputs:
    """Everything one `EngineCore.step()` reports."""

    outputs: list[EngineCoreOutput] = field(default_factory=list)
    stats: SchedulerStats = field(default_factory=SchedulerStats)
    timestamp: float = 0.0
    """Seconds on the core's clock when the step ended. The clock is monotonic and the same in every process of a
    machine."""
