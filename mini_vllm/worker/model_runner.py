"""One device: obeys plans with a real model.

It is handed plans (`SchedulerOutput`) and returns what they produced. A step is `execute_model` (follow the plan's
changes, copy blocks, forward, logits of the rows that sample) and `sample_tokens`. The runner keeps the tokens it
samples, so a plan never sends them back. If a step raises, its rows keep what earlier steps wrote; the next plan says
what becomes of them.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mini_vllm.attention.backend import AttentionBackend, AttentionMetadata, MetadataBuilder
from mini_vllm.attention.context import ForwardContext, set_forward_context
from mini_vllm.attention.kv_dtype import storage_dtype
from mini_vllm.config import EngineConfig
from mini_vllm.core.interfaces import KVCacheConfig, KVCacheGroup, KVCacheSpec
from mini_vllm.core.scheduler_output import BlockCopy, ModelRunnerOutput, PromptLogprobs, SchedulerOutput
from mini_vllm.exceptions import ConfigError
from mini_vllm.layers.attention import Attention, get_attention_layers
from mini_vllm.logger import init_logger
from mini_vllm.models.finishing import release_weights
from mini_vllm.models.loader import load_model
from mini_vllm.models.utils import weight_bytes
from mini_vllm.ops.cpu import library as native
from mini_vllm.platforms import select_platform
from mini_vllm.sampling.logits_processor import load_logits_processors
from mini_vllm.sampling.sampler import Sampler
from mini_vllm.worker.captured_step import CapturedStep, StepBuffers, capture
from mini_vllm.worker.input_batch import InputBatch
from mini_vllm.worker.kv_cache import activation_bytes, allocate_kv_caches, gib
from mini_vllm.worker.prepare_inputs import InputPreparer, StepInputs
from mini_vllm.worker.sampling_stage import SamplingStage
from mini_vllm.worker.threads import start_threads

logger = init_logger(__name__)


@dataclass(slots=True)
class PendingStep:
    """A step between its two halves. logits: `[rows that sample, vocab]` float32. forks: as in the plan."""

    inputs: StepInputs
    logits: torch.Tensor
    forks: Mapping[str, Sequence[str]]
    prompt_logprobs: dict[str, PromptLogprobs]


class ModelRunner:
    """Model, KV cache and input batch of one device. Used in this order: `load_model`, `initialize_kv_cache`, steps."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.platform = select_platform(config.device.device)
        self.device = self.platform.device()
        self.num_threads = start_threads(self.platform, config.device.num_threads)
        self.sampler = Sampler()
        self.model: nn.Module
        self.layers: dict[str, Attention] = {}
        self.kv_caches: dict[str, torch.Tensor] = {}
        self.batch: InputBatch
        self.sampling: SamplingStage
        self._preparer: InputPreparer
        self._groups: list[tuple[KVCacheGroup, type[AttentionBackend], MetadataBuilder]] = []
        self._pending: PendingStep | None = None
        self.captured: CapturedStep | None = None

    # -- start-up --------------------------------------------------------------------------------------------

    def load_model(self) -> None:
        """Read the weights onto the device. Raises `CheckpointError` or `UnsupportedModelError`."""
        model_config, device_config = self.config.model, self.config.device
        logger.info("Device: %s; computing with %d CPU threads", self.platform.describe(), self.num_threads)
        vectors = native.available() and native.loaded_isa() != "portable"
        if warning := self.platform.dtype_warning(model_config.dtype, native_kernels=vectors):
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
        asked = self.config.cache.kv_cache_dtype
        dtype = self.config.model.dtype if asked == "auto" else asked
        by_spec: dict[KVCacheSpec, list[str]] = {}
        for name, layer in self.layers.items():
            spec = layer.get_kv_cache_spec(self.config.cache.block_size, dtype)
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
                    kv_cache_config.num_blocks, block_size, layer.num_kv_heads, layer.head_size, group.spec.dtype
                )
            backend = layers[0].backend
            self._groups.append((group, backend, backend.builder_cls(group.spec, self.device)))
        dtype = storage_dtype(kv_cache_config.groups[0].spec.dtype)
        self.kv_caches = allocate_kv_caches(shapes, dtype, self.device)
        scheduler = self.config.scheduler
        block_sizes = [group.spec.block_size for group in kv_cache_config.groups]
        self.batch = InputBatch(scheduler.max_num_seqs, max_model_len, block_sizes, self.platform)
        self._preparer = InputPreparer(self.batch, scheduler.max_num_batched_tokens, self.platform)
        self.sampling = self._sampling_stage()
        self.captured = self._capture()

    @torch.inference_mode()
    def _capture(self) -> CapturedStep | None:
        """The step recorded, where every layer's attention can be and nobody asked for eager execution."""
        builders = [builder for _, _, builder in self._groups]
        if self.config.device.enforce_eager or not all(hasattr(builder, "record") for builder in builders):
            return None

        def metadata(num_tokens: int) -> dict[str, Any]:
            return self._for_layers(builder.record(num_tokens) for builder in builders)  # type: ignore[attr-defined]

        preparer = self._preparer
        buffers = StepBuffers(preparer.input_ids.tensor, preparer.positions.tensor, preparer.logits_indices.tensor)
        return capture(self.model, metadata, self.kv_caches, buffers, self.config.scheduler.max_num_seqs)

    def _sampling_stage(self) -> SamplingStage:
        model = self.config.model
        processors = load_logits_processors(model.logits_processors, self.config, self.device, self.platform.pin_memory)
        entropy = np.random.default_rng(model.seed % 2**64)
        return SamplingStage(self.batch, model.hf_config.vocab_size, processors, entropy)

    def release(self) -> None:
        """Give back weights and KV cache, however long somebody keeps this object; it cannot be used afterwards."""
        if hasattr(self, "model"):
            release_weights(self.model)
        self.captured = None
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
        prompt_logprobs = self.sampling.prompt_logprobs(inputs, hidden, self._logits)
        if not inputs.num_samples:
            self.platform.synchronize()  # nobody else waits, and the next step writes the input buffers
            nothing: list[list[int]] = [[] for _ in inputs.req_ids]
            return ModelRunnerOutput(inputs.req_ids, nothing, prompt_logprobs=prompt_logprobs)
        self._pending = PendingStep(inputs, self._sampled_logits(inputs, hidden), plan.forks, prompt_logprobs)
        return None

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any = None) -> ModelRunnerOutput:
        """One token for every row of the open step that samples (and for every child that parts from one in it); a row
        without an allowed token is an error of its own."""
        if self._pending is None:
            raise RuntimeError("sample_tokens() without an execute_model() that returned None before it")
        if grammar_output is not None:
            raise ConfigError("grammar_output: this runner has no structured output")
        step, self._pending = self._pending, None
        output = self.sampling.sample(step.inputs, step.logits, self.sampler, step.forks)
        output.prompt_logprobs = step.prompt_logprobs
        return output

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states `[N, hidden]` of the step's tokens; their keys and values are in the cache afterwards."""
        built = [builder.build(common) for (_, _, builder), common in zip(self._groups, inputs.attention, strict=True)]
        if self.captured is not None:
            hidden = self.captured.forward(len(inputs.input_ids))
            if hidden is not None:
                return hidden
        with set_forward_context(ForwardContext(self._for_layers(built), self.kv_caches)):
            computed: torch.Tensor = self.model(inputs.input_ids, inputs.positions)
        return computed

    def _for_layers(self, metadata: Iterable[AttentionMetadata]) -> dict[str, AttentionMetadata]:
        """Each group's metadata under the names of its layers."""
        found: dict[str, AttentionMetadata] = {}
        for (group, _, _), of_group in zip(self._groups, metadata, strict=True):
            found.update(dict.fromkeys(group.layer_names, of_group))
        return found

    def _sampled_logits(self, inputs: StepInputs, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the rows that sample."""
        if self.captured is not None:
            logits = self.captured.logits(hidden, inputs.total_num_logits)
            if logits is not None:
                return self._without_unknown(logits)
        return self._logits(hidden if inputs.samples_all else hidden.index_select(0, inputs.logits_indices))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden rows."""
        return self._without_unknown(self.model.compute_logits(hidden))  # type: ignore[operator]

    def _without_unknown(self, logits: torch.Tensor) -> torch.Tensor:
        """Ids that the tokenizer does not know can never be sampled."""
        known = self.config.model.tokenizer_vocab_size
        if known is not None and known < logits.shape[1]:
            logits[:, known:] = -torch.inf
        return logits

    # -- what a plan changes before the forward ----------------------------------------------------------------

    def _follow(self, plan: SchedulerOutput) -> None:
        for req_id in plan.finished_req_ids:
            self.sampling.forget_seed(req_id)
        self._drop(plan.finished_req_ids)
        self._drop(plan.preempted_req_ids)
        for new in plan.new_reqs:
            self.sampling.add(new)
        self.batch.update(plan.cached_reqs)
        if plan.block_copies:
            self._copy_blocks(plan.block_copies)

    def _drop(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self.sampling.remove(req_id)

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
