"""Gemma 2: Llama's shape with norms before and after each block, soft-capped scores and logits, every other layer
windowed, and embeddings scaled by the square root of their size."""

from typing import Any, ClassVar

import torch

from mini_vllm.exceptions import CheckpointError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.embedding import VocabParallelEmbedding
from mini_vllm.layers.logits import LogitsProcessor
from mini_vllm.layers.norm import GemmaRMSNorm
from mini_vllm.models.llama import CosSin, LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from mini_vllm.models.utils import layer_types
from mini_vllm.quantization.base import QuantizationConfig


def layer_type(config: HFConfig, layer: int) -> str:
    """`layer_types` if given; else every `sliding_window_pattern`-th layer sees everything."""
    types = layer_types(config)
    if types is not None:
        return types[layer]
    return "sliding_attention" if (layer + 1) % config.integer("sliding_window_pattern") else "full_attention"


def layer_window(config: HFConfig, layer: int) -> int | None:
    """The sliding window of one layer. Raises `CheckpointError` for a windowed layer without one."""
    if layer_type(config, layer) == "full_attention":
        return None
    if config.sliding_window is None:
        raise CheckpointError("config.json: sliding_window must be given for layers of type sliding_attention")
    return config.sliding_window


class ScaledEmbedding(VocabParallelEmbedding):
    """Rows times sqrt(embedding_dim), a factor that is rounded to the model's type, as it was in training."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype=dtype, **kwargs)
        self.scale = torch.tensor(embedding_dim**0.5, dtype=dtype, device="cpu").item()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.look_up(token_ids, self.scale)


class Gemma2DecoderLayer(LlamaDecoderLayer):
    """Each block between two norms, of which the second comes before the residual sum."""

    attention_class: ClassVar[type[LlamaAttention]] = LlamaAttention

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__(config, dtype=dtype, quant_config=quant_config, prefix=prefix)
        self.pre_feedforward_layernorm = self.make_norm(config, dtype)
        self.post_feedforward_layernorm = self.make_norm(config, dtype)

    @staticmethod
    def make_norm(config: HFConfig, dtype: torch.dtype) -> GemmaRMSNorm:
        return GemmaRMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)

    def make_attention(
        self, config: HFConfig, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> LlamaAttention:
        return self.attention_class(
            config, qkv_bias=config.attention_bias, o_bias=config.attention_bias,
            sliding_window=layer_window(config, int(prefix.split(".")[-2])),
            scale=config.number("query_pre_attn_scalar") ** -0.5,
            logit_softcap=config.optional_number("attn_logit_softcapping"),
            dtype=dtype, quant_config=quant_config, prefix=prefix,
        )  # fmt: skip

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, cos_sin: CosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden, _ = self.post_attention_layernorm(self.self_attn(hidden, cos_sin))
        hidden, residual = self.pre_feedforward_layernorm(hidden, residual)
        hidden, _ = self.post_feedforward_layernorm(self.mlp(hidden))
        return hidden, residual


class Gemma2Model(LlamaModel):
    """See `LlamaModel`."""

    embedding_class: ClassVar[type[VocabParallelEmbedding]] = ScaledEmbedding


class Gemma2ForCausalLM(LlamaForCausalLM):
    """See `LlamaForCausalLM`. `embed_input_ids` gives scaled rows, which is what `inputs_embeds` is taken for."""

    model_class: ClassVar[type[LlamaModel]] = Gemma2Model
    layer_class: ClassVar[type[LlamaDecoderLayer]] = Gemma2DecoderLayer
    unsupported_options: ClassVar[tuple[str, ...]] = ("use_bidirectional_attention",)

    def __init__(self, hf_config: HFConfig, **kwargs: Any) -> None:
        super().__init__(hf_config, **kwargs)
        self.logits_processor = LogitsProcessor(soft_cap=hf_config.optional_number("final_logit_softcapping"))
