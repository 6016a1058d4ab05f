"""From the keys of a config.json to a `ModelGeometry`.

The same look-ups the engine uses (`hf_config`), but more families: the planner needs sizes, not an implementation, so
mixtures of experts, MLA and state-space layers are understood although nothing here runs them. What a family calls
differently or leaves out comes from `hf_config.defaults`. Parameters are counted matrix by matrix.
"""

from collections.abc import Mapping
from typing import Any

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config.reader import ConfigReader
from mini_vllm.simulator.planner.geometry import KVLayers, Linear, ModelGeometry, Parameters

_TWO_MATRIX_MLP = {"gpt2", "opt"}
_ALL_BIASES = {"gpt2", "opt"}
_LAYER_NORM_BIAS = {"gpt2", "opt", "stablelm"}
_QKV_BIAS = {"qwen2", "qwen2_moe"}
_QK_NORM = {"qwen3", "qwen3_moe", "gemma3_text"}
_FOUR_NORMS = {"gemma2", "gemma3_text"}
_POSITION_OFFSET = {"gpt2": 0, "opt": 2}
"""Learned positions, and rows of their table that no position uses."""
_REFUSED = {"mamba", "mamba2", "rwkv", "t5", "bert", "whisper"}


def geometry_from_config(config: Mapping[str, Any], name: str) -> ModelGeometry:
    """The geometry a parsed config.json describes. Raises `CheckpointError`, `UnsupportedModelError`."""
    if isinstance(config.get("text_config"), dict) and config.get("num_attention_heads") is None:
        config = {
            "torch_dtype": config.get("torch_dtype"),
            **config["text_config"],
        }  # the language model of several parts
    read = ConfigReader(config)
    if read.model_type in _REFUSED:
        raise UnsupportedModelError(f"config.json: model_type {read.model_type!r} is no decoder with a KV cache")
    return _Reader(read, name).geometry()


class _Reader:
    """One config, read part by part."""

    def __init__(self, read: ConfigReader, name: str) -> None:
        self.read, self.name, self.family = read, name, read.model_type
        self.hidden = read.integer("hidden_size")
        self.layers = read.integer("num_hidden_layers")
        self.heads = read.integer("num_attention_heads")
        self.kv_heads = read.kv_heads(self.heads)
        self.head_dim = read.head_dim(self.heads)
        self.vocab = read.integer("vocab_size")
        self.inter = read.intermediate_size()
        self.is_mla = read.optional_integer("kv_lora_rank", 1) is not None
        self.moe_layers = self._moe_layers()
        self.mamba_layers = self._mamba_layers()

    def geometry(self) -> ModelGeometry:
        read = self.read
        return ModelGeometry(
            name=self.name,
            num_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.inter,
            vocab_size=self.vocab,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            kv_layers=self._kv_layers(),
            parameters=self._parameters(),
            linears=self._linears(),
            max_model_len=read.optional_integer("max_position_embeddings", 1),
            dtype=read.dtype() or "bfloat16",
            tied_embeddings=read.boolean("tie_word_embeddings"),
            num_experts=self._experts() if self.moe_layers else 0,
            experts_per_token=self._experts_per_token() if self.moe_layers else 0,
            num_moe_layers=self.moe_layers,
        )

    # -- which layers are of which kind ------------------------------------------------------------------

    def _experts(self) -> int:
        for key in ("n_routed_experts", "num_local_experts", "num_experts"):
            value = self.read.optional_integer(key, 1)
            if value is not None:
                return value
        return 0

    def _experts_per_token(self) -> int:
        experts, chosen = self._experts(), self.read.integer("num_experts_per_tok")
        if chosen > experts:
            raise self.read.fail("num_experts_per_tok", f"{chosen} is more than the {experts} experts there are")
        return chosen

    def _moe_layers(self) -> int:
        if self._experts() <= 1:
            return 0
        dense = self.read.optional_integer("first_k_dense_replace", 0) or 0
        period = self.read.optional_integer("expert_layer_period", 1) or 1
        offset = self.read.optional_integer("expert_layer_offset", 0) or 0
        return sum(layer >= dense and layer % period == offset % period for layer in range(self.layers))

    def _mamba_layers(self) -> int:
        period = self.read.optional_integer("attn_layer_period", 1)
        if period is None:
            return 0
        offset = self.read.optional_integer("attn_layer_offset", 0) or 0
        return sum(layer % period != offset for layer in range(self.layers))

    def _windows(self) -> list[int | None]:
        """The window of each layer with attention; None is full attention."""
        window, count = self.read.optional_integer("sliding_window", 1), self.layers - self.mamba_layers
        types = self.read.d.get("layer_types")
        if window is None or (self.family.startswith("qwen") and not self.read.boolean("use_sliding_window")):
            return [None] * count
        if isinstance(types, list):
            if len(types) != count:
                raise CheckpointError(f"config.json: layer_types has {len(types)} entries for {count} layers")
            return [window if kind == "sliding_attention" else None for kind in types]
        if self.family.startswith("qwen"):
            full = self.read.integer("max_window_layers", count, minimum=0)
            return [window if layer >= full else None for layer in range(count)]
        pattern = self.read.optional_integer("sliding_window_pattern", 1)
        if pattern is None:
            return [window] * count
        return [None if (layer + 1) % pattern == 0 else window for layer in range(count)]

    def _kv_layers(self) -> tuple[KVLayers, ...]:
        groups: list[KVLayers] = []
        if self.is_mla:
            latent = self.read.integer("kv_lora_rank") + self.read.integer("qk_rope_head_dim")
            return (KVLayers("mla", self.layers, latent, replicated=True),)
        windows, elements = self._windows(), 2 * self.kv_heads * self.head_dim
        for window in sorted(set(windows), key=lambda w: (w is not None, w or 0)):
            kind = "full" if window is None else "sliding_window"
            groups.append(KVLayers(kind, windows.count(window), elements, window))
        if self.mamba_layers:
            inner, state, conv = self._mamba_sizes()
            groups.append(KVLayers("mamba", self.mamba_layers, 0, state_elements=inner * (state + conv)))
        return tuple(groups)

    # -- parameters --------------------------------------------------------------------------------------

    def _linears(self) -> tuple[Linear, ...]:
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [("q_proj", self.hidden, q_size), ("k_proj", self.hidden, kv_size)]
        attention += [("v_proj", self.hidden, kv_size), ("o_proj", q_size, self.hidden)]
        mlp = [("up_proj", self.hidden, self.inter), ("down_proj", self.inter, self.hidden)]
        if self.family not in _TWO_MATRIX_MLP:
            mlp.insert(0, ("gate_proj", self.hidden, self.inter))
        return tuple(Linear(*shape) for shape in attention + mlp)

    def _attention(self) -> tuple[int, int]:
        """(in matrices, in biases and norms) of one layer's attention."""
        if self.is_mla:
            return self._mla_attention()
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = self.hidden * (2 * q_size + 2 * kv_size)
        every_bias = self.family in _ALL_BIASES or self.read.boolean("attention_bias")
        other = q_size + 2 * kv_size if every_bias or self.family in _QKV_BIAS else 0
        other += self.hidden if every_bias and self.family not in _QKV_BIAS else 0
        return matrices, other + (2 * self.head_dim if self.family in _QK_NORM else 0)

    def _mla_attention(self) -> tuple[int, int]:
        """DeepSeek's: queries and keys from low-rank latents (DeepSeek-V2, 2024, section 2.1)."""
        read = self.read
        nope, rope = read.integer("qk_nope_head_dim"), read.integer("qk_rope_head_dim")
        value, rank = read.integer("v_head_dim"), read.integer("kv_lora_rank")
        q_rank = read.optional_integer("q_lora_rank", 1)
        q_out = self.heads * (nope + rope)
        q = self.hidden * q_out if q_rank is None else self.hidden * q_rank + q_rank * q_out
        kv = self.hidden * (rank + rope) + rank * self.heads * (nope + value)
        return q + kv + self.heads * value * self.hidden, rank + (q_rank or 0)

    def _mlp(self, inter: int) -> tuple[int, int]:
        matrices = 2 if self.family in _TWO_MATRIX_MLP else 3
        biased = self.family in _ALL_BIASES or self.read.boolean("mlp_bias")
        return matrices * self.hidden * inter, (matrices - 1) * inter + self.hidden if biased else 0

    def _expert_inter(self) -> int:
        return self.read.optional_integer("moe_intermediate_size", 1) or self.inter

    def _mamba_sizes(self) -> tuple[int, int, int]:
        """(inner width, state per channel, width of the convolution)."""
        inner = self.hidden * self.read.integer("mamba_expand", 2)
        return inner, self.read.integer("mamba_d_state", 16), self.read.integer("mamba_d_conv", 4)

    def _mamba(self) -> int:
        """One selective state-space layer (Gu & Dao, 2023), with the three inner norms Jamba adds."""
        inner, state, conv = self._mamba_sizes()
        rank = self.read.optional_integer("mamba_dt_rank", 1) or -(-self.hidden // 16)
        projections = self.hidden * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * self.hidden
        return projections + inner * (conv + 1) + inner + inner * state + inner + rank + 2 * state

    def _norms(self) -> int:
        per_layer = (4 if self.family in _FOUR_NORMS else 2) * self.hidden
        return (self.layers * per_layer + self.hidden) * (2 if self.family in _LAYER_NORM_BIAS else 1)

    def _shared_expert(self) -> int:
        count = self.read.optional_integer("n_shared_experts", 0) or 0
        own = self.read.optional_integer("shared_expert_intermediate_size", 1)
        if own is not None:
            return 3 * self.hidden * own + self.hidden  # and the gate that weighs it
        return 3 * self.hidden * count * self._expert_inter()

    def _parameters(self) -> Parameters:
        attention, attention_other = self._attention()
        mlp, mlp_other = self._mlp(self.inter)
        with_attention, dense = self.layers - self.mamba_layers, self.layers - self.moe_layers
        experts = self._experts() if self.moe_layers else 0
        scored_by_bias = experts if self.read.d.get("topk_method") == "noaux_tc" else 0
        positions = 0
        if self.family in _POSITION_OFFSET:
            rows = self.read.integer("max_position_embeddings") + _POSITION_OFFSET[self.family]
            positions = rows * self.hidden
        return Parameters(
            embedding=self.vocab * self.hidden,
            lm_head=0 if self.read.boolean("tie_word_embeddings") else self.vocab * self.hidden,
            attention=with_attention * attention,
            mlp=dense * mlp,
            experts=self.moe_layers * experts * 3 * self.hidden * self._expert_inter(),
            shared_experts=self.moe_layers * self._shared_expert() if self.moe_layers else 0,
            router=self.moe_layers * experts * self.hidden,
            mamba=self.mamba_layers * self._mamba() if self.mamba_layers else 0,
            norms=self._norms()
            + with_attention * attention_other
            + dense * mlp_other
            + self.moe_layers * scored_by_bias,
            positions=positions,
        )
