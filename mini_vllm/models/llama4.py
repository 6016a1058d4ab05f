"""Llama 4's text model where it is dense: some layers without rotation, weightless head norms, attention in chunks.

Layers that turn their heads attend within chunks of `attention_chunk_size` tokens. That is the same as full attention
for requests no longer than a chunk, and longer ones are refused. Layers that do not turn them see everything, and
sharpen queries by their position. Layers with experts are refused: the published models all have some.
"""

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.rotary import RotaryEmbedding, apply_rotary
from mini_vllm.models.llama import (
    CosSin,
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
)
from mini_vllm.quantization.base import QuantizationConfig


def layers_with_rotation(config: HFConfig) -> list[bool]:
    """Per layer, whether heads are turned: `no_rope_layers`, where 1 means that they are, or all but every n-th."""
    given = config.raw.get("no_rope_layers")
    if not given:
        interval = config.integer("no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in range(config.num_hidden_layers)]
    if not isinstance(given, list) or len(given) != config.num_hidden_layers:
        raise CheckpointError(f"config.json: no_rope_layers must have a 0 or 1 for each layer, got {given!r}")
    return [bool(turns) for turns in given]


def refuse_what_is_not_dense(config: HFConfig) -> None:
    """Raise `UnsupportedModelError` for layers with experts, and for requests longer than an attention chunk."""
    step, count = config.integer("interleave_moe_layer_step"), config.num_hidden_layers
    listed = config.raw.get("moe_layers")
    layers = [*range(step - 1, count, step)] if listed is None else listed
    if layers:
        raise UnsupportedModelError(f"config.json: moe_layers: layers with experts are not supported, got {layers!r}")
    chunk, limit = config.optional_number("attention_chunk_size"), config.rope.max_model_len
    longest = config.derived_max_model_len if limit is None else limit
    if chunk is not None and longest > chunk:
        raise UnsupportedModelError(
            f"config.json: attention_chunk_size={chunk:.0f}: attention within chunks is not supported, so requests of "
            f"{longest} tokens cannot be served; set max_model_len to at most {chunk:.0f}"
        )


class Llama4Rotary(RotaryEmbedding):
    """Beside cosines and sines, what queries of layers without rotation are multiplied by: [N, 1, 1], or None."""

    def __init__(self, config: HFConfig) -> None:
        super().__init__(config.head_dim, config.rope)
        self.tuned = config.boolean("attn_temperature_tuning")
        self.floor_scale, self.attn_scale = config.number("floor_scale"), config.number("attn_scale")

    def forward(self, positions: torch.Tensor) -> Any:
        cos_sin = super().forward(positions)
        if not self.tuned:
            return *cos_sin, None
        steps = torch.floor((positions.to(torch.float32) + 1) / self.floor_scale)
        return *cos_sin, (torch.log1p(steps) * self.attn_scale + 1)[:, None, None]


class Llama4Attention(LlamaAttention):
    """Turned and normalised heads, or queries that get sharper with their position."""

    def __init__(self, config: HFConfig, *, rotates: bool, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.rotates, self.eps = rotates, config.rms_norm_eps
        self.qk_norm = rotates and config.boolean("use_qk_norm")

    def forward(self, hidden: torch.Tensor, cos_sin: Any) -> torch.Tensor:
        cos, sin, sharpening = cos_sin
        query, key, value = self.qkv_proj(hidden).split([self.q_size, self.kv_size, self.kv_size], -1)
        query, key = (x.view(len(x), -1, self.head_dim) for x in (query, key))
        if self.rotates:
            query, key = (self._turn(x, (cos, sin)) for x in (query, key))
        elif sharpening is not None:
            query = (query * sharpening).to(query.dtype)
        output: torch.Tensor = self.o_proj(self.attn(query.flatten(1), key.flatten(1), value))
        return output

    def _turn(self, heads: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """Dimensions 2i and 2i + 1 are a pair here. Queries and keys are put in the order of halves, both alike, which
        leaves every score as it is."""
        halves = heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        turned = apply_rotary(halves, cos_sin)
        return F.rms_norm(turned, (self.head_dim,), eps=self.eps) if self.qk_norm else turned


class Llama4DecoderLayer(LlamaDecoderLayer):
    """A Llama layer whose feed-forward has another name and a size of its own."""

    def __init__(
        self, config: HFConfig, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__(config, dtype=dtype, quant_config=quant_config, prefix=prefix)
        del self.mlp
        dense = dataclasses.replace(config, intermediate_size=config.integer("intermediate_size_mlp"))
        self.feed_forward = LlamaMLP(dense, dtype=dtype, quant_config=quant_config, prefix=f"{prefix}.feed_forward")

    def make_attention(
        self, config: HFConfig, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str
    ) -> LlamaAttention:
        return Llama4Attention(
            config, rotates=layers_with_rotation(config)[int(prefix.split(".")[-2])],
            qkv_bias=config.attention_bias, o_bias=config.attention_bias,
            dtype=dtype, quant_config=quant_config, prefix=prefix,
        )  # fmt: skip

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, cos_sin: CosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, cos_sin)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.feed_forward(hidden), residual


class Llama4Model(LlamaModel):
    """See `LlamaModel`."""

    @staticmethod
    def make_rotary(config: HFConfig) -> Llama4Rotary:
        return Llama4Rotary(config)


class Llama4ForCausalLM(LlamaForCausalLM):
    """See `LlamaForCausalLM`."""

    model_class: ClassVar[type[LlamaModel]] = Llama4Model
    layer_class: ClassVar[type[LlamaDecoderLayer]] = Llama4DecoderLayer
    unsupported_options: ClassVar[tuple[str, ...]] = ("sliding_window", "mlp_bias", "layer_types")

    def __init__(self, hf_config: HFConfig, **kwargs: Any) -> None:
        refuse_what_is_not_dense(hf_config)
        super().__init__(hf_config, **kwargs)
