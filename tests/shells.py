"""Small checkpoints and engines over them, shared by the tests of the shells (and imported by the entrypoints')."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose tokenizer adds BOS."""
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", seed=1)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 (biases, tied embeddings, no BOS) with a generation config and ids no token stands behind."""
    return make_checkpoint(
        tmp_path_factory.mktemp("qwen2"),
        "qwen2",
        seed=2,
        vocab_size=448,
        tie_word_embeddings=True,
        generation_config={"temperature": 0.5, "top_p": 0.8, "top_k": 20, "max_new_tokens": 7, "eos_token_id": [2, 5]},
    )


@pytest.fixture
def make_engine(llama: Path) -> Callable[..., Any]:
    """An `LLMEngine` over the Llama, in float32 on one thread; keywords are `EngineArgs`."""
    from mini_vllm.engine.arg_utils import EngineArgs
    from mini_vllm.engine.llm_engine import LLMEngine

    def make(**kwargs: Any) -> LLMEngine:
        options = {"model": str(llama), "dtype": "float32", "num_threads": 1, "num_gpu_blocks_override": 80} | kwargs
        return LLMEngine.from_engine_args(EngineArgs.from_kwargs(**options))

    return make
