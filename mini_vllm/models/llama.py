"""Llama 2 and 3 and all that share their shape (TinyLlama, SmolLM): pre-norm decoder, rotary, grouped-query, SwiGLU."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.activation import get_act_and_mul
from mini_vllm.layers.attention import Attention
from mini_vllm.layers.embedding import VocabParallelEmbedding
from mini_vllm.layers.linear import LoadedWeight, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from mini_vllm.layers.norm import LayerNorm, RMSNorm
from mini_vllm.layers.rotary import RotaryEmbedding, apply_rotary
from mini_vllm.models.causal_lm import CausalLM
from mini_vllm.models.utils import IntermediateTensors, PackedModulesMapping, join_prefix, load_weights, make_layers
from mini_vllm.quantization.base import QuantizationConfig

CosSin = tuple[torch.Tensor, torch.Tensor]


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [config.intermediate_size] * 2, bias=config.mlp_bias,
            dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj",
        )  # fmt: skip
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=config.mlp_bias,
            dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.down_proj",
        )  # fmt: skip
        self.act_fn = get_act_and_mul(config.hidden_act)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(self.act_fn(self.gate_up_proj(hidden)))
        return output


class LlamaAttention(nn.Module):
    """Fused projection, rotary on queries and keys, paged attention, output projection.

    scale: what scores are multiplied by; None is 1 / sqrt(head_dim). logit_softcap: see `Attention`.
    """

    def __init__(
        self,
        config: HFConfig,
        *,
        qkv_bias: bool,
        o_bias: bool,
        sliding_window: int | None = None,
        scale: float | None = None,
        logit_softcap: float | None = None,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, self.head_dim, config.num_attention_heads, config.num_key_value_heads, bias=qkv_bias,
            dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim, config.hidden_size, bias=o_bias,
            dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.o_proj",
        )  # fmt: skip
        self.q_size, self.kv_size = self.qkv_proj.q_size, self.qkv_proj.kv_size
        self.attn = Attention(
            self.qkv_proj.num_heads, self.head_dim, scale or self.head_dim**-0.5, self.qkv_proj.num_kv_heads,
            sliding_window=sliding_window, logit_softcap=logit_softcap, dtype=dtype, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, hidden: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        qk, value = self.qkv_proj(hidden).split([self.q_size + self.kv_size, self.kv_size], -1)
        heads = self.prepare_heads(qk.view(len(qk), -1, self.head_dim))
        qk = apply_rotary(heads, cos_sin).view(len(qk), -1)
        query, key = qk.split([self.q_size, self.kv_size], -1)
        output: torch.Tensor = self.o_proj(self.attn(query, key, value))
        return output

    def prepare_heads(self, heads: torch.Tensor) -> torch.Tensor:
        """What happens to query and key heads [N, Hq + Hkv, D] before they are turned; here nothing."""
        return heads


class LlamaDecoderLayer(nn.Module):
    """Norm, attention, norm, feed-forward; the residual stream travels beside."""

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.self_attn = self.make_attention(config, dtype, quant_config, f"{prefix}.self_attn")
        self.mlp = LlamaMLP(config, dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.mlp")
        self.input_layernorm = self.make_norm(config, dtype)
        self.post_attention_layernorm = self.make_norm(config, dtype)

    @staticmethod
    def make_norm(config: HFConfig, dtype: torch.dtype) -> RMSNorm | LayerNorm:
        """A norm of the residual stream; the model's last one is made here too."""
        return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)

    def make_attention(
        self, config: HFConfig, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> LlamaAttention:
        bias = config.attention_bias
        return LlamaAttention(config, qkv_bias=bias, o_bias=bias, dtype=dtype, quant_config=quant_config, prefix=prefix)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, cos_sin: CosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, cos_sin)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class LlamaModel(nn.Module):
    """Embedding, decoder layers, final norm."""

    embedding_class: ClassVar[type[VocabParallelEmbedding]] = VocabParallelEmbedding

    def __init__(
        self,
        config: HFConfig,
        layer_class: type[LlamaDecoderLayer],
        *,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.embed_tokens = self.embedding_class(
            config.vocab_size, config.hidden_size,
            dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.embed_tokens",
        )  # fmt: skip
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: layer_class(config, dtype=dtype, quant_config=quant_config, prefix=prefix),
            f"{prefix}.layers",
        )
        self.rotary_emb = self.make_rotary(config)
        self.norm = layer_class.make_norm(config, dtype)

    @staticmethod
    def make_rotary(config: HFConfig) -> nn.Module:
        """Positions [N] -> what every layer is handed to turn its heads by."""
        return RotaryEmbedding(config.head_dim, config.rope)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden: torch.Tensor
        residual: torch.Tensor | None = None
        if intermediate_tensors is not None:
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        else:
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cos_sin = self.rotary_emb(positions)
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, cos_sin)
        hidden, _ = self.norm(hidden, residual)
        return hidden


class LlamaForCausalLM(CausalLM):
    """A Llama with its language-model head. See `LlamaModel`; every family of this shape derives from here."""

    packed_modules_mapping: ClassVar[PackedModulesMapping] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    model_class: ClassVar[type[LlamaModel]] = LlamaModel
    layer_class: ClassVar[type[LlamaDecoderLayer]] = LlamaDecoderLayer
    unsupported_options: ClassVar[tuple[str, ...]] = ("sliding_window",)

    def __init__(
        self,
        hf_config: HFConfig,
        *,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(hf_config)
        self.model = self.model_class(
            hf_config, self.layer_class, dtype=dtype, quant_config=quant_config, prefix=join_prefix(prefix, "model")
        )
        self.add_head(hf_config.hidden_size, dtype=dtype, quant_config=quant_config, prefix=prefix)

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """Fill every parameter exactly once. Raises `CheckpointError` naming the tensors that do not fit."""
        aliases = {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}
        load_weights(
            self, weights, self.packed_modules_mapping, aliases=aliases, ignored_suffixes=(".rotary_emb.inv_freq",)
        )
