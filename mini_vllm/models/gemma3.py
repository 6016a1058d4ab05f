"""Gemma 3, the text model: Gemma 2's layers with a norm on each query and key head instead of soft-capped scores.

Five of six layers see a sliding window and turn their heads by frequencies of their own; every sixth sees all.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from mini_vllm.exceptions import CheckpointError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.norm import GemmaRMSNorm, RMSNorm
from mini_vllm.layers.rotary import RotaryEmbedding
from mini_vllm.models.gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM, Gemma2Model, layer_type
from mini_vllm.models.llama import CosSin, LlamaAttention, LlamaDecoderLayer, LlamaModel
from mini_vllm.models.qwen3 import Qwen3Attention
from mini_vllm.quantization.base import QuantizationConfig


class Gemma3Attention(Qwen3Attention):
    """See `Qwen3Attention`; the norms are Gemma's."""

    norm_class: ClassVar[type[RMSNorm]] = GemmaRMSNorm


class RotaryPerLayerType(nn.Module):
    """positions [N] -> cosines and sines for each type of layer, by its name."""

    def __init__(self, config: HFConfig) -> None:
        super().__init__()
        if config.local_rope is None:
            raise CheckpointError(f"config.json: model_type {config.model_type!r} has no frequencies of local layers")
        ropes = {"full_attention": config.rope, "sliding_attention": config.local_rope}
        self.rotary = nn.ModuleDict({name: RotaryEmbedding(config.head_dim, rope) for name, rope in ropes.items()})

    def forward(self, positions: torch.Tensor) -> dict[str, CosSin]:
        return {name: rotary(positions) for name, rotary in self.rotary.items()}


class Gemma3DecoderLayer(Gemma2DecoderLayer):
    """A Gemma 2 layer that picks the cosines and sines of its type."""

    attention_class: ClassVar[type[LlamaAttention]] = Gemma3Attention

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__(config, dtype=dtype, quant_config=quant_config, prefix=prefix)
        self.layer_type = layer_type(config, int(prefix.split(".")[-1]))

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, residual: torch.Tensor | None, cos_sin: Mapping[str, CosSin]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(hidden, residual, cos_sin[self.layer_type])


class Gemma3Model(Gemma2Model):
    """See `LlamaModel`."""

    @staticmethod
    def make_rotary(config: HFConfig) -> nn.Module:
        return RotaryPerLayerType(config)


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """See `Gemma2ForCausalLM`."""

    model_class: ClassVar[type[LlamaModel]] = Gemma3Model
    layer_class: ClassVar[type[LlamaDecoderLayer]] = Gemma3DecoderLayer
    unsupported_options: ClassVar[tuple[str, ...]] = ("use_bidirectional_attention", "attn_logit_softcapping")
