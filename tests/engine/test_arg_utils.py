"""Claims about the engine's arguments: vLLM's names and defaults, and nothing accepted that does not act."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.engine.arg_utils import (
    _VLLM_ARGUMENTS_NOT_HERE,
    DEFAULT_MODEL,
    EngineArgs,
    parse_max_model_len,
    parse_size,
    unknown_argument_message,
)
from mini_vllm.exceptions import CheckpointError, ConfigError

NAMES = {field.name for field in dataclasses.fields(EngineArgs)}


def test_defaults_are_vllms() -> None:
    args = EngineArgs()
    expected = {
        "tokenizer": None, "trust_remote_code": False, "dtype": "auto", "max_model_len": None,
        "generation_config": "auto", "seed": 0, "load_format": "auto", "block_size": 16, "enable_prefix_caching": True,
        "kv_cache_memory_bytes": None, "num_gpu_blocks_override": None, "max_num_batched_tokens": 2048,
        "max_num_seqs": 256, "long_prefill_token_threshold": 0, "scheduling_policy": "fcfs", "tensor_parallel_size": 1,
        "attention_backend": None, "preemption_policy": "latest", "tenant_weights": {}, "step_trace_capacity": 256,
        "step_trace_detailed": False, "kv_cache_dtype": "auto",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_every_argument_has_help_and_a_section() -> None:
    for field in dataclasses.fields(EngineArgs):
        assert len(field.metadata["help"]) > 10 and field.metadata["section"], field.name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_modellen", "max_model_len"),
        ("max_num_seq", "max_num_seqs"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("enable_prefix_cache", "enable_prefix_caching"),
        ("tensor_parallel", "tensor_parallel_size"),
    ],
)
def test_a_misspelt_argument_is_refused_with_the_nearest_valid_one(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: no such engine argument; did you mean '{nearest}'"):
        EngineArgs.from_kwargs(**{name: 1})


def test_an_argument_like_no_other_is_refused_with_all_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"valid ones are .*block_size.*, .*tokenizer"):
        EngineArgs.from_kwargs(zzzzqqqq=1)


_ABSENT = ["cpu_offload_gb", "enable_lora", "speculative_config", "hf_overrides"]


@pytest.mark.parametrize("name", _ABSENT)
def test_a_vllm_argument_that_is_not_here_yet_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: vLLM has this argument, but it is not supported here yet"):
        EngineArgs.from_kwargs(**{name: None})


def test_no_argument_is_both_here_and_not_here() -> None:
    assert not NAMES & _VLLM_ARGUMENTS_NOT_HERE
    assert "not supported here yet" not in unknown_argument_message("block_sizes", NAMES), "broken control"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("trust_remote_code", True, "must be False"),
        ("dtype", "int4", "must be one of auto, float32"),
        ("block_size", "16", "must be int"),
        ("block_size", 0, "at least 1"),
        ("block_size", True, "must be int"),
        ("max_num_seqs", 0, "at least 1"),
        ("max_num_batched_tokens", -5, "at least 1"),
        ("max_num_batched_tokens", 1.5, "must be int"),
        ("long_prefill_token_threshold", -1, "at least 0"),
        ("gpu_memory_utilization", 0.0, r"in \(0, 1\]"),
        ("gpu_memory_utilization", "0.9", "must be int or float"),
        ("kv_cache_memory_bytes", "2 x", "with a unit"),
        ("kv_cache_memory_bytes", 0, "at least 1"),
        ("num_gpu_blocks_override", 1, "at least 2"),
        ("max_model_len", 0, "at least 1"),
        ("max_model_len", "lots", "with a unit"),
        ("max_model_len", 10**6, "more than the 256 tokens"),
        ("scheduling_policy", "lifo", "one of fcfs, priority, fair, got 'lifo'"),
        ("preemption_policy", "oldest", "one of latest, least-work, got 'oldest'"),
        ("tenant_weights", "chat", "names and numbers above 0"),
        ("tenant_weights", "chat=0", "names and numbers above 0"),
        ("tenant_weights", "chat=nan", "names and numbers above 0"),
        ("tenant_weights", {"chat": True}, "names and numbers above 0"),
        ("tenant_weights", 2, "a mapping, or text"),
        ("tenant_weights", "a=1,b=2,a=3", "each tenant once"),
        ("step_trace_capacity", -1, "at least 0"),
        ("step_trace_detailed", 1, "must be bool"),
        ("load_format", "pt", "auto.*, got 'pt'"),
        ("tensor_parallel_size", 2, "only 1"),
        ("num_threads", 0, "at least 1"),
        ("seed", "x", "must be int"),
        ("device", 3, "must be str"),
        ("enable_prefix_caching", 1, "must be bool"),
    ],
)
def test_bad_values_are_refused_by_name_and_limit(llama: Path, name: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: .*{says}"):
        EngineArgs.from_kwargs(**{"model": str(llama), name: value}).create_engine_config()


@pytest.mark.parametrize(
    ("text", "value"),
    [("16", 16), (16, 16), ("16k", 16_000), ("16K", 16_384), ("1.5k", 1500), ("2G", 2**31), ("3m", 3 * 10**6)],
)  # fmt: skip
def test_sizes_have_units(text: Any, value: int) -> None:
    assert parse_size("x", text) == value


@pytest.mark.parametrize("value", ["batch=0.5, chat=2,=3", {"batch": 0.5, "chat": 2, "": 3}])
def test_tenants_weights_are_text_or_a_mapping(value: Any) -> None:
    args = EngineArgs(scheduling_policy="fair", tenant_weights=value, preemption_policy="least-work")
    assert args.tenant_weights == {"batch": 0.5, "chat": 2, "": 3}
    scheduler = args.create_engine_config().scheduler
    assert (scheduler.policy, scheduler.preemption_policy) == ("fair", "least-work")
    assert scheduler.tenant_weights == args.tenant_weights


def test_what_is_noted_of_each_step_reaches_the_config() -> None:
    config = EngineArgs(step_trace_capacity=7, step_trace_detailed=True).create_engine_config().observability
    assert (config.step_trace_capacity, config.step_trace_detailed) == (7, True)


def test_max_model_len_may_be_auto() -> None:
    values = [None, "auto", -1, "-1", "1k", 512]
    assert [parse_max_model_len(value) for value in values] == [None, "auto", "auto", "auto", 1000, 512]


def test_no_model_is_the_bundled_one() -> None:
    assert EngineArgs().model_folder == DEFAULT_MODEL


def test_a_model_that_is_no_folder_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'/org/name' is no local folder.*config\.json.*Hugging Face hub"):
        EngineArgs(model="/org/name").create_engine_config()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; a folder is needed"):
        EngineArgs(model=str(tmp_path / "file")).create_engine_config()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        EngineArgs(model=str(tmp_path)).create_engine_config()


def test_every_argument_reaches_the_config_it_is_for(llama: Path) -> None:
    args = EngineArgs(
        model=str(llama), dtype="half", max_model_len="0.1k", seed=7, load_format="dummy", block_size=8,
        enable_prefix_caching=False, gpu_memory_utilization=0.25, kv_cache_memory_bytes="1M",  # type: ignore[arg-type]
        num_gpu_blocks_override=9, max_num_batched_tokens=33, max_num_seqs=3, long_prefill_token_threshold=5,
        scheduling_policy="priority", device="cpu", num_threads=1, attention_backend="TORCH_REF",
    )  # fmt: skip
    config = args.create_engine_config()
    model, cache, scheduler = config.model, config.cache, config.scheduler
    assert (model.dtype, model.max_model_len, model.seed) == ("float16", 100, 7)
    assert (model.model, model.tokenizer, model.tokenizer_vocab_size) == (str(llama), str(llama), 384)
    assert (cache.block_size, cache.enable_prefix_caching, cache.gpu_memory_utilization) == (8, False, 0.25)
    assert (cache.kv_cache_memory_bytes, cache.num_gpu_blocks_override) == (2**20, 9)
    assert (scheduler.max_num_batched_tokens, scheduler.max_num_seqs, scheduler.policy) == (33, 3, "priority")
    assert (scheduler.long_prefill_token_threshold, scheduler.max_model_len) == (5, 100)
    assert config.load.load_format == "dummy" and config.parallel.tensor_parallel_size == 1
    device = config.device
    assert (device.device, device.num_threads, device.attention_backend) == ("cpu", 1, "TORCH_REF")


def test_paths_may_be_path_objects(llama: Path) -> None:
    assert EngineArgs(model=llama, tokenizer=llama).create_engine_config().model.model == str(llama)  # type: ignore[arg-type]


def test_dtype_auto_follows_the_platform_and_is_logged(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logging.getLogger("mini_vllm").addHandler(caplog.handler)
    try:
        with caplog.at_level("INFO", logger="mini_vllm"):
            dtype = EngineArgs(model=str(llama)).create_engine_config().model.dtype
    finally:
        logging.getLogger("mini_vllm").removeHandler(caplog.handler)
    assert f"dtype auto is {dtype}: " in caplog.text


def test_seed_none_draws_a_new_engine_seed_each_time(llama: Path) -> None:
    def seed(value: int | None) -> int:
        return EngineArgs(model=str(llama), seed=value).create_engine_config().model.seed

    assert seed(None) != seed(None) and seed(0) == seed(0) == 0


def test_generation_config_comes_from_where_it_is_told(llama: Path, qwen2: Path) -> None:
    assert EngineArgs(model=str(qwen2)).load_generation_config()["top_k"] == 20
    assert EngineArgs(model=str(qwen2), generation_config="vllm").load_generation_config() == {}
    assert EngineArgs(model=str(llama)).load_generation_config() == {}
    assert EngineArgs(model=str(llama), generation_config=str(qwen2)).load_generation_config()["top_k"] == 20
    with pytest.raises(CheckpointError, match=r"generation_config: .* has no generation_config\.json"):
        EngineArgs(model=str(qwen2), generation_config=str(llama)).load_generation_config()


def test_eos_ids_come_from_the_generation_config_and_else_from_the_model_config(
    llama: Path, qwen2: Path, tmp_path: Path
) -> None:
    def eos(folder: Path) -> tuple[int, ...]:
        args = EngineArgs(model=str(folder))
        return args.load_eos_token_ids(args.create_engine_config().model.hf_config)

    assert eos(qwen2) == (2, 5) and eos(llama) == (2,)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((llama / name).read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["</s>"]}))
    with pytest.raises(CheckpointError, match="eos_token_id must be ids"):
        eos(tmp_path)
