"""Mistral (7B v0.1 to Nemo and Small): Llama's shape, where in every layer a token may see only a sliding window."""

from typing import ClassVar

import torch

from mini_vllm.hf_config import HFConfig
from mini_vllm.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from mini_vllm.quantization.base import QuantizationConfig


class MistralDecoderLayer(LlamaDecoderLayer):
    """A Llama layer without biases and with the config's window; `sliding_window: null` is none."""

    def make_attention(
        self, config: HFConfig, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> LlamaAttention:
        return LlamaAttention(
            config, qkv_bias=False, o_bias=False, sliding_window=config.sliding_window,
            dtype=dtype, quant_config=quant_config, prefix=prefix,
        )  # fmt: skip


class MistralForCausalLM(LlamaForCausalLM):
    """See `LlamaForCausalLM`."""

    layer_class: ClassVar[type[LlamaDecoderLayer]] = MistralDecoderLayer
    unsupported_options: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias", "layer_types")
