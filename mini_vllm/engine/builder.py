"""From the arguments a user gives to the two halves of an engine: the core, and what turns text into its requests.

The shells build both; where the core runs in a process of its own, each half is built where it lives. torch is
imported by `start_core` alone.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from importlib import metadata

from mini_vllm.config import EngineConfig
from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.core import EngineCore
from mini_vllm.engine.input_processor import InputProcessor, sampling_params_of
from mini_vllm.engine.process.messages import EngineInfo
from mini_vllm.executor.base import Executor
from mini_vllm.hf_config import HFConfig
from mini_vllm.text.tokenizer import Tokenizer


def start_core(config: EngineConfig) -> EngineCore:
    """Load the weights, size the KV cache, and return a core that is ready.

    Raises `ConfigError`, `CheckpointError`, `UnsupportedModelError` or `KVCacheTooSmallError`.
    """
    from mini_vllm.executor.uniproc import UniProcExecutor  # torch loads here, once the folder proved readable

    executor = UniProcExecutor(config)
    try:
        return build_core(config, executor)
    except BaseException:
        executor.shutdown()  # the error may be kept, the weights need not stay with it
        raise


def build_core(config: EngineConfig, executor: Executor, *, clock: Callable[[], float] = time.monotonic) -> EngineCore:
    """Scheduler and block manager for the pool that `executor` allocated. clock: of both, in seconds."""
    kv_config = executor.kv_cache_config()
    scheduler_config = dataclasses.replace(config.scheduler, max_model_len=executor.max_model_len)
    kv = KVCacheManager(
        kv_config.num_blocks,
        kv_config.block_size,
        enable_caching=config.cache.enable_prefix_caching,
        num_groups=len(kv_config.groups),
        same_step_sharing=scheduler_config.same_step_prefix_sharing,
    )
    trace = config.observability
    return EngineCore(
        Scheduler(scheduler_config, kv, clock=clock),
        executor,
        trace_capacity=trace.step_trace_capacity,
        trace_detailed=trace.step_trace_detailed,
    )


def describe_core(core: EngineCore, config: EngineConfig) -> EngineInfo:
    """What a shell in another process is told of a core that is ready."""
    kv = core.scheduler.kv
    return EngineInfo(
        max_model_len=core.executor.max_model_len,
        num_gpu_blocks=kv.block_pool.num_blocks,
        block_size=kv.block_size,
        max_request_tokens=kv.block_pool.num_usable_blocks // kv.num_groups * kv.block_size,
        dtype=config.model.dtype,
        device=config.device.device,
        pid=os.getpid(),
        versions={name: metadata.version(name) for name in ("torch",)},
    )


def plan_input_processor(args: EngineArgs, tokenizer: Tokenizer, hf_config: HFConfig) -> Callable[..., InputProcessor]:
    """The half that knows text, but for `max_model_len` and `clock`, which the core has to say.

    Everything is read now, so that what is wrong is said before any weights are loaded.
    """
    generation_config = args.load_generation_config()
    return functools.partial(
        InputProcessor,
        tokenizer,
        vocab_size=hf_config.vocab_size,
        default_sampling_params=sampling_params_of(generation_config),
        default_max_tokens=generation_config.get("max_new_tokens"),
        eos_token_ids=args.load_eos_token_ids(hf_config),
        max_logprobs=args.max_logprobs,
        takes_priority=args.scheduling_policy == "priority",
    )


def read_text_half(args: EngineArgs) -> tuple[Tokenizer, Callable[..., InputProcessor]]:
    """The tokenizer and `plan_input_processor`'s result, from files alone: for a shell without a core beside it."""
    tokenizer = args.load_tokenizer()
    return tokenizer, plan_input_processor(args, tokenizer, args.load_hf_config())
