"""Fakes that drive the control plane without a device.

`PagedMemory` is the strict half: physical slots that hold a digest of the whole token prefix, so that a plan
which reads an unwritten, stale or foreign slot is caught, whatever the tokens turn out to be.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mini_vllm.config import SchedulerConfig
from mini_vllm.core.interfaces import KVCacheConfig, KVCacheGroup, KVCacheSpec
from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from mini_vllm.engine.core import EngineCore
from mini_vllm.request import LoRARequest, Request, Tenant
from mini_vllm.sampling_params import SamplingParams

EOS = 256


def make_request(
    request_id: str,
    prompt: int | Sequence[int],
    *,
    max_tokens: int | None = 4,
    priority: int = 0,
    arrival_time: float = 0.0,
    cache_salt: str | None = None,
    lora: LoRARequest | None = None,
    max_model_len: int | None = None,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = True,
    n: int = 1,
    tenant: str = "",
    user: str = "",
    **params: Any,
) -> Request:
    """A request whose prompt is given, or `prompt` tokens that no other request id shares."""
    if isinstance(prompt, int):
        prompt = [_letter(request_id, i) for i in range(prompt)]
    sampling_params = SamplingParams(
        n=n,
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=tuple(stop_token_ids),
        **params,
    )
    return Request(
        request_id,
        prompt,
        sampling_params,
        eos_token_id=EOS,
        arrival_time=arrival_time,
        priority=priority,
        cache_salt=cache_salt,
        lora_request=lora,
        max_model_len=max_model_len,
        child_ids=[f"{index}_{request_id}" for index in range(1, n)],
        tenant=Tenant(tenant, user),
    )


def _letter(request_id: str, position: int) -> int:
    return hashlib.sha256(f"{request_id}/{position}".encode()).digest()[0]


def make_scheduler(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    enable_caching: bool = True,
    rules: Sequence[Any] = (),
    clock: Callable[[], float] = lambda: 0.0,
    **config: Any,
) -> Scheduler:
    scheduler_config = SchedulerConfig(**config)
    sharing = scheduler_config.same_step_prefix_sharing
    kv = KVCacheManager(num_blocks, block_size, enable_caching=enable_caching, same_step_sharing=sharing)
    return Scheduler(scheduler_config, kv, clock=clock, rules=rules)


def fake_result(
    scheduler: Scheduler, plan: SchedulerOutput, token: Callable[[Request], int] | None = None
) -> ModelRunnerOutput:
    """What a runner would say to `plan`: one token for each request whose counters met."""
    token = token or default_token
    result = ModelRunnerOutput()
    for req_id in plan.num_scheduled_tokens:
        request = scheduler.requests[req_id]
        if Scheduler.needs_sample(request):
            result.req_ids.append(req_id)
            result.sampled_token_ids.append([token(request)])
    for parent_id, children in plan.forks.items():
        for index, child_id in enumerate(children, start=1):
            result.req_ids.append(child_id)
            result.sampled_token_ids.append([(token(scheduler.requests[parent_id]) + index) % 256])
    return result


def default_token(request: Request) -> int:
    """A pure function of the request's tokens, so that preemption and chunking cannot change it."""
    return digest(bytes(t % 256 for t in request.all_token_ids), b"next")[0]


def run_step(scheduler: Scheduler, token: Callable[[Request], int] | None = None) -> SchedulerOutput:
    """Schedule, answer, update, check: one whole step without an executor."""
    plan = scheduler.schedule()
    scheduler.check_integrity()
    scheduler.update_from_output(plan, fake_result(scheduler, plan, token))
    scheduler.check_integrity()
    return plan


def run_all(scheduler: Scheduler, *, max_steps: int = 2000) -> list[SchedulerOutput]:
    plans: list[SchedulerOutput] = []
    while scheduler.has_unfinished_requests():
        assert len(plans) < max_steps, "the scheduler makes no progress"
        plans.append(run_step(scheduler))
    return plans


def digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"|".join(parts), digest_size=8).digest()


def prefix_digests(token_ids: Iterable[int]) -> list[bytes]:
    """Entry i stands for tokens 0 to i: what a correct cache holds for position i."""
    state, out = b"", []
    for token_id in token_ids:
        state = digest(state, str(token_id).encode())
        out.append(state)
    return out


class PagedMemory:
    """Physical slots, written and read as a plan says. Raises `AssertionError` on any wrong read or write."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[bytes | None] = [None] * (num_blocks * block_size)
        self.tables: dict[str, list[int]] = {}
        self.token_ids: dict[str, list[int]] = {}
        self._digests: dict[str, list[bytes]] = {}

    def run(self, plan: SchedulerOutput) -> None:
        """Every write of the step, then every read: the order of one attention layer."""
        computed = self._update_rows(plan)
        for copy in plan.block_copies:
            self._copy_block(copy.source, copy.destination)
        self._write(plan, computed)
        for req_id, num_tokens in plan.num_scheduled_tokens.items():
            self.check(req_id, computed[req_id] + num_tokens)

    def check(self, req_id: str, length: int) -> None:
        """The first `length` positions of a request read back as what its tokens say."""
        for position, expected in enumerate(self._expected(req_id, length)):
            slot = self._slot(req_id, position)
            assert self.slots[slot] == expected, f"{req_id}: position {position} (slot {slot}) holds other KV"

    def append(self, result: ModelRunnerOutput) -> None:
        for req_id, token_ids in zip(result.req_ids, result.sampled_token_ids, strict=True):
            if req_id in self.token_ids:  # a child that was drawn just now has no row yet
                self.token_ids[req_id].extend(token_ids)

    def _update_rows(self, plan: SchedulerOutput) -> dict[str, int]:
        for req_id in (*plan.finished_req_ids, *plan.preempted_req_ids):
            self.tables.pop(req_id, None)
            self.token_ids.pop(req_id, None)
            self._digests.pop(req_id, None)
        for new in plan.new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
            self.token_ids[new.req_id] = list(new.token_ids)
            self._digests[new.req_id] = []
        for req_id, block_ids in plan.cached_reqs.new_block_ids.items():
            self.tables[req_id].extend(block_ids[0])
        computed = dict(zip(plan.cached_reqs.req_ids, plan.cached_reqs.num_computed_tokens, strict=True))
        computed.update({new.req_id: new.num_computed_tokens for new in plan.new_reqs})
        assert set(computed) == set(plan.num_scheduled_tokens)
        return computed

    def _write(self, plan: SchedulerOutput, computed: dict[str, int]) -> None:
        written: dict[int, str] = {}
        for req_id, num_tokens in plan.num_scheduled_tokens.items():
            start, stop = computed[req_id], computed[req_id] + num_tokens
            assert stop <= len(self.token_ids[req_id]), f"{req_id}: scheduled past its tokens"
            digests = self._expected(req_id, stop)
            for position in range(start, stop):
                slot = self._slot(req_id, position)
                assert slot not in written, f"{req_id} and {written[slot]} write slot {slot} in one step"
                written[slot] = req_id
                self.slots[slot] = digests[position]

    def _expected(self, req_id: str, length: int) -> list[bytes]:
        """`prefix_digests` of the first `length` tokens, each computed once in a request's life."""
        known = self._digests[req_id]
        for token_id in self.token_ids[req_id][len(known) : length]:
            known.append(digest(known[-1] if known else b"", str(token_id).encode()))
        return known[:length]

    def _slot(self, req_id: str, position: int) -> int:
        block_id = self.tables[req_id][position // self.block_size]
        assert block_id != 0, f"{req_id}: position {position} lies in the null block"
        return block_id * self.block_size + position % self.block_size

    def _copy_block(self, source: int, destination: int) -> None:
        size = self.block_size
        self.slots[destination * size : (destination + 1) * size] = self.slots[source * size : (source + 1) * size]


class PagedExecutor:
    """An executor whose next token is read out of its paged memory: a model that really reads its cache."""

    max_model_len = 2**62

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.memory = PagedMemory(num_blocks, block_size)
        self.plans: list[SchedulerOutput] = []
        self.fail_on: Callable[[SchedulerOutput], bool] = lambda plan: False
        spec = KVCacheSpec(block_size=block_size, page_size_bytes=0, dtype="none")
        self._config = KVCacheConfig(num_blocks, (KVCacheGroup(("layer",), spec),))

    def kv_cache_config(self) -> KVCacheConfig:
        return self._config

    def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        self.plans.append(plan)
        if self.fail_on(plan):
            self.memory._update_rows(plan)
            raise RuntimeError("the device is on fire")
        before = dict(zip(plan.cached_reqs.req_ids, plan.cached_reqs.num_computed_tokens, strict=True))
        before.update({new.req_id: new.num_computed_tokens for new in plan.new_reqs})
        self.memory.run(plan)
        result = ModelRunnerOutput()
        for req_id, num_tokens in plan.num_scheduled_tokens.items():
            token_ids = self.memory.token_ids[req_id]
            if before[req_id] + num_tokens == len(token_ids):
                newest = self.memory.slots[self.memory._slot(req_id, len(token_ids) - 1)]
                assert newest is not None
                result.req_ids.append(req_id)
                result.sampled_token_ids.append([newest[0]])
                for index, child_id in enumerate(plan.forks.get(req_id, ()), start=1):
                    result.req_ids.append(child_id)
                    result.sampled_token_ids.append([(newest[0] + index) % 256])
        self.memory.append(result)
        return result

    def sample_tokens(self, grammar_output: Any = None) -> ModelRunnerOutput:
        raise AssertionError("execute_model answers by itself")

    def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return [getattr(self, method)(*args, **kwargs)]

    def shutdown(self) -> None:
        pass


def make_engine(*, num_blocks: int = 64, block_size: int = 4, **kwargs: Any) -> tuple[EngineCore, PagedExecutor]:
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=block_size, **kwargs)
    executor = PagedExecutor(num_blocks, block_size)
    return EngineCore(scheduler, executor), executor


def run_engine(engine: EngineCore, *, max_steps: int = 2000) -> int:
    """Step until nothing is left; how many steps it took."""
    for step in range(max_steps):
        if not engine.has_unfinished_requests():
            return step
        engine.step()
        engine.scheduler.check_integrity()
    raise AssertionError("the engine makes no progress")


def expected_outputs(request: Request, num_tokens: int, sample_index: int = 0) -> list[int]:
    """The tokens `PagedExecutor` gives to a request whose cache is right."""
    token_ids = list(request.prompt_token_ids)
    for position in range(num_tokens):
        shift = sample_index if position == 0 else 0
        token_ids.append((prefix_digests(token_ids)[-1][0] + shift) % 256)
    return token_ids[len(request.prompt_token_ids) :]


def assert_nothing_leaked(scheduler: Scheduler) -> None:
    """No request, table or block is left behind."""
    scheduler.check_integrity()
    pool = scheduler.kv.block_pool
    assert not scheduler.requests and not scheduler.running and len(scheduler.waiting) == 0
    assert pool.get_num_free_blocks() == len(pool.blocks) - 1
    assert math.isclose(scheduler.kv.usage, 0.0)
