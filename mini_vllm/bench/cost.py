"""What a step has to move and compute, counted from the model's shape and the plan alone.

These are the least bytes and operations the step needs, not what an implementation happens to do: every weight is read
once, each request's keys and values are read once for all its tokens of the step, activations and logits stay in
cache. Achieved GB/s and GFLOP/s are these counts over the measured time, so a share of a ceiling is what is really used
of it, and waste (a second copy, padding, a recomputation) lowers it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mini_vllm.hf_config import HFConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_TWO_MATRIX_MLP = {"gpt2", "opt"}
_QKV_BIAS = {"qwen2"}
_QK_NORM = {"qwen3", "gemma3_text"}
_FOUR_NORMS = {"gemma2", "gemma3_text"}


@dataclass(frozen=True)
class ModelShape:
    """Sizes that decide the cost of a step. Parameters are counts, not bytes.

    matmul_parameters: of all layers, those every token is multiplied with. other_parameters: norms and biases.
    windows: (sliding window or None, number of layers that have it).
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    matmul_parameters: int
    other_parameters: int
    tied_embeddings: bool
    dtype: str
    windows: tuple[tuple[int | None, int], ...]

    @classmethod
    def from_config(
        cls, hf: HFConfig, dtype: str, windows: Sequence[tuple[int | None, int]] | None = None
    ) -> "ModelShape":
        """The shape of a dense decoder. windows: as the KV cache groups say; None means full attention everywhere."""
        layers = hf.num_hidden_layers
        per_layer_matmul, per_layer_other = _layer_parameters(hf)
        return cls(
            num_layers=layers,
            hidden_size=hf.hidden_size,
            vocab_size=hf.vocab_size,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=hf.head_dim,
            matmul_parameters=layers * per_layer_matmul,
            other_parameters=layers * per_layer_other + hf.hidden_size,  # and the norm before the logits
            tied_embeddings=hf.tie_word_embeddings,
            dtype=dtype,
            windows=((None, layers),) if windows is None else tuple(windows),
        )

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All of them; a tied embedding counts once."""
        copies = 1 if self.tied_embeddings else 2
        return self.matmul_parameters + self.other_parameters + copies * self.embedding_parameters

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.dtype_bytes

    @property
    def weight_bytes_per_decode_step(self) -> int:
        """Read by a step that samples: all layers and the output matrix, whatever the batch size."""
        return (self.matmul_parameters + self.other_parameters + self.embedding_parameters) * self.dtype_bytes

    @property
    def kv_bytes_per_token_and_layer(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token over all layers."""
        return self.num_layers * self.kv_bytes_per_token_and_layer


def _layer_parameters(hf: HFConfig) -> tuple[int, int]:
    """(in matrices, in norms and biases) of one layer."""
    hidden, inter = hf.hidden_size, hf.intermediate_size
    q_size, kv_size = hf.num_attention_heads * hf.head_dim, hf.num_key_value_heads * hf.head_dim
    mlp_matrices = 2 if hf.model_type in _TWO_MATRIX_MLP else 3
    matmul = hidden * (2 * q_size + 2 * kv_size) + mlp_matrices * hidden * inter
    other = hidden * (4 if hf.model_type in _FOUR_NORMS else 2)
    if hf.model_type in _QK_NORM:
        other += 2 * hf.head_dim
    if hf.attention_bias or hf.model_type in _QKV_BIAS:
        other += q_size + 2 * kv_size
    if hf.attention_bias and hf.model_type not in _QKV_BIAS:
        other += hidden
    if hf.mlp_bias:
        other += (mlp_matrices - 1) * inter + hidden
    return matmul, other


@dataclass(frozen=True)
class StepCost:
    """Bytes and floating-point operations; adds up over steps."""

    weight_bytes: int = 0
    kv_read_bytes: int = 0
    kv_write_bytes: int = 0
    matmul_flops: int = 0
    attention_flops: int = 0

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_read_bytes + self.kv_write_bytes

    @property
    def flops(self) -> int:
        return self.matmul_flops + self.attention_flops

    def __add__(self, other: "StepCost") -> "StepCost":
        return StepCost(
            self.weight_bytes + other.weight_bytes,
            self.kv_read_bytes + other.kv_read_bytes,
            self.kv_write_bytes + other.kv_write_bytes,
            self.matmul_flops + other.matmul_flops,
            self.attention_flops + other.attention_flops,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "weight_bytes": self.weight_bytes,
            "kv_read_bytes": self.kv_read_bytes,
            "kv_write_bytes": self.kv_write_bytes,
            "matmul_flops": self.matmul_flops,
            "attention_flops": self.attention_flops,
        }


def attended_pairs(start: int, count: int, window: int | None = None) -> int:
    """(query, key) pairs of `count` tokens from position `start`; that at position i sees min(i + 1, window) keys."""
    pairs = count * start + count * (count + 1) // 2
    if window is None or start + count <= window:
        return pairs
    first = max(start, window)  # the first query that the window hides keys from
    hidden_first, hidden_last = first + 1 - window, start + count - window
    return pairs - (hidden_first + hidden_last) * (hidden_last - hidden_first + 1) // 2


def attended_keys(start: int, count: int, window: int | None = None) -> int:
    """Keys that at least one of these queries sees."""
    return start + count if window is None else min(start + count, window + count - 1)


def step_cost(shape: ModelShape, chunks: Sequence[tuple[int, int]], sampled_rows: int) -> StepCost:
    """What one step needs. chunks: (tokens computed before, tokens now) of each request.

    sampled_rows: rows that logits were computed for; with none the output matrix is not read.
    """
    tokens = sum(count for _, count in chunks)
    if tokens == 0:
        return StepCost()
    parameters = shape.matmul_parameters + shape.other_parameters + tokens * shape.hidden_size  # and embedding rows
    if sampled_rows:
        parameters += shape.embedding_parameters
    keys = pairs = 0
    for window, num_layers in shape.windows:
        keys += num_layers * sum(attended_keys(start, count, window) for start, count in chunks)
        pairs += num_layers * sum(attended_pairs(start, count, window) for start, count in chunks)
    return StepCost(
        weight_bytes=parameters * shape.dtype_bytes,
        kv_read_bytes=keys * shape.kv_bytes_per_token_and_layer,
        kv_write_bytes=tokens * shape.kv_bytes_per_token,
        matmul_flops=2 * (tokens * shape.matmul_parameters + sampled_rows * shape.embedding_parameters),
        attention_flops=4 * pairs * shape.num_heads * shape.head_dim,  # scores and weighted sum, a multiply-add each
    )
