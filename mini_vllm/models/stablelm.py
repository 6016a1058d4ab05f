"""StableLM (3B, Zephyr, 2-1.6B, 2-12B): Llama's shape with layer norms and only part of each head turned.

The 12B model normalises every head by weights of its own (`qk_layernorm`) and runs attention and feed-forward side by
side (`use_parallel_residual`).
"""

from typing import Any, ClassVar

import torch

from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.norm import LayerNorm, PerHeadLayerNorm, RMSNorm
from mini_vllm.models.llama import CosSin, LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from mini_vllm.models.utils import PackedModulesMapping
from mini_vllm.quantization.base import QuantizationConfig


class StableLmAttention(LlamaAttention):
    """Llama's attention with a norm per head where the config asks for it."""

    def __init__(self, config: HFConfig, *, dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(config, dtype=dtype, **kwargs)
        self.qk_layernorm = config.boolean("qk_layernorm")
        if not self.qk_layernorm:
            return
        qkv, rank, eps = self.qkv_proj, self.qkv_proj.tp_group.rank, config.number("layer_norm_eps")
        first_key = rank // qkv.num_kv_head_replicas * qkv.num_kv_heads
        self.q_layernorm = PerHeadLayerNorm(
            config.num_attention_heads, qkv.num_heads, rank * qkv.num_heads, config.head_dim, eps, dtype=dtype
        )
        self.k_layernorm = PerHeadLayerNorm(
            config.num_key_value_heads, qkv.num_kv_heads, first_key, config.head_dim, eps, dtype=dtype
        )

    def prepare_heads(self, heads: torch.Tensor) -> torch.Tensor:
        if not self.qk_layernorm:
            return heads
        query, key = heads.split([self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads], 1)
        return torch.cat((self.q_layernorm(query), self.k_layernorm(key)), 1)


class StableLmDecoderLayer(LlamaDecoderLayer):
    """Layer norm, attention, layer norm, feed-forward; or one norm and both of them side by side."""

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__(config, dtype=dtype, quant_config=quant_config, prefix=prefix)
        self.parallel = config.boolean("use_parallel_residual")
        if self.parallel:
            del self.post_attention_layernorm

    @staticmethod
    def make_norm(config: HFConfig, dtype: torch.dtype) -> RMSNorm | LayerNorm:
        return LayerNorm(config.hidden_size, config.number("layer_norm_eps"), dtype=dtype)

    def make_attention(
        self, config: HFConfig, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> LlamaAttention:
        return StableLmAttention(
            config, qkv_bias=config.boolean("use_qkv_bias"), o_bias=False,
            dtype=dtype, quant_config=quant_config, prefix=prefix,
        )  # fmt: skip

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, cos_sin: CosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.parallel:
            return super().forward(hidden, residual, cos_sin)
        hidden, residual = self.input_layernorm(hidden, residual)
        return self.self_attn(hidden, cos_sin) + self.mlp(hidden), residual


class StableLmForCausalLM(LlamaForCausalLM):
    """See `LlamaForCausalLM`."""

    layer_class: ClassVar[type[LlamaDecoderLayer]] = StableLmDecoderLayer
    unsupported_options: ClassVar[tuple[str, ...]] = ("sliding_window", "attention_bias", "mlp_bias")

    def __init__(self, hf_config: HFConfig, **kwargs: Any) -> None:
        super().__init__(hf_config, **kwargs)
        self.packed_modules_mapping: PackedModulesMapping = {  # type: ignore[misc]
            **LlamaForCausalLM.packed_modules_mapping,
            "q_layernorm": _per_head("q_layernorm", hf_config.num_attention_heads),
            "k_layernorm": _per_head("k_layernorm", hf_config.num_key_value_heads),
        }


def _per_head(module: str, heads: int) -> tuple[str, ...]:
    return tuple(f"{module}.norms.{head}" for head in range(heads))
