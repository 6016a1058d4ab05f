"""One small model that really reads its cache, and engines of any shape around it.

The checkpoint is loaded once; every engine gets fresh KV tensors in which each slot holds NaN until it is written,
also when a block changes hands. Whatever reads a slot that the request did not write becomes NaN and ends in an
error, so equality of tokens below means that only valid slots were read.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mini_vllm.config import (
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    ModelConfig,
    PreemptionPolicy,
    QuantizationOptions,
    SchedulerConfig,
    SchedulingPolicy,
)
from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.engine.core import EngineCore
from mini_vllm.executor.uniproc import UniProcExecutor
from mini_vllm.hf_config import HFConfig
from mini_vllm.request import Request, Tenant
from mini_vllm.sampling_params import SamplingParams

VOCAB_SIZE = 128
MAX_MODEL_LEN = 128
MAX_STEPS = 3000


@dataclass(frozen=True)
class Job:
    """A prompt and how to decode it."""

    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass
class Outcome:
    """What a run gave, by position of the job."""

    tokens: list[list[int]]
    errors: dict[int, str] = field(default_factory=dict)
    cached_tokens: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    num_steps: int = 0


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(count))


def greedy(max_tokens: int = 10) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def sampled(seed: int, max_tokens: int = 10, **kwargs: Any) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True, **kwargs)


def mixed_jobs() -> list[Job]:
    """Lengths from 1 to 70, prefixes shared and not, one prompt of exactly n blocks, greedy and seeded."""
    rng = random.Random(7)
    shared = tokens(rng, 34)
    first = shared + tokens(rng, 5)
    return [
        Job(first, greedy()),
        Job(tokens(rng, 1), sampled(1)),
        Job(shared + tokens(rng, 19), sampled(2, top_k=20)),
        Job(tokens(rng, 16), greedy(12)),
        Job(shared[:32], greedy()),
        Job(tokens(rng, 70), sampled(3, top_p=0.9)),
        Job(first, sampled(4, 12)),
    ]


@dataclass
class Rig:
    """Builds engines around the checkpoint in `folder`. `engine` takes the shape, `run` the work."""

    folder: Path
    max_model_len: int = MAX_MODEL_LEN
    attention_backend: str | None = None
    dtype: str = "float32"
    batch_invariant: bool = False
    quantization: QuantizationOptions | None = None
    async_scheduling: bool = False
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        self._hf_config = HFConfig.from_folder(self.folder)

    def engine(
        self,
        *,
        block_size: int = 16,
        num_blocks: int = 200,
        caching: bool = True,
        budget: int = 2048,
        threshold: int = 0,
        max_num_seqs: int = 64,
        same_step_sharing: bool = True,
        shuffle: int | None = None,
        policy: SchedulingPolicy = "fcfs",
        preemption_policy: PreemptionPolicy = "latest",
        enforce_eager: bool = False,
    ) -> EngineCore:
        """An engine whose pool has `num_blocks` blocks; `shuffle` seeds a random physical order.

        enforce_eager: for tests that change the model once the engine is there.
        """
        max_model_len = min(self.max_model_len, (num_blocks - 1) * block_size)
        scheduling = SchedulerConfig(
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            long_prefill_token_threshold=threshold,
            max_model_len=max_model_len,
            same_step_prefix_sharing=same_step_sharing,
            policy=policy,
            preemption_policy=preemption_policy,
            async_scheduling=self.async_scheduling,
        )
        model = ModelConfig(
            str(self.folder), self._hf_config, self.dtype, max_model_len,
            quantization=self.quantization, batch_invariant=self.batch_invariant,
        )  # fmt: skip
        config = EngineConfig(
            model=model,
            cache=CacheConfig(
                block_size=block_size,
                enable_prefix_caching=caching,
                num_gpu_blocks_override=num_blocks,
                kv_cache_dtype=self.kv_cache_dtype,
            ),
            scheduler=scheduling,
            device=DeviceConfig(
                device="cpu",
                num_threads=1,
                attention_backend=self.attention_backend,
                enforce_eager=enforce_eager,
            ),
        )
        executor = UniProcExecutor(config)
        kv = KVCacheManager(num_blocks, block_size, enable_caching=caching, same_step_sharing=same_step_sharing)
        poison_unwritten_slots(kv, kv_tensors(executor), num_blocks)
        if shuffle is not None:
            shuffle_free_blocks(kv, random.Random(shuffle))
        return EngineCore(Scheduler(scheduling, kv), executor)


def kv_tensors(executor: UniProcExecutor) -> list[torch.Tensor]:
    assert executor.runner is not None
    return list(executor.runner.kv_caches.values())


def poison_unwritten_slots(kv: KVCacheManager, tensors: Sequence[torch.Tensor], num_blocks: int) -> None:
    """NaN in every slot now, and again in each block when it is handed out; of int8 slots the scale becomes NaN."""
    poison = -1 if tensors[0].dtype is torch.int8 else float("nan")
    for tensor in tensors:
        tensor.fill_(poison)
    hand_out = kv.block_pool.get_new_blocks

    def poisoned(n: int) -> list[Any]:
        blocks = hand_out(n)
        ids = torch.tensor([block.block_id for block in blocks], dtype=torch.long)
        for tensor in tensors:
            tensor.index_fill_(list(tensor.shape).index(num_blocks), ids, poison)
        return blocks

    kv.block_pool.get_new_blocks = poisoned  # type: ignore[method-assign]


def shuffle_free_blocks(kv: KVCacheManager, rng: random.Random) -> None:
    """Put the free queue in random order, so that tables are scattered over the pool from the first block on."""
    queue = kv.block_pool.free_queue
    blocks = queue.popleft_n(queue.num_free_blocks)
    rng.shuffle(blocks)
    queue.append_n(blocks)


def run(
    engine: EngineCore,
    jobs: Sequence[Job],
    *,
    order: Sequence[int] | None = None,
    arrive_every: int = 0,
    each_step: Callable[[EngineCore], None] | None = None,
) -> Outcome:
    """Complete `jobs`, added in `order`, all at once or one every `arrive_every` steps."""
    outcome = Outcome([[] for _ in jobs], cached_tokens=[0] * len(jobs))
    before = engine.scheduler.num_preemptions
    arriving = list(order if order is not None else range(len(jobs)))
    while arriving or engine.has_unfinished_requests():
        assert outcome.num_steps < MAX_STEPS, "the engine makes no progress"
        if arriving and (not arrive_every or outcome.num_steps % arrive_every == 0):
            for index in arriving[: 1 if arrive_every else None]:
                job = jobs[index]
                engine.add_request(
                    Request(
                        str(index),
                        job.prompt,
                        job.params,
                        max_model_len=engine.executor.max_model_len,
                        priority=index % 3,
                        tenant=Tenant(f"key{index % 2}", f"user{index % 3}"),
                    )
                )
            arriving = arriving[1:] if arrive_every else []
        collect(engine, outcome)
        if each_step is not None:
            each_step(engine)
    outcome.num_preemptions = engine.scheduler.num_preemptions - before
    engine.scheduler.check_integrity()
    assert engine.scheduler.kv.usage == 0, "blocks leaked"
    return outcome


def collect(engine: EngineCore, outcome: Outcome) -> None:
    for news in engine.step().outputs:
        index = int(news.request_id)
        outcome.tokens[index] += news.new_token_ids
        outcome.cached_tokens[index] = news.num_cached_tokens
        if news.error is not None:
            outcome.errors[index] = news.error
    outcome.num_steps += 1
