"""OPT (and Galactica): learned positions, biases everywhere, layer norms and a plain feed-forward.

The 350m model puts its norms behind the residual sums and has embeddings narrower than its layers.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from mini_vllm.exceptions import UnsupportedModelError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.activation import get_act
from mini_vllm.layers.attention import Attention
from mini_vllm.layers.embedding import LearnedPositionEmbedding, VocabParallelEmbedding
from mini_vllm.layers.linear import ColumnParallelLinear, LoadedWeight, QKVParallelLinear, RowParallelLinear
from mini_vllm.layers.norm import LayerNorm
from mini_vllm.models.causal_lm import CausalLM
from mini_vllm.models.utils import (
    IntermediateTensors,
    PackedModulesMapping,
    expected_tensors,
    join_prefix,
    load_weights,
    make_layers,
)
from mini_vllm.quantization.base import QuantizationConfig

LAYER_NORM_EPS = 1e-5
POSITION_OFFSET = 2
"""The table begins with two rows that no position uses."""


class OPTAttention(nn.Module):
    """Fused projection, paged attention, output projection."""

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        heads, head_dim, bias = config.num_attention_heads, config.head_dim, config.boolean("enable_bias")
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, head_dim, heads, heads, bias=bias,
            dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.out_proj = RowParallelLinear(
            config.hidden_size, config.hidden_size, bias=bias,
            dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.out_proj",
        )  # fmt: skip
        heads = self.qkv_proj.num_heads
        self.attn = Attention(heads, head_dim, head_dim**-0.5, heads, dtype=dtype, prefix=f"{prefix}.attn")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv_proj(hidden).chunk(3, -1)
        output: torch.Tensor = self.out_proj(self.attn(query, key, value))
        return output


class OPTDecoderLayer(nn.Module):
    """Attention, then feed-forward, each with its residual sum and a norm before or after."""

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.norm_first, bias = config.boolean("do_layer_norm_before"), config.boolean("enable_bias")
        self.self_attn = OPTAttention(config, dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.self_attn")
        self.self_attn_layer_norm = LayerNorm(config.hidden_size, LAYER_NORM_EPS, dtype=dtype)
        self.fc1 = ColumnParallelLinear(
            config.hidden_size, config.intermediate_size, bias=bias,
            dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.fc1",
        )  # fmt: skip
        self.fc2 = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=bias,
            dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.fc2",
        )  # fmt: skip
        self.activation_fn = get_act(config.hidden_act)
        self.final_layer_norm = LayerNorm(config.hidden_size, LAYER_NORM_EPS, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self._add(self.self_attn, self.self_attn_layer_norm, hidden)
        return self._add(self._feed_forward, self.final_layer_norm, hidden)

    def _add(
        self, block: Callable[[torch.Tensor], torch.Tensor], norm: LayerNorm, hidden: torch.Tensor
    ) -> torch.Tensor:
        if self.norm_first:
            return hidden + block(norm(hidden)[0])
        normed: torch.Tensor = norm(block(hidden), hidden)[0]
        return normed

    def _feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.fc2(self.activation_fn(self.fc1(hidden)))
        return output


class OPTDecoder(nn.Module):
    """Embeddings of tokens (widened if they are narrower) and positions, layers, final norm (then narrowed again)."""

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        hidden, width = config.hidden_size, embedding_width(config)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, width, dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.embed_tokens"
        )
        self.embed_positions = LearnedPositionEmbedding(
            config.max_position_embeddings, hidden, offset=POSITION_OFFSET,
            max_model_len=config.rope.max_model_len, dtype=dtype,
        )  # fmt: skip
        self.project_in, self.project_out = None, None
        if width != hidden:
            self.project_in = ColumnParallelLinear(
                width, hidden, gather_output=True,
                dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.project_in",
            )  # fmt: skip
            self.project_out = ColumnParallelLinear(
                hidden, width, gather_output=True,
                dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.project_out",
            )  # fmt: skip
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: OPTDecoderLayer(config, dtype=dtype, quant_config=quant_config, prefix=prefix),
            f"{prefix}.layers",
        )
        has_norm = config.boolean("do_layer_norm_before") and not config.boolean("_remove_final_layer_norm")
        self.final_layer_norm = LayerNorm(hidden, LAYER_NORM_EPS, dtype=dtype) if has_norm else None

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        if intermediate_tensors is not None:
            hidden = intermediate_tensors["hidden_states"]
        else:
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            hidden = hidden if self.project_in is None else self.project_in(hidden)
            hidden = hidden + self.embed_positions(positions)
        for layer in self.layers:
            hidden = layer(hidden)
        if self.final_layer_norm is not None:
            hidden, _ = self.final_layer_norm(hidden)
        return hidden if self.project_out is None else self.project_out(hidden)


def embedding_width(config: HFConfig) -> int:
    return config.integer("word_embed_proj_dim", config.hidden_size)


class OPTForCausalLM(CausalLM):
    """An OPT with its language-model head. Positions end where the table does: see `LearnedPositionEmbedding`."""

    packed_modules_mapping: ClassVar[PackedModulesMapping] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(
        self,
        hf_config: HFConfig,
        *,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(hf_config)
        if not hf_config.boolean("layer_norm_elementwise_affine"):
            raise UnsupportedModelError("config.json: layer_norm_elementwise_affine=False is not supported for 'opt'")
        decoder = OPTDecoder(
            hf_config, dtype=dtype, quant_config=quant_config, prefix=join_prefix(prefix, "model.decoder")
        )
        self.model = nn.ModuleDict({"decoder": decoder})
        self.add_head(embedding_width(hf_config), dtype=dtype, quant_config=quant_config, prefix=prefix)

    def body(self) -> Any:
        return self.model["decoder"]

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """Fill every parameter exactly once, under names with or without `model.` in front (opt-350m has none).

        Raises `CheckpointError` naming the tensors that do not fit.
        """
        slots = expected_tensors(self, self.packed_modules_mapping)
        aliases = {slot.removeprefix("model."): slot for slot in slots if slot.startswith("model.")}
        if self.config.tie_word_embeddings:
            aliases["lm_head.weight"] = "model.decoder.embed_tokens.weight"
        load_weights(self, weights, self.packed_modules_mapping, aliases=aliases)
