"""The teaching double: a byte tokenizer, two toy models in numpy and an engine one can hold in the head.

`ToyEngine` is a thin shell. Scheduling, paging, prefix caching and preemption are those of the real engine:
the same `EngineCore`, `Scheduler` and `KVCacheManager` run here, and only the executor differs. Instead of a
device it holds each request's tokens and calls one method, `model.forward(last_tokens, positions)`.

A toy model never reads a KV cache, so equal outputs here say nothing about what the cache holds. Tests that
must see the cache use a real (small) transformer.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mini_vllm.config import DEFAULT_BLOCK_SIZE, PreemptionPolicy, SchedulerConfig, SchedulingPolicy
from mini_vllm.core.interfaces import KVCacheConfig, KVCacheGroup, KVCacheSpec
from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from mini_vllm.engine.core import EngineCore
from mini_vllm.exceptions import ConfigError, InvalidParameterError, RequestError
from mini_vllm.request import Request, Tenant
from mini_vllm.sampling.toy_sampler import Sampler
from mini_vllm.sampling_params import SamplingParams

Logits = npt.NDArray[np.float64]

NUM_BYTES = 256
EOS_TOKEN_ID = NUM_BYTES
VOCAB_SIZE = NUM_BYTES + 1

_BEYOND_THE_TOY = (
    "n", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "bad_words", "logit_bias",
    "allowed_token_ids", "min_tokens", "logprobs", "prompt_logprobs", "logprob_token_ids", "logits_processors",
)  # fmt: skip
"""Sampling parameters that the teaching sampler does not have."""

_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", dtype=np.uint8)
_request_numbers = itertools.count()


class ByteTokenizer:
    """One UTF-8 byte is one token; id 256 ends a sequence. No token is added in front."""

    vocab_size = VOCAB_SIZE
    eos_token_id = EOS_TOKEN_ID

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return list(text.encode("utf-8"))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`: end-of-sequence ids are dropped, bytes that are not UTF-8 become U+FFFD."""
        return bytes(t for t in token_ids if t != EOS_TOKEN_ID).decode("utf-8", errors="replace")


class ToyModelProtocol(Protocol):
    """All that the engine asks of a model. It reads no other attribute."""

    def forward(self, last_tokens: Sequence[int], positions: Sequence[int]) -> Logits:
        """Logits `[n, vocab]`: row i belongs to the request whose newest token is `last_tokens[i]`."""


class ToyModel:
    """Every logit is a hash of (seed, last token, position, token), so no batch can change a row.

    Lower-case letters and the space get a head start, which makes greedy text readable; the end of the
    sequence gets a little less, so that a greedy request ends by itself about once in a hundred tokens.
    """

    LETTER_BONUS = 2.0
    EOS_BONUS = 1.8

    def __init__(self, seed: int = 0) -> None:
        self._seed = np.array([seed % 2**64], dtype=np.uint64)
        self._bonus = _readable(letters=self.LETTER_BONUS, eos=self.EOS_BONUS)

    def forward(self, last_tokens: Sequence[int], positions: Sequence[int]) -> Logits:
        """Logits `[n, 257]` float64 in [0, 6) from `n` newest tokens and their positions (0-based)."""
        rows = _mix(_mix(_mix(self._seed) + _uint64(last_tokens)) + _uint64(positions))
        bits = _mix(rows[:, None] + np.arange(VOCAB_SIZE, dtype=np.uint64)[None, :])
        uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return 4.0 * uniform + self._bonus


class ToyMoE:
    """A mixture of experts in miniature: each row goes through 2 of 4 small experts.

    All weights are small multiples of 1/8 and the gates of 1/256, so every sum below is exact in float64 and
    its order cannot matter: a row is the same number alone or in any batch.
    """

    NUM_EXPERTS = 4
    TOP_K = 2
    HIDDEN = 16
    EXPERT_HIDDEN = 32
    NUM_POSITIONS = 64
    LETTER_BONUS = 6.0
    EOS_BONUS = 5.0

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng([seed % 2**64, self.NUM_EXPERTS])
        self.token_embedding = _eighths(rng, VOCAB_SIZE, self.HIDDEN)
        self.position_embedding = _eighths(rng, self.NUM_POSITIONS, self.HIDDEN)
        self.router = _eighths(rng, self.HIDDEN, self.NUM_EXPERTS)
        self.w_in = _eighths(rng, self.NUM_EXPERTS, self.HIDDEN, self.EXPERT_HIDDEN)
        self.w_out = _eighths(rng, self.NUM_EXPERTS, self.EXPERT_HIDDEN, self.HIDDEN)
        self.head = _eighths(rng, self.HIDDEN, VOCAB_SIZE)
        self._bonus = _readable(letters=self.LETTER_BONUS, eos=self.EOS_BONUS)

    def forward(self, last_tokens: Sequence[int], positions: Sequence[int]) -> Logits:
        """Logits `[n, 257]` float64; positions repeat every 64, as the position table does."""
        position_ids = np.asarray(positions, dtype=np.int64) % self.NUM_POSITIONS
        hidden = self.token_embedding[np.asarray(last_tokens, dtype=np.int64)] + self.position_embedding[position_ids]
        hidden = hidden + self._experts(hidden) / 4.0
        return hidden @ self.head + self._bonus

    def route(self, hidden: Logits) -> tuple[npt.NDArray[np.int64], Logits]:
        """(experts `[n, 2]`, gates `[n, 2]`) of hidden rows `[n, 16]`: the softmax over the two best scores."""
        scores = hidden @ self.router
        experts = np.argsort(-scores, axis=1, kind="stable")[:, : self.TOP_K]
        best = np.take_along_axis(scores, experts, axis=1)
        weights = np.exp(best - best[:, :1])
        return experts, np.round(weights / weights.sum(axis=1, keepdims=True) * 256) / 256

    def _experts(self, hidden: Logits) -> Logits:
        experts, gates = self.route(hidden)
        out = np.zeros_like(hidden)
        for expert in range(self.NUM_EXPERTS):
            rows, slots = np.nonzero(experts == expert)
            activated = np.maximum(hidden[rows] @ self.w_in[expert], 0.0)
            out[rows] += gates[rows, slots, None] * (activated @ self.w_out[expert])
        return out


TOY_MODELS: dict[str, Callable[[int], ToyModelProtocol]] = {"toy": ToyModel, "moe": ToyMoE}
"""Models by name; each is built from a seed. Another model is one more row here."""


@dataclass
class _Row:
    """What the executor remembers of one request."""

    token_ids: list[int]
    params: SamplingParams


class ToyExecutor:
    """Runs a plan without a device: the executor interface over `model.forward` and a sampler.

    Like a worker it holds a row a request, appends the tokens it samples itself, and drops rows that finished
    or were preempted. Only requests whose computed tokens catch up with their known tokens reach the model.
    """

    max_model_len = 2**62

    def __init__(self, model: ToyModelProtocol, sampler: Sampler, *, num_blocks: int, block_size: int) -> None:
        self.model = model
        self.sampler = sampler
        self.rows: dict[str, _Row] = {}
        self._pending: tuple[list[str], Logits] | None = None
        spec = KVCacheSpec(block_size=block_size, page_size_bytes=0, dtype="float64")
        self._kv_cache_config = KVCacheConfig(num_blocks, (KVCacheGroup(("toy",), spec),))

    def kv_cache_config(self) -> KVCacheConfig:
        """The pool it was told of; the toy stores no keys or values, so a page has 0 bytes."""
        return self._kv_cache_config

    def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput | None:
        """One `forward` for the rows that sample; None then, so that `sample_tokens` is called next."""
        self._update_rows(plan)
        req_ids = self._rows_that_sample(plan)
        if not req_ids:
            return ModelRunnerOutput()
        tokens = [self.rows[req_id].token_ids for req_id in req_ids]
        logits = self.model.forward([ids[-1] for ids in tokens], [len(ids) - 1 for ids in tokens])
        if logits.shape != (len(req_ids), VOCAB_SIZE):
            # Surplus rows would otherwise pass unseen and every request would read a neighbour's.
            raise ValueError(f"model.forward returned logits {logits.shape}, expected {(len(req_ids), VOCAB_SIZE)}")
        self._pending = (req_ids, logits)
        return None

    def sample_tokens(self, grammar_output: Any = None) -> ModelRunnerOutput:
        """One token for each row of the last `execute_model`; a row that allows no token fails its request alone."""
        if self._pending is None:
            raise RuntimeError("sample_tokens without an execute_model that returned None")
        (req_ids, logits), self._pending = self._pending, None
        result = ModelRunnerOutput()
        for req_id, row_logits in zip(req_ids, logits, strict=True):
            if not np.isfinite(row_logits.max()):  # all -inf, or a NaN or +inf somewhere
                result.errors[req_id] = "the model's highest logit is not a finite number: no token can be chosen"
                continue
            row = self.rows[req_id]
            token_id = int(self.sampler.sample(row_logits, row.params))
            row.token_ids.append(token_id)
            result.req_ids.append(req_id)
            result.sampled_token_ids.append([token_id])
        return result

    def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method on the only rank there is."""
        return [getattr(self, method)(*args, **kwargs)]

    def shutdown(self) -> None:
        self.rows.clear()

    def _update_rows(self, plan: SchedulerOutput) -> None:
        for req_id in (*plan.finished_req_ids, *plan.preempted_req_ids):
            self.rows.pop(req_id, None)
        for new in plan.new_reqs:
            self.rows[new.req_id] = _Row(list(new.token_ids), new.sampling_params)
        for req_id, token_ids in plan.cached_reqs.new_token_ids.items():
            self.rows[req_id].token_ids.extend(token_ids)

    def _rows_that_sample(self, plan: SchedulerOutput) -> list[str]:
        computed = dict(zip(plan.cached_reqs.req_ids, plan.cached_reqs.num_computed_tokens, strict=True))
        computed.update({new.req_id: new.num_computed_tokens for new in plan.new_reqs})
        return [
            req_id
            for req_id, num_tokens in plan.num_scheduled_tokens.items()
            if computed[req_id] + num_tokens == len(self.rows[req_id].token_ids)
        ]


class ToyEngine:
    """Text in, text out, one `step()` at a time, over the real scheduler and block manager.

    num_blocks, block_size: the KV pool in blocks (block 0 is the null block) and tokens a block.
    enable_caching: keep prefixes.
    max_num_batched_tokens, long_prefill_token_threshold, max_num_seqs, policy, preemption_policy: those of
        `SchedulerConfig`.
    model: a name in `TOY_MODELS`, built from `seed`, or any object with `forward`.

    There is no start-up check of the pool's size: a pool too small for the work is a lesson, not a mistake.
    `scheduler`, `tokenizer`, `model` and `sampler` may be read, wrapped and (the last two) replaced between steps.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 1024,
        block_size: int = DEFAULT_BLOCK_SIZE,
        enable_caching: bool = True,
        max_num_batched_tokens: int = 2048,
        long_prefill_token_threshold: int = 0,
        max_num_seqs: int = 256,
        seed: int = 0,
        model: str | ToyModelProtocol = "toy",
        policy: SchedulingPolicy = "fcfs",
        preemption_policy: PreemptionPolicy = "latest",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = SchedulerConfig(
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            long_prefill_token_threshold=long_prefill_token_threshold,
            policy=policy,
            preemption_policy=preemption_policy,
        )
        self.tokenizer = ByteTokenizer()
        self.executor = ToyExecutor(_build_model(model, seed), Sampler(), num_blocks=num_blocks, block_size=block_size)
        kv = KVCacheManager(num_blocks, block_size, enable_caching=enable_caching)
        self.scheduler = Scheduler(config, kv, clock=clock)
        self.engine_core = EngineCore(self.scheduler, self.executor)
        self.requests: dict[str, Request] = {}
        """Every request ever added, finished ones included: this is where token ids are read."""
        self._clock = clock

    @property
    def model(self) -> ToyModelProtocol:
        return self.executor.model

    @model.setter
    def model(self, model: ToyModelProtocol) -> None:
        self.executor.model = model

    @property
    def sampler(self) -> Sampler:
        return self.executor.sampler

    @sampler.setter
    def sampler(self, sampler: Sampler) -> None:
        self.executor.sampler = sampler

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        tenant: Tenant = Tenant(),  # noqa: B008 (frozen)
    ) -> str:
        """Queue a prompt (text or token ids) and return its id, `req-<n>`. Nothing is computed yet.

        params: None is greedy with `SamplingParams`' other defaults. Raises `InvalidParameterError` for an
        empty prompt, ids outside the vocabulary or parameters that only the real engine has, `PromptTooLongError`
        for a prompt that can never fit the pool.
        """
        params = params if params is not None else SamplingParams(temperature=0.0)
        _require_toy_params(params)
        request = Request(
            f"req-{next(_request_numbers)}",
            self._token_ids(prompt),
            params,
            eos_token_id=EOS_TOKEN_ID,
            arrival_time=self._clock(),
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
        )
        self.engine_core.add_request(request)
        self.requests[request.request_id] = request
        return request.request_id

    def abort_request(self, request_id: str) -> None:
        """End a request now and free its blocks; unknown or finished ids are left alone."""
        self.engine_core.abort_requests([request_id])

    def has_unfinished_requests(self) -> bool:
        return self.engine_core.has_unfinished_requests()

    def step(self) -> list[Request]:
        """Advance every request as far as this step's plan lets it; the requests that finished in it."""
        outputs = self.engine_core.step().outputs
        return [self.requests[output.request_id] for output in outputs if output.finished]

    def generate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[str]:
        """Complete `prompts` (with one `params`, or one each) and return their texts in order.

        Raises `RequestError` if a request ended in an error; the others' results stay in `requests`.
        """
        request_ids = self._add_all([prompts] if isinstance(prompts, str) else list(prompts), params)
        requests = [self.requests[request_id] for request_id in request_ids]
        while not all(request.is_finished for request in requests):
            self.step()
        for request in requests:
            if request.finish_reason == "error":
                raise RequestError(f"{request.request_id}: {request.error}")
        return [self.tokenizer.decode(request.output_token_ids) for request in requests]

    def _add_all(self, prompts: list[str], params: SamplingParams | Sequence[SamplingParams] | None) -> list[str]:
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise InvalidParameterError("params", f"{len(each)} given for {len(prompts)} prompts")
        request_ids: list[str] = []
        try:
            for prompt, prompt_params in zip(prompts, each, strict=True):
                request_ids.append(self.add_request(prompt, prompt_params))
        except Exception:
            self.engine_core.abort_requests(request_ids)  # all or none: the caller gets no ids to finish them with
            raise
        return request_ids

    def _token_ids(self, prompt: str | Sequence[int]) -> list[int]:
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not token_ids:
            raise InvalidParameterError("prompt", "must hold at least one token")
        for token_id in token_ids:
            if not 0 <= token_id < VOCAB_SIZE:
                raise InvalidParameterError("prompt", f"token ids are 0 to {VOCAB_SIZE - 1}, got {token_id}")
        return token_ids


def _require_toy_params(params: SamplingParams) -> None:
    plain = SamplingParams()
    for name in _BEYOND_THE_TOY:
        if getattr(params, name) != getattr(plain, name):
            raise InvalidParameterError(name, "the toy engine does not have this; the real one (LLM) does")


def _build_model(model: str | ToyModelProtocol, seed: int) -> ToyModelProtocol:
    if not isinstance(model, str):
        return model
    if model not in TOY_MODELS:
        raise ConfigError(f"model: must be one of {sorted(TOY_MODELS)} or an object with forward(), got {model!r}")
    return TOY_MODELS[model](seed)


def _eighths(rng: np.random.Generator, *shape: int) -> Logits:
    """Random multiples of 1/8 in [-1, 1]."""
    return np.asarray(rng.integers(-8, 9, size=shape), dtype=np.float64) / 8.0


def _readable(*, letters: float, eos: float) -> Logits:
    """What is added to every row `[vocab]`: a head start for lower-case letters and for the end of the sequence."""
    bonus = np.zeros(VOCAB_SIZE)
    bonus[_LETTERS] = letters
    bonus[EOS_TOKEN_ID] = eos
    return bonus


def _uint64(values: Sequence[int]) -> npt.NDArray[np.uint64]:
    return np.asarray(values, dtype=np.int64).astype(np.uint64)


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014): one step of the generator on every element, modulo 2**64."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
