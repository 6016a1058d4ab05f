"""From the arguments a user gives to the small configs the engine is built of.

`EngineArgs` has vLLM's names and defaults; each field carries its help text and the section it is listed under, so
that the command line is made from it. Nothing is accepted that does not act: an unknown name is refused with the
nearest valid one, a vLLM argument that does not exist here yet is refused saying so.
"""

import dataclasses
import difflib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mini_vllm.config import (
    DEFAULT_BLOCK_SIZE,
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    LoadConfig,
    ModelConfig,
    ObservabilityConfig,
    ParallelConfig,
    PreemptionPolicy,
    QuantizationOptions,
    SchedulerConfig,
    SchedulingPolicy,
)
from mini_vllm.engine.arg_values import (
    parse_logits_processors,
    parse_max_model_len,
    parse_names,
    parse_size,
    parse_tenant_weights,
)
from mini_vllm.engine.model_source import ModelSource
from mini_vllm.exceptions import CheckpointError, ConfigError
from mini_vllm.logger import init_logger

if TYPE_CHECKING:
    from mini_vllm.hf_config import HFConfig
    from mini_vllm.text.tokenizer import Tokenizer

logger = init_logger(__name__)

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "assets" / "stdlib-llama-3.7m"
"""The bundled model, used when no model is named."""

_DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}

_QUANTIZATIONS = {
    "w8a8": "int8",
    "w8a16": "int8_per_channel_weight_only",
    "int8_wo": "int8_per_channel_weight_only",
    "w4a8": "int4",
}
"""Short names of methods."""

_VLLM_ARGUMENTS_NOT_HERE = frozenset(
    """allowed_local_media_path api_server_count calculate_kv_scales code_revision
    collect_detailed_traces compilation_config config_format cpu_offload_gb data_parallel_address
    data_parallel_backend data_parallel_rank data_parallel_size decode_context_parallel_size
    disable_cascade_attn disable_chunked_mm_input disable_custom_all_reduce disable_hybrid_kv_cache_manager
    disable_sliding_window distributed_executor_backend enable_chunked_prefill enable_dbo
    enable_eplb enable_expert_parallel enable_lora enable_mm_embeds enable_prompt_embeds enable_sleep_mode
    enforce_eager eplb_config fully_sharded_loras hf_config_path hf_overrides hf_token ignore_patterns
    io_processor_plugin kv_cache_dtype kv_events_config kv_offloading_size kv_sharing_fast_prefill
    kv_transfer_config limit_mm_per_prompt logprobs_mode lora_dtype mamba_block_size
    mamba_cache_dtype mamba_ssm_cache_dtype max_cpu_loras max_long_partial_prefills max_lora_rank
    max_loras max_num_partial_prefills max_parallel_loading_workers mm_encoder_tp_mode mm_processor_cache_gb
    mm_processor_kwargs model_impl model_loader_extra_config node_rank nnodes observability_config
    otlp_traces_endpoint override_attention_dtype override_generation_config pipeline_parallel_size
    pooler_config prefill_context_parallel_size prefix_caching_hash_algo pt_load_map_location
    ray_workers_use_nsight reasoning_parser runner scheduler_cls served_model_name
    show_hidden_metrics_for_version skip_tokenizer_init speculative_config stream_interval
    structured_outputs_config swap_space task tokenizer_mode video_pruning_rate worker_cls
    worker_extension_cls""".split()
)


def _arg(default: Any, section: str, help: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"section": section, "help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """Everything that can be set when an engine is built. Raises `ConfigError` naming the argument."""

    model: str | None = _arg(
        None, "model",
        "Folder with config.json and weights, a GGUF file, or a name on the Hugging Face hub: org/name, or "
        "org/name:Q4_K_M for one of its GGUF files. Default: the bundled model.",
    )  # fmt: skip
    tokenizer: str | None = _arg(
        None, "model", "Folder with the tokenizer's files, a GGUF file, or a name on the hub. Default: the model's."
    )
    revision: str | None = _arg(None, "model", "Branch, tag or commit of a model on the hub. Default: its main branch.")
    tokenizer_revision: str | None = _arg(
        None, "model", "The same for a tokenizer on the hub. Default: the model's, or the tokenizer's main branch."
    )
    trust_remote_code: bool = _arg(
        False, "model", "Exists to be refused: code that comes with a checkpoint is never run."
    )
    dtype: str = _arg(
        "auto", "model", "Precision of weights and activations; auto follows the checkpoint and the hardware.",
        ("auto", "float32", "bfloat16", "float16", "half", "float"),
    )  # fmt: skip
    max_model_len: int | str | None = _arg(
        None, "model",
        "Tokens of prompt plus output a request may hold, such as 4096, 16k (16000) or 16K (16384); "
        "auto takes what the KV cache can hold. Default: the model's own limit.",
    )  # fmt: skip
    generation_config: str = _arg(
        "auto", "model",
        "Where default sampling parameters come from: auto (the model's generation_config.json), vllm (neutral "
        "ones), or a folder.",
    )  # fmt: skip
    seed: int | None = _arg(
        0, "model", "Makes requests without a seed of their own repeatable from run to run; none draws fresh entropy."
    )
    max_logprobs: int = _arg(
        20, "model", "Logprobs a request may ask for at each position; -1 is as many as the vocabulary has."
    )
    logits_processors: tuple[Any, ...] = _arg(
        (), "model",
        "Processors of the batch's logits: module:Class, several with commas between (in Python, classes, too).",
    )  # fmt: skip

    load_format: str = _arg(
        "auto", "load",
        "auto takes safetensors from a folder and GGUF from a .gguf file; dummy makes random weights.",
        ("auto", "safetensors", "gguf", "dummy"),
    )  # fmt: skip
    download_dir: str | None = _arg(
        None, "load", "Where models of the hub are kept. Default: the hub's own cache (HF_HOME, HF_HUB_CACHE)."
    )
    use_tqdm_on_load: bool = _arg(
        True, "load", "Show progress of downloading and loading; never shown where standard error is no terminal."
    )

    quantization: str | None = _arg(
        None, "quantization",
        "What weights become while they load: int8 (alias w8a8; weights per channel, activations per token), "
        "int8_per_channel_weight_only (alias int8_wo, w8a16) or int4 (alias w4a8; weights per group).",
    )  # fmt: skip
    quantization_group_size: int | None = _arg(
        None,
        "quantization",
        "Inputs that share a scale, for int4 and per-group activations: 32, 64 or 128. Default: 32.",
    )
    quantization_symmetric: bool = _arg(
        True, "quantization", "Keep int4 weights symmetric around 0; otherwise each group has a minimum as well."
    )
    quantization_activation_scales: str = _arg(
        "token", "quantization",
        "What part of a token's activations shares a scale: all of it (token), or a group, which outliers hurt less.",
        ("token", "group"),
    )  # fmt: skip
    quantization_lm_head: str = _arg(
        "int8", "quantization", "The head's weights; same is as the other layers, none leaves them as they are.",
        ("int8", "int4", "same", "none"),
    )  # fmt: skip
    quantization_skip_layers: tuple[str, ...] = _arg(
        (), "quantization",
        "Layers that stay as they are: names, parts of names or patterns, such as down_proj,model.layers.0,*.3.mlp.*",
    )  # fmt: skip

    block_size: int = _arg(DEFAULT_BLOCK_SIZE, "cache", "Tokens in one KV cache block.")
    enable_prefix_caching: bool = _arg(True, "cache", "Reuse the KV cache of prompts that begin alike.")
    gpu_memory_utilization: float = _arg(
        CacheConfig.gpu_memory_utilization, "cache",
        "Share of the device's memory the engine may use; on a CPU, of what is free once the weights are loaded.",
    )  # fmt: skip
    kv_cache_memory_bytes: int | None = _arg(
        None, "cache", "Bytes of the KV cache, such as 2G (2 x 2^30); wins over --gpu-memory-utilization."
    )
    num_gpu_blocks_override: int | None = _arg(None, "cache", "Blocks of the KV cache; wins over both of the above.")

    max_num_batched_tokens: int = _arg(2048, "scheduler", "Tokens one step may compute, over all requests.")
    max_num_seqs: int = _arg(256, "scheduler", "Requests that may run at once.")
    long_prefill_token_threshold: int = _arg(
        0, "scheduler", "Tokens of one prompt a step may compute; 0 sets no limit of its own."
    )
    scheduling_policy: str = _arg(
        "fcfs", "scheduler",
        "fcfs serves in order of arrival; priority serves the lowest number first; fair lets tenants (API keys, and "
        "the users of one) take turns by the tokens they were given.",
        get_args(SchedulingPolicy),
    )  # fmt: skip
    tenant_weights: Mapping[str, float] | str | None = _arg(
        None, "scheduler",
        "Shares of tenants under the policy fair, such as batch=0.5,chat=2 (in Python, a mapping); 1 for the others.",
    )  # fmt: skip
    preemption_policy: str = _arg(
        "latest", "scheduler",
        "Who gives way when the KV cache is full: latest takes the one that the policy puts last, least-work the one "
        "that has the least to compute again.",
        get_args(PreemptionPolicy),
    )  # fmt: skip

    async_scheduling: bool | None = _arg(
        None, "scheduler",
        "Plan a step while the one before it computes. Default: off.",
    )  # fmt: skip

    tensor_parallel_size: int = _arg(1, "device", "Devices that share the model. Only 1 so far.")
    device: str = _arg("auto", "device", "auto, cpu or cuda.")
    num_threads: int | None = _arg(None, "device", "CPU threads that compute. Default: the cores this process may use.")
    attention_backend: str | None = _arg(None, "device", "Attention implementation by name. Default: the fastest.")

    disable_log_stats: bool = _arg(False, "logging", "Do not log throughput and cache use while running.")
    step_trace_capacity: int = _arg(
        256, "logging", "Steps of which a record is kept, the newest, to be looked at; 0 keeps none."
    )
    step_trace_detailed: bool = _arg(
        False, "logging", "Note in each of these why every waiting request waits, not only the first of the queue."
    )

    def __post_init__(self) -> None:
        _require_types(self)
        if self.trust_remote_code:
            raise ConfigError("trust_remote_code: must be False; this engine never runs code from a checkpoint")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype: must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.max_logprobs < -1:
            raise ConfigError(f"max_logprobs: must be -1 (all) or at least 0, got {self.max_logprobs}")
        object.__setattr__(self, "logits_processors", parse_logits_processors(self.logits_processors))
        object.__setattr__(self, "quantization_skip_layers", parse_names(self.quantization_skip_layers))
        self.quantization_options()  # refused here if they are wrong
        object.__setattr__(self, "tenant_weights", parse_tenant_weights(self.tenant_weights))
        object.__setattr__(self, "max_model_len", parse_max_model_len(self.max_model_len))
        if self.kv_cache_memory_bytes is not None:
            object.__setattr__(
                self, "kv_cache_memory_bytes", parse_size("kv_cache_memory_bytes", self.kv_cache_memory_bytes)
            )

    def quantization_options(self) -> QuantizationOptions | None:
        """What was asked of quantisation while loading; None for nothing."""
        prefix = "quantization_"
        fields = [f for f in dataclasses.fields(self) if f.name.startswith(prefix)]
        options = {f.name.removeprefix(prefix): getattr(self, f.name) for f in fields}
        if self.quantization is not None:
            return QuantizationOptions(_QUANTIZATIONS.get(self.quantization, self.quantization), **options)
        if changed := [f.name for f in fields if getattr(self, f.name) != f.default]:
            raise ConfigError(f"{changed[0]}: nothing is quantised; name a method with quantization")
        return None

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> "EngineArgs":
        """Build from keywords. An unknown name raises `ConfigError` with the nearest valid one."""
        valid = {f.name for f in dataclasses.fields(cls)}
        for name in kwargs:
            if name not in valid:
                raise ConfigError(unknown_argument_message(name, valid))
        return cls(**kwargs)

    # -- what the arguments resolve to ----------------------------------------------------------------------

    @cached_property
    def model_source(self) -> ModelSource:
        """Where the model's files are, resolved once, so that all of them are of one commit."""
        if self.model is None and self.load_format == "gguf":
            raise ConfigError("model: load_format='gguf' needs the path of a .gguf file")
        return self._source("model", str(DEFAULT_MODEL) if self.model is None else self.model, self.revision)

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file: by its name, by `load_format`, or as all that its repository has."""
        return self.model_source.is_gguf

    @property
    def model_folder(self) -> Path:
        """The folder of the model, or its GGUF file, checked to exist. Raises `CheckpointError`."""
        return self.model_source.path

    def _source(self, field: str, name: str, revision: str | None) -> ModelSource:
        load_format = self.load_format if field == "model" else "auto"
        return ModelSource(name, field, load_format, revision, self.download_dir, self.use_tqdm_on_load)

    @cached_property
    def tokenizer_source(self) -> ModelSource:
        """Where the tokenizer's files are: with the model unless the arguments say otherwise."""
        if self.tokenizer is None and self.tokenizer_revision is None:
            return self.model_source
        name = self.model_source.name if self.tokenizer is None else self.tokenizer
        return self._source("tokenizer", name, self.tokenizer_revision)

    def load_tokenizer(self) -> "Tokenizer":
        """The tokenizer these arguments name. Raises `CheckpointError`."""
        from mini_vllm.text.tokenizer import Tokenizer

        path = self.tokenizer_source.path
        if self.tokenizer_source.is_gguf:
            from mini_vllm.gguf.reader import open_gguf
            from mini_vllm.gguf.tokenizer import gguf_tokenizer

            return gguf_tokenizer(open_gguf(path))
        return Tokenizer.from_folder(path)

    def load_generation_config(self) -> dict[str, Any]:
        """The generation_config.json these arguments name; empty for 'vllm' or when there is none."""
        from mini_vllm.hf_config import generation_config

        if self.generation_config == "vllm":
            return {}
        if self.generation_config == "auto":
            return generation_config(self.model_folder)
        folder = Path(self.generation_config).expanduser()
        if not (folder / "generation_config.json").is_file():
            raise CheckpointError(f"generation_config: {folder} has no generation_config.json")
        return generation_config(folder)

    def load_eos_token_ids(self, hf_config: "HFConfig") -> tuple[int, ...]:
        """Every id that ends a sequence: the model's generation_config.json, else its config.json."""
        from mini_vllm.hf_config import generation_config

        ids = generation_config(self.model_folder).get("eos_token_id")
        if ids is None:
            return hf_config.eos_token_ids
        checked = tuple(ids) if isinstance(ids, list) else (ids,)
        if not all(type(token_id) is int and token_id >= 0 for token_id in checked):
            raise CheckpointError(f"{self.model_folder}/generation_config.json: eos_token_id must be ids, got {ids!r}")
        return checked

    def load_hf_config(self) -> "HFConfig":
        """The model's configuration, from config.json or the GGUF file. Raises `CheckpointError`."""
        from mini_vllm.hf_config import HFConfig

        if not self.is_gguf:
            return HFConfig.from_folder(self.model_folder)
        from mini_vllm.gguf.config import gguf_hf_config
        from mini_vllm.gguf.reader import open_gguf

        return gguf_hf_config(open_gguf(self.model_folder))

    def create_engine_config(self, tokenizer: "Tokenizer | None" = None) -> EngineConfig:
        """Read config.json, resolve what is 'auto' except what needs memory to be measured, and split it up.

        tokenizer: one that is loaded already, for its vocabulary size. Weights of a model on the hub are fetched last,
        when everything else is known to be right.
        """
        hf_config = self.load_hf_config()
        if tokenizer is None:
            tokenizer = self.load_tokenizer()
        max_model_len = self._resolve_max_model_len(hf_config)
        if self.load_format != "dummy":
            self._fetch_weights(hf_config)
        return EngineConfig(
            model=ModelConfig(
                model=str(self.model_folder),
                hf_config=hf_config,
                dtype=self._resolve_dtype(hf_config),
                max_model_len=max_model_len,
                tokenizer=tokenizer.name_or_path,
                tokenizer_vocab_size=tokenizer.vocab_size,
                quantization=self.quantization_options(),
                seed=secrets.randbits(63) if self.seed is None else self.seed,
                logits_processors=self.logits_processors,
            ),
            cache=CacheConfig(**self._fields_of(CacheConfig)),
            scheduler=SchedulerConfig(
                **self._fields_of(SchedulerConfig)
                | {
                    "policy": self.scheduling_policy,
                    "max_model_len": max_model_len,
                    "async_scheduling": bool(self.async_scheduling),
                }
            ),
            load=LoadConfig(
                **self._fields_of(LoadConfig) | {"use_tqdm": self.use_tqdm_on_load} | self._resolved_load_format()
            ),
            parallel=ParallelConfig(**self._fields_of(ParallelConfig)),
            device=DeviceConfig(**self._fields_of(DeviceConfig)),
            observability=ObservabilityConfig(**self._fields_of(ObservabilityConfig)),
        )

    def _fetch_weights(self, hf_config: "HFConfig") -> None:
        if self.model_source.is_on_hub and not self.is_gguf:
            from mini_vllm.models.registry import ModelRegistry  # imports torch

            ModelRegistry.resolve(hf_config.architectures)  # before gigabytes are downloaded for nothing
            self.model_source.fetch_weights()

    def _fields_of(self, config: Any) -> dict[str, Any]:
        """The arguments that `config`, a dataclass, has under the same name."""
        names = {f.name for f in dataclasses.fields(config)}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}

    def _resolved_load_format(self) -> dict[str, Any]:
        return {"load_format": "gguf"} if self.is_gguf and self.load_format != "dummy" else {}

    def _resolve_max_model_len(self, hf_config: "HFConfig") -> int | None:
        limit = hf_config.derived_max_model_len
        if self.max_model_len is None:
            default = hf_config.default_max_model_len
            if default < limit:
                logger.info("max_model_len %d, the context before scaling; up to %d can be asked for", default, limit)
            return default
        if self.max_model_len == "auto":
            return None
        assert isinstance(self.max_model_len, int)
        if self.max_model_len > limit:
            raise ConfigError(
                f"max_model_len: {self.max_model_len} is more than the {limit} tokens the model was made for "
                "(max_position_embeddings in config.json)"
            )
        return self.max_model_len

    def _resolve_dtype(self, hf_config: "HFConfig") -> str:
        from mini_vllm.platforms import select_platform

        dtype = _DTYPES[self.dtype]
        if dtype == "auto":
            dtype, why = select_platform(self.device).explain_auto_dtype(hf_config.dtype)
            logger.info("dtype auto is %s: %s", dtype, why)
        return dtype


def unknown_argument_message(name: str, valid: set[str]) -> str:
    """Why `name` is refused: not here yet, or misspelt and what was probably meant."""
    if name in _VLLM_ARGUMENTS_NOT_HERE:
        return f"{name}: vLLM has this argument, but it is not supported here yet"
    nearest = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; valid ones are {', '.join(sorted(valid))}"
    return f"{name}: no such engine argument{hint}"


def is_vllm_argument(name: str) -> bool:
    """Whether this is an argument of vLLM's that does not exist here yet."""
    return name in _VLLM_ARGUMENTS_NOT_HERE


_EXPECTED_TYPES: Mapping[str, tuple[type, ...]] = {
    "model": (str, os.PathLike), "tokenizer": (str, os.PathLike), "generation_config": (str, os.PathLike),
    "revision": (str,), "tokenizer_revision": (str,), "download_dir": (str, os.PathLike), "use_tqdm_on_load": (bool,),
    "dtype": (str,), "load_format": (str,), "scheduling_policy": (str,), "preemption_policy": (str,),
    "device": (str,), "attention_backend": (str,),
    "quantization": (str,), "quantization_group_size": (int,), "quantization_symmetric": (bool,),
    "quantization_activation_scales": (str,), "quantization_lm_head": (str,),
    "quantization_skip_layers": (str, tuple, list),
    "trust_remote_code": (bool,), "enable_prefix_caching": (bool,), "disable_log_stats": (bool,),
    "step_trace_capacity": (int,), "step_trace_detailed": (bool,), "async_scheduling": (bool,),
    "block_size": (int,), "num_gpu_blocks_override": (int,), "max_num_batched_tokens": (int,), "max_num_seqs": (int,),
    "long_prefill_token_threshold": (int,), "tensor_parallel_size": (int,), "num_threads": (int,), "seed": (int,),
    "gpu_memory_utilization": (int, float), "max_logprobs": (int,), "logits_processors": (str, tuple, list),
}  # fmt: skip
_MAY_BE_NONE = frozenset(
    "model tokenizer revision tokenizer_revision download_dir seed num_gpu_blocks_override num_threads "
    "attention_backend quantization quantization_group_size async_scheduling".split()
)


def _require_types(args: EngineArgs) -> None:
    for name, types in _EXPECTED_TYPES.items():
        value = getattr(args, name)
        if value is None and name in _MAY_BE_NONE:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join("path" if kind is os.PathLike else kind.__name__ for kind in types)
            raise ConfigError(f"{name}: must be {wanted}, got {value!r}")
        if isinstance(value, os.PathLike):
            object.__setattr__(args, name, os.fspath(value))
    if args.num_threads is not None and args.num_threads < 1:
        raise ConfigError(f"num_threads: must be at least 1, got {args.num_threads}")
