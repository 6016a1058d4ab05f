"""What the integration tests share."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mini_vllm.config import ModelConfig
from mini_vllm.worker import model_runner


@pytest.fixture(scope="module")
def load_once() -> Iterator[None]:
    """Weights are read once per checkpoint, length, number format and attention backend, not once per engine."""
    loaded: dict[tuple[object, ...], torch.nn.Module] = {}
    load = model_runner.load_model

    def load_model(config: ModelConfig, *args: Any, **kwargs: Any) -> torch.nn.Module:
        numbers = config.dtype, config.quantization, config.batch_invariant
        key = config.model, config.max_model_len, *numbers, kwargs.get("attention_backend")
        if key not in loaded:
            loaded[key] = load(config, *args, **kwargs)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "load_model", load_model)
        yield
