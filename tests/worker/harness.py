"""Plans written by hand for a real runner: what a scheduler would do, with every choice in the test's hands."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mini_vllm.config import (
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    LoadConfig,
    ModelConfig,
    QuantizationOptions,
    SchedulerConfig,
)
from mini_vllm.core.interfaces import KVCacheConfig
from mini_vllm.core.scheduler_output import BlockCopy, ModelRunnerOutput, NewRequestData, SchedulerOutput
from mini_vllm.hf_config import HFConfig
from mini_vllm.sampling.metadata import SamplingMetadata
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.worker.model_runner import ModelRunner

GREEDY = SamplingParams(temperature=0.0)
NUM_BLOCKS = 64


def engine_config(
    folder: Path,
    *,
    block_size: int = 4,
    max_num_seqs: int = 8,
    tokenizer_vocab_size: int | None = None,
    device: str = "cpu",
    enforce_eager: bool = False,
    dtype: str = "float32",
    quantization: QuantizationOptions | None = None,
    **cache: Any,
) -> EngineConfig:
    """One CPU thread."""
    return EngineConfig(
        ModelConfig(
            str(folder),
            HFConfig.from_folder(folder),
            dtype,
            None,
            tokenizer_vocab_size=tokenizer_vocab_size,
            quantization=quantization,
        ),
        cache=CacheConfig(block_size=block_size, **cache),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=128),
        load=LoadConfig(use_tqdm=False),
        device=DeviceConfig(device=device, num_threads=1, enforce_eager=enforce_eager),
    )


def make_runner(folder: Path, *, max_model_len: int = 64, **kwargs: Any) -> ModelRunner:
    """A runner with a loaded model and `NUM_BLOCKS` blocks."""
    runner = ModelRunner(engine_config(folder, **kwargs))
    runner.load_model()
    runner.initialize_kv_cache(KVCacheConfig(NUM_BLOCKS, runner.get_kv_cache_groups()), max_model_len)
    return runner


class RecordingSampler:
    """Remembers the logits of the last step."""

    def __init__(self, runner: ModelRunner) -> None:
        self.inner = runner.sampler
        self.logits: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        self.logits = logits.clone()
        return self.inner(logits, metadata)


class Hand:
    """Holds the counters a scheduler would hold, and writes plans.

    block_order: the physical blocks in the order in which they are given out.
    """

    def __init__(self, runner: ModelRunner, block_order: Iterable[int] = range(1, NUM_BLOCKS)) -> None:
        self.runner = runner
        self.recorder = RecordingSampler(runner)
        runner.sampler = self.recorder  # type: ignore[assignment]
        self.free_blocks: Iterator[int] = iter(block_order)
        self.block_size = runner.config.cache.block_size
        self.blocks: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.prompt: dict[str, int] = {}
        self.params: dict[str, SamplingParams] = {}
        self.logits: dict[str, list[torch.Tensor]] = {}
        """Of every step in which the request sampled, `[vocab]` each."""

    def step(
        self,
        counts: Mapping[str, int],
        new: Sequence[str] = (),
        *,
        finished: Sequence[str] = (),
        preempted: Sequence[str] = (),
        copies: Sequence[BlockCopy] = (),
    ) -> ModelRunnerOutput:
        """Plan `counts` tokens, run both halves, and take over what was sampled."""
        plan = self.plan(counts, new, finished=finished, preempted=preempted, copies=copies)
        return self.run(plan)

    def add(self, req_id: str, tokens: Sequence[int], params: SamplingParams = GREEDY) -> str:
        self.tokens[req_id], self.prompt[req_id], self.params[req_id] = list(tokens), len(tokens), params
        self.computed[req_id], self.blocks[req_id] = 0, []
        return req_id

    def plan(
        self,
        counts: Mapping[str, int],
        new: Sequence[str] = (),
        *,
        finished: Sequence[str] = (),
        preempted: Sequence[str] = (),
        copies: Sequence[BlockCopy] = (),
    ) -> SchedulerOutput:
        plan = SchedulerOutput(finished_req_ids=list(finished), preempted_req_ids=list(preempted))
        plan.block_copies = list(copies)
        for req_id in preempted:
            self.computed[req_id], self.blocks[req_id] = 0, []
        for req_id, count in counts.items():
            plan.num_scheduled_tokens[req_id] = count
            added = self._grow(req_id, self.computed[req_id] + count)
            if req_id in new:
                plan.new_reqs.append(self._new_data(req_id))
            else:
                plan.cached_reqs.req_ids.append(req_id)
                plan.cached_reqs.num_computed_tokens.append(self.computed[req_id])
                if added:
                    plan.cached_reqs.new_block_ids[req_id] = (added,)
        plan.total_num_scheduled_tokens = sum(counts.values())
        return plan

    def run(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        for req_id, count in plan.num_scheduled_tokens.items():
            self.computed[req_id] += count
        output = self.runner.execute_model(plan)
        if output is not None:
            return output
        output = self.runner.sample_tokens()
        sampled = [r for r, t in zip(output.req_ids, output.sampled_token_ids, strict=True) if t or r in output.errors]
        assert self.recorder.logits is not None
        for req_id, row in zip(sampled, self.recorder.logits, strict=True):
            self.logits.setdefault(req_id, []).append(row)
        for req_id, token_ids in zip(output.req_ids, output.sampled_token_ids, strict=True):
            self.tokens[req_id] += token_ids
        return output

    def generate(self, req_ids: Sequence[str], steps: int) -> list[list[int]]:
        """Prefill each in one go, then decode together; the output tokens."""
        self.step({req_id: len(self.tokens[req_id]) for req_id in req_ids}, req_ids)
        for _ in range(steps - 1):
            self.step(dict.fromkeys(req_ids, 1))
        return [self.output(req_id) for req_id in req_ids]

    def output(self, req_id: str) -> list[int]:
        return self.tokens[req_id][self.prompt[req_id] :]

    def _grow(self, req_id: str, num_tokens: int) -> list[int]:
        needed = -(-num_tokens // self.block_size) - len(self.blocks[req_id])
        added = list(itertools.islice(self.free_blocks, max(0, needed)))
        self.blocks[req_id] += added
        return added

    def _new_data(self, req_id: str) -> NewRequestData:
        return NewRequestData(
            req_id=req_id,
            token_ids=list(self.tokens[req_id]),
            num_prompt_tokens=self.prompt[req_id],
            sampling_params=self.params[req_id],
            block_ids=(list(self.blocks[req_id]),),
            num_computed_tokens=self.computed[req_id],
        )
