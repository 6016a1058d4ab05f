"""GPT-2: learned positions, layer norms before attention and feed-forward, every matrix stored as [input, output]."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.activation import get_act
from mini_vllm.layers.attention import Attention
from mini_vllm.layers.embedding import LearnedPositionEmbedding, VocabParallelEmbedding
from mini_vllm.layers.linear import ColumnParallelLinear, LoadedWeight, QKVParallelLinear, RowParallelLinear
from mini_vllm.layers.norm import LayerNorm
from mini_vllm.models.causal_lm import CausalLM
from mini_vllm.models.utils import (
    IntermediateTensors,
    expected_tensors,
    join_prefix,
    load_weights,
    make_layers,
)
from mini_vllm.quantization.base import QuantizationConfig

MASKS = (".attn.bias", ".attn.masked_bias")
"""Causal masks that old checkpoints carry along."""


def attention_scale(config: HFConfig, layer: int) -> float:
    """1 / sqrt(head_dim), over the layer's number as well where the config says so (Mistral's GPT-2 runs)."""
    scale = config.head_dim**-0.5 if config.boolean("scale_attn_weights") else 1.0
    return scale / (layer + 1) if config.boolean("scale_attn_by_inverse_layer_idx") else scale


class GPT2Attention(nn.Module):
    """Fused projection, paged attention, output projection."""

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        heads, head_dim, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
        self.c_attn = QKVParallelLinear(
            hidden, head_dim, heads, heads, bias=True,
            dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.c_attn",
        ).load_transposed()  # fmt: skip
        self.c_proj = RowParallelLinear(
            hidden, hidden, bias=True, dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.c_proj"
        ).load_transposed()
        heads, scale = self.c_attn.num_heads, attention_scale(config, int(prefix.split(".")[-2]))
        self.attn = Attention(heads, head_dim, scale, heads, dtype=dtype, prefix=f"{prefix}.attn")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.c_attn(hidden).chunk(3, -1)
        output: torch.Tensor = self.c_proj(self.attn(query, key, value))
        return output


class GPT2MLP(nn.Module):
    """c_proj(act(c_fc(x)))."""

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.c_fc = ColumnParallelLinear(
            hidden, inner, bias=True, dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.c_fc"
        ).load_transposed()
        self.c_proj = RowParallelLinear(
            inner, hidden, bias=True, dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.c_proj"
        ).load_transposed()
        self.act = get_act(config.hidden_act)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.c_proj(self.act(self.c_fc(hidden)))
        return output


class GPT2Block(nn.Module):
    """Norm, attention, norm, feed-forward, each pair added to the residual stream."""

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.number("layer_norm_epsilon")
        self.ln_1 = LayerNorm(hidden, eps, dtype=dtype)
        self.attn = GPT2Attention(config, dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.attn")
        self.ln_2 = LayerNorm(hidden, eps, dtype=dtype)
        self.mlp = GPT2MLP(config, dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.mlp")

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = self.ln_1(hidden, residual)
        hidden, residual = self.ln_2(self.attn(hidden), residual)
        return self.mlp(hidden), residual


class GPT2Model(nn.Module):
    """Embeddings of tokens and positions, blocks, final norm."""

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.wte = VocabParallelEmbedding(
            config.vocab_size, hidden, dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.wte"
        )
        self.wpe = LearnedPositionEmbedding(
            config.max_position_embeddings, hidden, max_model_len=config.rope.max_model_len, dtype=dtype
        )
        self.h = make_layers(
            config.num_hidden_layers,
            lambda prefix: GPT2Block(config, dtype=dtype, quant_config=quant_config, prefix=prefix),
            f"{prefix}.h",
        )
        self.ln_f = LayerNorm(hidden, config.number("layer_norm_epsilon"), dtype=dtype)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden: torch.Tensor
        residual: torch.Tensor | None = None
        if intermediate_tensors is not None:
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        else:
            hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
            hidden = hidden + self.wpe(positions)
        for block in self.h:
            hidden, residual = block(hidden, residual)
        hidden, _ = self.ln_f(hidden, residual)
        return hidden


class GPT2LMHeadModel(CausalLM):
    """A GPT-2 with its language-model head. Positions end where the table does: see `LearnedPositionEmbedding`."""

    unsupported_options: ClassVar[tuple[str, ...]] = ("add_cross_attention",)

    def __init__(
        self,
        hf_config: HFConfig,
        *,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(hf_config)
        self.transformer = GPT2Model(
            hf_config, dtype=dtype, quant_config=quant_config, prefix=join_prefix(prefix, "transformer")
        )
        self.add_head(hf_config.hidden_size, dtype=dtype, quant_config=quant_config, prefix=prefix)

    def body(self) -> GPT2Model:
        return self.transformer

    def embedding(self) -> VocabParallelEmbedding:
        return self.transformer.wte

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """Fill every parameter exactly once, under names with or without `transformer.` in front.

        Raises `CheckpointError` naming the tensors that do not fit.
        """
        slots = expected_tensors(self, self.packed_modules_mapping)
        aliases = {slot.removeprefix("transformer."): slot for slot in slots if slot.startswith("transformer.")}
        if self.config.tie_word_embeddings:
            aliases["lm_head.weight"] = "transformer.wte.weight"
        load_weights(self, weights, self.packed_modules_mapping, aliases=aliases, ignored_suffixes=MASKS)
