"""Length-dependent rotary scalings are chosen once per engine: from what was asked for, never from the pool."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mini_vllm.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.exceptions import ConfigError
from mini_vllm.executor.uniproc import UniProcExecutor
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.rope_scaling import rope_frequencies
from tests.families import BY_NAME, ORIGINAL, VOCAB_SIZE

DYNAMIC, LONGROPE = BY_NAME["llama-rope-dynamic-beyond"], BY_NAME["phi3-longrope-beyond"]
DYNAMIC_LIMIT, LONGROPE_LIMIT = 4 * ORIGINAL, 128


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return DYNAMIC.write(tmp_path_factory.mktemp("dynamic"))


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LONGROPE.write(tmp_path_factory.mktemp("longrope"))


def engine_config(folder: Path, max_model_len: Any) -> EngineConfig:
    """What the arguments of a user become."""
    tokenizer: Any = SimpleNamespace(name_or_path=str(folder), vocab_size=VOCAB_SIZE)
    return EngineArgs(model=str(folder), max_model_len=max_model_len).create_engine_config(tokenizer)


def executor_of(folder: Path, max_model_len: int | None, num_blocks: int = 40) -> UniProcExecutor:
    return UniProcExecutor(
        EngineConfig(
            model=ModelConfig(str(folder), HFConfig.from_folder(folder), "float32", max_model_len),
            cache=CacheConfig(num_gpu_blocks_override=num_blocks),
            device=DeviceConfig(device="cpu", num_threads=1),
        )
    )


def frequencies_of(executor: UniProcExecutor) -> torch.Tensor:
    assert executor.runner is not None
    frequencies: torch.Tensor = executor.runner.model.model.rotary_emb.inv_freq  # type: ignore[union-attr, assignment]
    return frequencies


def frequencies_for(folder: Path, max_model_len: int) -> torch.Tensor:
    return rope_frequencies(HFConfig.from_folder(folder).with_max_model_len(max_model_len).rope, 16)[0]


def test_the_limit_asked_for_decides(dynamic: Path, longrope: Path) -> None:
    for folder in (dynamic, longrope):
        within, beyond = (frequencies_of(executor_of(folder, length)) for length in (ORIGINAL, 2 * ORIGINAL))
        assert within.equal(frequencies_for(folder, ORIGINAL))
        assert beyond.equal(frequencies_for(folder, 2 * ORIGINAL))
        assert not within.equal(beyond)


@pytest.mark.parametrize("num_blocks", [3, 40])
def test_a_pool_that_shrinks_auto_does_not_change_the_choice(dynamic: Path, longrope: Path, num_blocks: int) -> None:
    """3 blocks hold 32 tokens, fewer than the original context: the frequencies are still the declared limit's."""
    for folder, declared in ((dynamic, DYNAMIC_LIMIT), (longrope, ORIGINAL)):
        executor = executor_of(folder, None, num_blocks)
        assert executor.max_model_len == min(declared, (num_blocks - 1) * 16)
        assert frequencies_of(executor).equal(frequencies_for(folder, declared))


def test_control_the_shrunken_limit_would_have_chosen_otherwise(dynamic: Path) -> None:
    assert not frequencies_for(dynamic, 32).equal(frequencies_for(dynamic, DYNAMIC_LIMIT))


def test_arguments_resolve_to_the_familys_default_and_limit(dynamic: Path, longrope: Path) -> None:
    assert engine_config(dynamic, None).model.max_model_len == DYNAMIC_LIMIT
    assert engine_config(longrope, None).model.max_model_len == ORIGINAL
    assert engine_config(longrope, LONGROPE_LIMIT).model.max_model_len == LONGROPE_LIMIT
    assert engine_config(longrope, "auto").model.max_model_len is None


def test_more_than_the_stretched_limit_is_refused(dynamic: Path, longrope: Path) -> None:
    for folder, limit in ((dynamic, DYNAMIC_LIMIT), (longrope, LONGROPE_LIMIT)):
        with pytest.raises(ConfigError, match=f"max_model_len: {limit + 1} is more than the {limit} tokens"):
            engine_config(folder, limit + 1)
