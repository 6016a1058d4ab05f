"""Models without a checkpoint, for tests that look at how a config.json is understood."""

from typing import Any

import torch
from torch import nn

from mini_vllm.hf_config import HFConfig
from mini_vllm.models.registry import ModelRegistry
from tests.families import Family


def config_of(config: dict[str, Any]) -> dict[str, Any]:
    """The whole config.json of a row with this config."""
    return Family("", config).full_config()


def build(config: dict[str, Any], max_model_len: int | None = None) -> nn.Module:
    """The model of this config.json, its weights on the meta device: nothing is computed."""
    hf_config = HFConfig.from_dict(config).with_max_model_len(max_model_len)
    with torch.device("meta"):
        return ModelRegistry.resolve(hf_config.architectures)(hf_config, dtype=torch.float32)
