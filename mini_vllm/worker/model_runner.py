"""One device: obeys plans with a real model.

It is handed plans (`SchedulerOutput`) and returns what they produced. A step is `execute_model` (follow the plan's
changes, copy blocks, forward, logits of the rows that sample) and `sample_tokens`. The runner keeps the tokens it
samples, so a plan never sends them back. If a step raises, its rows keep what earlier steps wrote; the next plan says
what becomes of them.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mini_vllm.attention.backend import AttentionBackend, MetadataBuilder
from mini_vllm.attention.context import ForwardContext, set_forward_context
from mini_vllm.config import EngineConfig
from mini_vllm.core.interfaces import KVCacheConfig, KVCacheGroup, KVCacheSpec
from mini_vllm.core.scheduler_output import BlockCopy, ModelRunnerOutput, SchedulerOutput
from mini_vllm.exceptions import ConfigError
from mini_vllm.layers.attention import Attention, get_attention_layers
from mini_vllm.logger import init_logger
from mini_vllm.models.finishing import release_weights
from mini_vllm.models.loader import load_model
from mini_vllm.models.utils import weight_bytes
from mini_vllm.platforms import select_platform
from mini_vllm.sampling.sampler import NO_TOKEN, Sampler
from mini_vllm.worker.input_batch import InputBatch
from mini_vllm.worker.kv_cache import activation_bytes, allocate_kv_caches, gib
from mini_vllm.worker.prepare_inputs import InputPreparer, StepInputs

logger = init_logger(__name__)

NO_TOKEN_MESSAGE = "the model's logits allow no token: they are all -inf, or NaN or +inf is among them"


@dataclass(slots=True)
class PendingStep:
    """A step between its two halves. logits: `[rows that sample, vocab]` float32."""

    inputs: StepInputs
    logits: torch.Tensor


class ModelRunner:
    """Model, KV cache and input batch of one device. Used in this order: `load_model`, `initialize_kv_cache`, steps."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.platform = select_platform(config.device.device)
        self.device = self.platform.device()
        self.num_threads = self.platform.set_num_threads(config.device.num_threads)
        self.sampler = Sampler()
        self.model: nn.Module
        self.layers: dict[str, Attention] = {}
        self.kv_caches: dict[str, torch.Tensor] = {}
        self.batch: InputBatch
        self._preparer: InputPreparer
        self._groups: list[tuple[KVCacheGroup, type[AttentionBackend], MetadataBuilder]] = []
        self._pending: PendingStep | None = None
        self._entropy = np.random.default_rng(config.model.seed % 2**64)
        self._drawn_seeds: dict[str, int] = {}
        """Seeds of requests that brought none, kept while they live: a preemption must not change their tokens."""

    # -- start-up --------------------------------------------------------------------------------------------

    def load_model(self) -> None:
        """Read the weights onto the device. Raises `CheckpointError` or `UnsupportedModelError`."""
        model_config, device_config = self.config.model, self.config.device
        logger.info("Device: %s; computing with %d CPU threads", self.platform.describe(), self.num_threads)
        if warning := self.platform.dtype_warning(model_config.dtype):
            logger.warning("dtype: %s", warning)
        start = time.perf_counter()
        self.model = load_model(
            model_config, self.config.load, self.device, attention_backend=device_config.attention_backend
        )
        self.layers = get_attention_layers(self.model)
        size = gib(weight_bytes(self.model))
        seconds = time.perf_counter() - start
        logger.info("Model loading took %s and %.2f seconds (%s)", size, seconds, model_config.dtype)

    def get_kv_cache_groups(self) -> tuple[KVCacheGroup, ...]:
        """The attention layers, those of equal specs together: they share a block table."""
        by_spec: dict[KVCacheSpec, list[str]] = {}
        for name, layer in self.layers.items():
            spec = layer.get_kv_cache_spec(self.config.cache.block_size, self.config.model.dtype)
            by_spec.setdefault(spec, []).append(name)
        return tuple(KVCacheGroup(tuple(names), spec) for spec, names in by_spec.items())

    def available_kv_cache_bytes(self) -> int:
        """Memory free now, less what a step of the largest size needs beside the KV cache."""
        scheduler, model = self.config.scheduler, self.config.model
        step = activation_bytes(
            model.hf_config,
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs,
            getattr(torch, model.dtype).itemsize,
        )
        return max(0, self.platform.available_memory_bytes() - step)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, max_model_len: int) -> None:
        """Allocate the KV cache and the buffers for requests of at most `max_model_len` tokens."""
        shapes = {}
        self._groups = []
        for group in kv_cache_config.groups:
            layers = [self.layers[name] for name in group.layer_names]
            block_size = group.spec.block_size
            for name, layer in zip(group.layer_names, layers, strict=True):
                shapes[name] = layer.backend.kv_cache_shape(
                    kv_cache_config.num_blocks, block_size, layer.num_kv_heads, layer.head_size
                )
            backend = layers[0].backend
            self._groups.append((group, backend, backend.builder_cls(group.spec, self.device)))
        dtype = getattr(torch, kv_cache_config.groups[0].spec.dtype)
        self.kv_caches = allocate_kv_caches(shapes, dtype, self.device)
        scheduler = self.config.scheduler
        block_sizes = [group.spec.block_size for group in kv_cache_config.groups]
        self.batch = InputBatch(scheduler.max_num_seqs, max_model_len, block_sizes, self.platform)
        self._preparer = InputPreparer(self.batch, scheduler.max_num_batched_tokens, self.platform)

    def release(self) -> None:
        """Give back weights and KV cache, however long somebody keeps this object; it cannot be used afterwards."""
        if hasattr(self, "model"):
            release_weights(self.model)
        self.kv_caches.clear()

    # -- a step ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput | None:
        """Obey a plan up to the logits. None when rows sample, so that `sample_tokens` is to follow."""
        self._pending = None
        self._follow(plan)
        if not plan.num_scheduled_tokens:
            return ModelRunnerOutput()
        inputs = self._preparer.prepare(plan)
        hidden = self._forward(inputs)
        if not inputs.num_samples:
            self.platform.synchronize()  # nobody else waits, and the next step writes the input buffers
            return ModelRunnerOutput(inputs.req_ids, [[] for _ in inputs.req_ids])
        if inputs.logits_indices is not None:
            hidden = hidden.index_select(0, inputs.logits_indices)
        self._pending = PendingStep(inputs, self._logits(hidden))
        return None

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any = None) -> ModelRunnerOutput:
        """One token for every row of the open step that samples; a row without an allowed token is an error."""
        if self._pending is None:
            raise RuntimeError("sample_tokens() without an execute_model() that returned None before it")
        if grammar_output is not None:
            raise ConfigError("grammar_output: this runner has no structured output")
        step, self._pending = self._pending, None
        rows = step.inputs.sampling_rows
        token_ids = self.sampler(step.logits, self.batch.make_sampling_metadata(rows)).cpu().numpy()
        failed = token_ids == NO_TOKEN
        if failed.any():
            return self._finish_some(step.inputs, token_ids, failed)
        self.batch.append_sampled(rows, token_ids)
        return ModelRunnerOutput(step.inputs.req_ids, _ragged(step.inputs, token_ids))

    def _finish_some(
        self, inputs: StepInputs, token_ids: npt.NDArray[np.int64], failed: npt.NDArray[np.bool_]
    ) -> ModelRunnerOutput:
        """Some rows have no token: an error for each of them, and their tokens for the others."""
        rows = inputs.sampling_rows
        numbers = np.arange(rows.stop) if isinstance(rows, slice) else rows
        self.batch.append_sampled(numbers[~failed], token_ids[~failed])
        output = ModelRunnerOutput(inputs.req_ids, _ragged(inputs, token_ids))
        for index, sampled in enumerate(output.sampled_token_ids):
            if sampled == [NO_TOKEN]:
                output.sampled_token_ids[index] = []
                output.errors[inputs.req_ids[index]] = NO_TOKEN_MESSAGE
        return output

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states `[N, hidden]` of the step's tokens; their keys and values are in the cache afterwards."""
        attn_metadata = {}
        for (group, _, builder), common in zip(self._groups, inputs.attention, strict=True):
            attn_metadata.update(dict.fromkeys(group.layer_names, builder.build(common)))
        with set_forward_context(ForwardContext(attn_metadata, self.kv_caches)):
            hidden: torch.Tensor = self.model(inputs.input_ids, inputs.positions)
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden rows; ids that the tokenizer does not know can never be sampled."""
        logits: torch.Tensor = self.model.compute_logits(hidden)  # type: ignore[operator]
        known = self.config.model.tokenizer_vocab_size
        if known is not None and known < logits.shape[1]:
            logits[:, known:] = -torch.inf
        return logits

    # -- what a plan changes before the forward ----------------------------------------------------------------

    def _follow(self, plan: SchedulerOutput) -> None:
        for req_id in plan.finished_req_ids:
            self._drawn_seeds.pop(req_id, None)
        self._drop(plan.finished_req_ids)
        self._drop(plan.preempted_req_ids)
        for new in plan.new_reqs:
            self.batch.add_row(new, self._seed_of(new.req_id, new.sampling_params.seed))
        self.batch.update(plan.cached_reqs)
        if plan.block_copies:
            self._copy_blocks(plan.block_copies)

    def _drop(self, req_ids: Iterable[str]) -> None:
        """Forget rows. A plan may repeat what an earlier one said, so a row may be gone already."""
        for req_id in req_ids:
            if req_id in self.batch:
                self.batch.remove_row(req_id)

    def _seed_of(self, req_id: str, seed: int | None) -> int:
        if seed is not None:
            return seed
        if req_id not in self._drawn_seeds:
            self._drawn_seeds[req_id] = int(self._entropy.integers(2**64, dtype=np.uint64))
        return self._drawn_seeds[req_id]

    def _copy_blocks(self, copies: list[BlockCopy]) -> None:
        """Every layer of a group at once; as if one copy were made after the other, though all read first."""
        for number, (group, backend, _) in enumerate(self._groups):
            origin: dict[int, int] = {}
            for copy in copies:
                if copy.group == number:
                    origin[copy.destination] = origin.get(copy.source, copy.source)
            if origin:
                for name in group.layer_names:
                    backend.copy_blocks(self.kv_caches[name], list(origin.values()), list(origin))


def _ragged(inputs: StepInputs, token_ids: npt.NDArray[np.int64]) -> list[list[int]]:
    """One list a request of the step: its token, or nothing if it did not sample."""
    sampled = [[token_id] for token_id in token_ids.tolist()]
    if len(sampled) == len(inputs.req_ids):
        return sampled
    answers = iter(sampled)
    return [next(answers) if count else [] for count in inputs.num_logits.tolist()]
