"""Qwen3 (dense): Qwen2's layers without the biases, with a root-mean-square norm on each query and key head."""

from typing import Any, ClassVar

import torch

from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.norm import RMSNorm
from mini_vllm.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from mini_vllm.models.qwen2 import layer_window
from mini_vllm.ops.norm import rms_norm_heads
from mini_vllm.quantization.base import QuantizationConfig


class Qwen3Attention(LlamaAttention):
    """Heads are normalised before they are turned; one weight over `head_dim` for all queries, one for all keys."""

    norm_class: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, config: HFConfig, *, dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(config, dtype=dtype, **kwargs)
        self.q_norm = self.norm_class(config.head_dim, config.rms_norm_eps, dtype=dtype)
        self.k_norm = self.norm_class(config.head_dim, config.rms_norm_eps, dtype=dtype)

    def prepare_heads(self, heads: torch.Tensor) -> torch.Tensor:
        query, key = self.q_norm, self.k_norm
        return rms_norm_heads(heads, query.weight, key.weight, self.qkv_proj.num_heads, query.eps)


class Qwen3DecoderLayer(LlamaDecoderLayer):
    """A Llama layer with Qwen3's attention, windowed in some layers if the config says so."""

    def make_attention(
        self, config: HFConfig, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> LlamaAttention:
        return Qwen3Attention(
            config, qkv_bias=config.attention_bias, o_bias=config.attention_bias,
            sliding_window=layer_window(config, int(prefix.split(".")[-2])),
            dtype=dtype, quant_config=quant_config, prefix=prefix,
        )  # fmt: skip


class Qwen3ForCausalLM(LlamaForCausalLM):
    """See `LlamaForCausalLM`."""

    layer_class: ClassVar[type[LlamaDecoderLayer]] = Qwen3DecoderLayer
    unsupported_options: ClassVar[tuple[str, ...]] = ("mlp_bias",)
