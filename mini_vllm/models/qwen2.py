"""Qwen2 and Qwen2.5: Llama's shape with biases on query, key and value, and a sliding window in some layers."""

from typing import ClassVar

import torch

from mini_vllm.exceptions import CheckpointError
from mini_vllm.hf_config import HFConfig
from mini_vllm.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from mini_vllm.models.utils import layer_types
from mini_vllm.quantization.base import QuantizationConfig

DEFAULT_MAX_WINDOW_LAYERS = 28


def layer_window(config: HFConfig, layer: int) -> int | None:
    """The sliding window of one layer: `layer_types` if given, else every layer from `max_window_layers` on."""
    raw = config.raw
    if not raw.get("use_sliding_window", False) or config.sliding_window is None:
        return None
    types = layer_types(config)
    if types is None:
        max_window_layers = raw.get("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS)
        if isinstance(max_window_layers, bool) or not isinstance(max_window_layers, int):
            raise CheckpointError(f"config.json: max_window_layers must be an integer, got {max_window_layers!r}")
        return config.sliding_window if layer >= max_window_layers else None
    return config.sliding_window if types[layer] == "sliding_attention" else None


class Qwen2DecoderLayer(LlamaDecoderLayer):
    """A Llama layer whose attention has biased projections and maybe a window."""

    def make_attention(
        self, config: HFConfig, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> LlamaAttention:
        layer = int(prefix.split(".")[-2])
        return LlamaAttention(
            config, qkv_bias=True, o_bias=False, sliding_window=layer_window(config, layer),
            dtype=dtype, quant_config=quant_config, prefix=prefix,
        )  # fmt: skip


class Qwen2ForCausalLM(LlamaForCausalLM):
    """See `LlamaForCausalLM`."""

    layer_class: ClassVar[type[LlamaDecoderLayer]] = Qwen2DecoderLayer
    unsupported_options: ClassVar[tuple[str, ...]] = ("mlp_bias",)
