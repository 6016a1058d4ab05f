"""What of a model decides its memory and speed: sizes of layers, kinds of cache, parameters by part.

A `ModelGeometry` comes from a config.json (`config.py`), from a preset or from raw dimensions, and holds numbers
alone. Cache kinds: `full` keeps K and V of every token, `sliding_window` those of the last W tokens, `mla` one latent
per token that all heads share, `mamba` a state per sequence that does not grow.
"""

from dataclasses import dataclass, replace

from mini_vllm.config import INT8_KV_CACHE_DTYPE, KV_CACHE_DTYPE_ALIASES
from mini_vllm.exceptions import ConfigError

KV_DTYPE_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "fp8_e4m3": 1.0,
    "fp8_e5m2": 1.0,
    INT8_KV_CACHE_DTYPE: 1.0,
}
"""Of a number, without the float32 scale that int8 has for every `head_dim` of them."""
WEIGHT_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class KVLayers:
    """Layers with the same cache. Elements are counted per layer, K and V (or the latent) together.

    elements_per_token: numbers stored per token; 0 for `mamba`. state_elements: per sequence, whatever its length.
    replicated: ranks of tensor parallelism hold copies instead of shares (the latent of MLA has no heads to split).
    """

    kind: str
    num_layers: int
    elements_per_token: int
    window: int | None = None
    state_elements: int = 0
    replicated: bool = False

    def tokens_kept(self, num_tokens: int) -> int:
        """Of a sequence of `num_tokens`, those whose entries a layer has to hold."""
        return num_tokens if self.window is None else min(num_tokens, self.window)


@dataclass(frozen=True)
class Parameters:
    """How many numbers each part of the model has, over all layers. `experts` are routed to, shared ones always run."""

    embedding: int = 0
    lm_head: int = 0
    """0 when it is the embedding."""
    attention: int = 0
    mlp: int = 0
    experts: int = 0
    shared_experts: int = 0
    router: int = 0
    mamba: int = 0
    norms: int = 0
    """Norms and whatever else is not multiplied with every token as a matrix, biases included."""
    positions: int = 0
    """Learned position embeddings: looked up, never multiplied."""

    @property
    def total(self) -> int:
        return self.linear + self.embedding + self.lm_head + self.norms + self.positions

    @property
    def linear(self) -> int:
        """In the matrices of the layers: what quantisation shrinks."""
        return self.attention + self.mlp + self.experts + self.shared_experts + self.router + self.mamba

    def as_dict(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if value}


@dataclass(frozen=True)
class Linear:
    """One matrix of a layer, as LoRA sees it: its name, and its sizes in and out."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class ModelGeometry:
    """Numbers about one model. linears: the matrices of one dense layer. max_model_len: the model's own limit."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_layers: tuple[KVLayers, ...]
    parameters: Parameters
    linears: tuple[Linear, ...]
    max_model_len: int | None
    dtype: str = "bfloat16"
    tied_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    num_moe_layers: int = 0

    # -- parameters --------------------------------------------------------------------------------------

    @property
    def num_parameters(self) -> int:
        return self.parameters.total

    @property
    def active_parameters(self) -> int:
        """Those that one token meets: of the routed experts only `experts_per_token`. Embedding rows count as read."""
        return self.num_parameters - self.parameters.experts + self.active_expert_parameters

    @property
    def active_expert_parameters(self) -> int:
        if self.num_experts == 0:
            return 0
        return self.parameters.experts * self.experts_per_token // self.num_experts

    @property
    def output_parameters(self) -> int:
        """The matrix that makes logits, tied or not."""
        return self.parameters.lm_head or self.parameters.embedding

    @property
    def matmul_parameters_per_token(self) -> int:
        """What a token is multiplied with in the layers."""
        return self.parameters.linear - self.parameters.experts + self.active_expert_parameters

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    def distinct_expert_share(self, num_tokens: int) -> float:
        """Expected share of the experts that `num_tokens` tokens reach together: 1 - (1 - k/E)^T.

        For tokens that choose independently and evenly; skewed routing reaches fewer.
        """
        if not self.is_moe:
            return 0.0
        return 1.0 - (1.0 - self.experts_per_token / self.num_experts) ** num_tokens

    # -- KV cache ----------------------------------------------------------------------------------------

    @property
    def kv_kind(self) -> str:
        """'MHA', 'GQA', 'MQA' or 'MLA', with what else is in the model."""
        if any(layers.kind == "mla" for layers in self.kv_layers):
            return "MLA"
        if self.num_kv_heads == self.num_heads:
            return "MHA"
        return "MQA" if self.num_kv_heads == 1 else "GQA"

    @property
    def is_hybrid(self) -> bool:
        """Whether layers differ in what they keep."""
        return len(self.kv_layers) > 1

    def kv_bytes_per_token(self, kv_dtype: str, tensor_parallel_size: int = 1) -> int:
        """Bytes a new token adds over all layers on one rank, as long as no window is full."""
        elements = sum(kind.num_layers * self._elements(kind, tensor_parallel_size) for kind in self.kv_layers)
        return round(elements * self.kv_dtype_bytes(kv_dtype))

    def kv_dtype_bytes(self, kv_dtype: str) -> float:
        """Bytes of one cached number, its share of a scale included. Raises `ConfigError`."""
        if KV_CACHE_DTYPE_ALIASES.get(kv_dtype, kv_dtype) != INT8_KV_CACHE_DTYPE:
            return dtype_bytes(kv_dtype)
        if any(layers.kind not in ("full", "sliding_window") for layers in self.kv_layers):
            raise ConfigError(f"kv_cache_dtype: {kv_dtype} is for keys and values of heads, which {self.name} lacks")
        return 1.0 + 4.0 / self.head_dim

    def kv_bytes_per_sequence(self, num_tokens: int, kv_dtype: str, tensor_parallel_size: int = 1) -> int:
        """Bytes a sequence needs on one rank: windows hold no more than their length, states do not grow."""
        elements = 0.0
        for layers in self.kv_layers:
            kept = layers.tokens_kept(num_tokens) * self._elements(layers, tensor_parallel_size)
            elements += layers.num_layers * (kept + layers.state_elements / tensor_parallel_size)
        return round(elements * self.kv_dtype_bytes(kv_dtype))

    def _elements(self, layers: KVLayers, tensor_parallel_size: int) -> float:
        """Of one layer and token on one rank. Heads are whole: with fewer KV heads than ranks they are copied."""
        if layers.replicated or tensor_parallel_size == 1:
            return layers.elements_per_token
        ranks = min(tensor_parallel_size, self.num_kv_heads)
        return layers.elements_per_token / ranks

    def with_parameters(self, num_parameters: int) -> "ModelGeometry":
        """The same shape said to have `num_parameters` in all, for round numbers such as '8B'.

        What the parts lack or have too much is taken to be in the matrices of the layers.
        """
        linear = num_parameters - (self.num_parameters - self.parameters.mlp)
        if linear < 0:
            raise ConfigError(
                f"num_parameters: {num_parameters:,} is less than the {self.num_parameters - self.parameters.mlp:,} "
                "that attention, embeddings and norms of these dimensions have"
            )
        return replace(self, parameters=replace(self.parameters, mlp=linear))


def dtype_bytes(kv_dtype: str) -> float:
    """Bytes of one cached number. Raises `ConfigError`."""
    kv_dtype = KV_CACHE_DTYPE_ALIASES.get(kv_dtype, kv_dtype)
    if kv_dtype not in KV_DTYPE_BYTES:
        raise ConfigError(f"kv_cache_dtype: must be one of auto, {', '.join(KV_DTYPE_BYTES)}, got {kv_dtype!r}")
    return KV_DTYPE_BYTES[kv_dtype]
