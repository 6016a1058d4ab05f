"""The executor in this process: what it sizes, what it says, what it refuses, and that the core runs on it."""

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.config import DeviceConfig, EngineConfig
from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.engine.core import EngineCore
from mini_vllm.exceptions import ConfigError, KVCacheTooSmallError
from mini_vllm.executor.base import Executor
from mini_vllm.executor.uniproc import UniProcExecutor
from mini_vllm.ops.cpu import library as native
from mini_vllm.platforms import CpuPlatform
from mini_vllm.request import Request
from mini_vllm.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.worker.harness import engine_config

PROMPTS = [list(range(3, 3 + 5 * n)) for n in range(1, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), tokenizer=False)


def with_length(config: EngineConfig, max_model_len: int) -> EngineConfig:
    return replace(config, model=replace(config.model, max_model_len=max_model_len))


def make_core(config: EngineConfig) -> EngineCore:
    executor = UniProcExecutor(config)
    kv = executor.kv_cache_config()
    scheduler = Scheduler(
        replace(config.scheduler, max_model_len=executor.max_model_len), KVCacheManager(kv.num_blocks, kv.block_size)
    )
    return EngineCore(scheduler, executor)


def serve(core: EngineCore, **params: Any) -> dict[str, Request]:
    requests = [
        Request(f"r{i}", prompt, SamplingParams(max_tokens=8, **params), max_model_len=core.executor.max_model_len)
        for i, prompt in enumerate(PROMPTS)
    ]
    for request in requests:
        core.add_request(request)
    while core.has_unfinished_requests():
        core.step()
    return {request.request_id: request for request in requests}


def tokens(requests: dict[str, Request]) -> dict[str, list[int]]:
    return {req_id: request.output_token_ids for req_id, request in requests.items()}


# --- sizes -------------------------------------------------------------------------------------------------


def test_the_pool_has_one_group_of_all_layers(folder: Path) -> None:
    executor: Executor = UniProcExecutor(engine_config(folder, num_gpu_blocks_override=20))
    config = executor.kv_cache_config()
    assert (config.num_blocks, config.block_size, len(config.groups)) == (20, 4, 1)
    assert len(config.groups[0].layer_names) == 2
    assert config.bytes_per_block == 2 * 2 * 4 * 2 * 16 * 4  # layers, K and V, block_size, heads, head_dim, float32


def test_auto_length_shrinks_to_the_pool_or_is_the_models(folder: Path) -> None:
    assert UniProcExecutor(engine_config(folder, num_gpu_blocks_override=20)).max_model_len == 19 * 4
    assert UniProcExecutor(engine_config(folder, num_gpu_blocks_override=200)).max_model_len == 256
    assert UniProcExecutor(engine_config(folder)).max_model_len == 256


def test_a_given_length_that_does_not_fit_is_refused_at_start(folder: Path) -> None:
    config = with_length(engine_config(folder, num_gpu_blocks_override=20), 77)
    with pytest.raises(KVCacheTooSmallError, match="lower max_model_len to 76"):
        UniProcExecutor(config)
    assert UniProcExecutor(with_length(config, 76)).max_model_len == 76


def test_memory_in_bytes_becomes_whole_blocks(folder: Path) -> None:
    per_block = UniProcExecutor(engine_config(folder, num_gpu_blocks_override=2)).kv_cache_config().bytes_per_block
    executor = UniProcExecutor(engine_config(folder, kv_cache_memory_bytes=10 * per_block + per_block // 2))
    assert executor.kv_cache_config().num_blocks == 10


def test_the_default_is_modest_and_enough_for_the_largest_batch(folder: Path) -> None:
    config = UniProcExecutor(engine_config(folder, max_num_seqs=3)).kv_cache_config()
    assert config.num_blocks == 3 * 64 + 1
    assert config.num_blocks * config.bytes_per_block <= 4 << 30


def test_a_share_is_taken_of_what_weights_and_a_step_leave(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1_200_000
    monkeypatch.setattr(CpuPlatform, "available_memory_bytes", lambda self: free)
    executor = UniProcExecutor(engine_config(folder, gpu_memory_utilization=0.5))
    left = executor.collective_rpc("available_kv_cache_bytes")[0]
    assert 0 < left < free
    config = executor.kv_cache_config()
    assert config.num_blocks == left // 2 // config.bytes_per_block


def test_no_memory_left_is_refused_at_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuPlatform, "available_memory_bytes", lambda self: 1000)
    with pytest.raises(KVCacheTooSmallError, match="the pool has 0"):
        UniProcExecutor(engine_config(folder))


def test_start_up_says_what_was_decided(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mini_vllm"):
        UniProcExecutor(engine_config(folder, num_gpu_blocks_override=65))
    text = "\n".join(caplog.messages)
    assert "Device: cpu" in text
    assert "Model loading took" in text
    assert "GPU KV cache size: 256 tokens" in caplog.messages
    assert "Maximum concurrency for 256 tokens per request: 1.00x" in caplog.messages


@pytest.mark.parametrize(("dtype", "warned"), [("float16", True), ("float32", False)])
def test_a_slow_dtype_is_obeyed_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, dtype: str, warned: bool
) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    config = engine_config(folder, num_gpu_blocks_override=20)
    with caplog.at_level(logging.WARNING, "mini_vllm"):
        UniProcExecutor(replace(config, model=replace(config.model, dtype=dtype)))
    assert any("float16 is many times slower" in message for message in caplog.messages) == warned


def test_a_device_that_is_not_there_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_vllm.platforms._why_no_cuda", lambda: "there is none")
    with pytest.raises(ConfigError, match="device: 'cuda' was asked for, but there is none"):
        UniProcExecutor(replace(engine_config(folder), device=DeviceConfig(device="cuda")))


# --- under the core ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"seed": 3, "top_k": 30}])
def test_a_pool_that_forces_preemptions_changes_no_token(folder: Path, params: dict[str, Any]) -> None:
    roomy = make_core(engine_config(folder))
    tight = make_core(engine_config(folder, num_gpu_blocks_override=16, enable_prefix_caching=False))
    expected = tokens(serve(roomy, **params))
    assert tokens(serve(tight, **params)) == expected
    assert tight.scheduler.stats().num_preemptions > 0
    assert all(len(ids) == 8 for ids in expected.values())


def test_a_failed_step_ends_its_requests_and_the_next_ones_are_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(engine_config(folder, enforce_eager=True))
    assert isinstance(core.executor, UniProcExecutor)
    expected = tokens(serve(core, temperature=0.0))
    runner = core.executor.runner
    assert runner is not None

    def fail(*args: object) -> None:
        raise RuntimeError("made to fail")

    with monkeypatch.context() as patch:
        patch.setattr(runner.model, "forward", fail)
        failed = serve(core, temperature=0.0)
    assert {request.finish_reason for request in failed.values()} == {"error"}
    assert all("made to fail" in (request.error or "") for request in failed.values())
    core.scheduler.kv.reset_prefix_cache()
    assert tokens(serve(core, temperature=0.0)) == expected


# --- the rest ----------------------------------------------------------------------------------------------


def test_collective_rpc_calls_the_worker_by_name(folder: Path) -> None:
    executor = UniProcExecutor(engine_config(folder, num_gpu_blocks_override=20))
    assert executor.collective_rpc("get_kv_cache_groups") == [executor.kv_cache_config().groups]
    with pytest.raises(AttributeError, match="no_such_method"):
        executor.collective_rpc("no_such_method")


def test_shutdown_gives_the_memory_back_and_ends_the_executor(folder: Path) -> None:
    executor = UniProcExecutor(engine_config(folder, num_gpu_blocks_override=20))
    executor.shutdown()
    executor.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        executor.collective_rpc("get_kv_cache_groups")


def test_the_executor_interface_loads_no_torch() -> None:
    code = "import sys, mini_vllm.executor.base; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
