"""What has to fit in a device's memory: weights, activations, KV cache; and how many sequences then run at once.

Every function is one formula over plain numbers. Two rules say how much the KV cache may take. vLLM's for a device of
its own: `memory * gpu_memory_utilization - weights - activations`. This engine's, which also holds where memory is
everybody's: `(memory - weights - activations) * gpu_memory_utilization`, by the engine's own functions.
"""

from dataclasses import dataclass

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.planner.geometry import WEIGHT_DTYPE_BYTES, ModelGeometry


@dataclass(frozen=True)
class Quantisation:
    """How weights are stored. bits: per weight, scales included. whole_model: embeddings and output matrix, too.

    head_bits: of the output matrix where it is stored in a way of its own; a tied embedding then stays plain beside it.
    compute: the dtype the matrix product runs in; None is the model's own, weights being expanded on the way.
    """

    name: str
    bits: float
    whole_model: bool = False
    head_bits: float | None = None
    compute: str | None = None
    note: str = ""


def _grouped(bits: float, group_size: int, scale_bits: float = 16, zero_bits: float = 0) -> float:
    """Bits per weight with one scale (and zero point) a group."""
    return bits + (scale_bits + zero_bits) / group_size


QUANTISATIONS = {
    q.name: q
    for q in (
        Quantisation("fp8", 8, compute="fp8", note="W8A8, a scale per matrix or channel"),
        Quantisation("int8", 8, head_bits=8, compute="int8", note="W8A8, a scale per channel"),
        Quantisation("int8_per_channel_weight_only", 8, head_bits=8, note="W8A16, a scale per channel"),
        Quantisation(
            "int4", _grouped(4, 32), head_bits=8, compute="int8",
            note="symmetric, float16 scale per group of 32; output matrix int8",
        ),
        Quantisation("int4-g128", _grouped(4, 128), note="symmetric, float16 scale per group of 128"),
        Quantisation("gptq", _grouped(4, 128, zero_bits=4), note="scale and zero point per group of 128"),
        Quantisation("awq", _grouped(4, 128, zero_bits=4), note="scale and zero point per group of 128"),
        Quantisation("mxfp4", _grouped(4, 32, scale_bits=8), note="8-bit scale per 32"),
        Quantisation("nvfp4", _grouped(4, 16, scale_bits=8), note="fp8 scale per 16"),
        Quantisation("q8_0", 8.5, whole_model=True, note="GGUF"),
        Quantisation("q6_k", 6.5625, whole_model=True, note="GGUF"),
        Quantisation("q5_k_m", 5.69, whole_model=True, note="GGUF, mixed; approximate, differs by model"),
        Quantisation("q4_k_m", 4.89, whole_model=True, note="GGUF, mixed; approximate, differs by model"),
        Quantisation("q4_0", 4.5, whole_model=True, note="GGUF"),
        Quantisation("q3_k_m", 4.0, whole_model=True, note="GGUF, mixed; approximate, differs by model"),
        Quantisation("q2_k", 3.16, whole_model=True, note="GGUF, mixed; approximate, differs by model"),
    )
}  # fmt: skip
"""Those that this engine makes on loading have its names for them, and are what its defaults come to."""


def quantisation(name: str | None) -> Quantisation | None:
    """Raises `ConfigError`."""
    if name is None or name.lower() == "none":
        return None
    if name.lower() not in QUANTISATIONS:
        raise ConfigError(f"quantization: must be one of none, {', '.join(QUANTISATIONS)}, got {name!r}")
    return QUANTISATIONS[name.lower()]


def bytes_per_weight(dtype: str, quant: Quantisation | None) -> float:
    """In the matrices of the layers."""
    return float(WEIGHT_DTYPE_BYTES[dtype]) if quant is None else quant.bits / 8


def outside_bytes_per_weight(dtype: str, quant: Quantisation | None) -> float:
    """In embeddings and norms."""
    return bytes_per_weight(dtype, quant if quant is not None and quant.whole_model else None)


def head_bytes_per_weight(dtype: str, quant: Quantisation | None) -> float:
    """In the output matrix."""
    if quant is None or quant.head_bits is None:
        return outside_bytes_per_weight(dtype, quant)
    return quant.head_bits / 8


def weight_bytes(
    model: ModelGeometry, dtype: str, quant: Quantisation | None = None, *, packs_weights: bool = False
) -> int:
    """All weights on one device. packs_weights: products read a packed copy of their matrix, so that a tied embedding,
    from which rows are gathered, is there twice."""
    parts = model.parameters
    copied = packs_weights or (quant is not None and quant.head_bits is not None)
    head = model.output_parameters if parts.lm_head or copied else 0
    outside = parts.total - parts.linear - parts.lm_head
    in_layers = parts.linear * bytes_per_weight(dtype, quant)
    in_head = head * head_bytes_per_weight(dtype, quant)
    return round(in_layers + in_head + outside * outside_bytes_per_weight(dtype, quant))


def activation_bytes(model: ModelGeometry, max_num_batched_tokens: int, max_num_seqs: int, itemsize: int) -> int:
    """What a step of the largest size needs beside weights and cache; the engine's own estimate."""
    per_token = 6 * model.hidden_size + 3 * model.intermediate_size + 4 * model.num_heads * model.head_dim
    logits = max_num_seqs * model.vocab_size * 4
    return max_num_batched_tokens * per_token * itemsize + 2 * logits + min(6 * logits, 200 << 20)


# --- the calculators, over plain numbers ---------------------------------------------------------------------


def kv_bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype_bytes: float) -> int:
    """2 * layers * KV heads * head dim * bytes: K and V."""
    return int(2 * num_layers * num_kv_heads * head_dim * dtype_bytes)


def kv_bytes_per_seq(num_tokens: int, bytes_per_token: int) -> int:
    return num_tokens * bytes_per_token


def max_concurrent_seqs(gpu_bytes: float, weight_bytes: float, bytes_per_seq: int) -> int:
    """Whole sequences that fit beside the weights; 0 when there is no room, never negative."""
    return max(0, int(gpu_bytes - weight_bytes)) // bytes_per_seq


def kv_bytes_for_users(num_users: int, tokens_each: int, bytes_per_token: int) -> int:
    """The inverse: cache that `num_users` sequences of `tokens_each` tokens need."""
    return num_users * tokens_each * bytes_per_token


def blocks_for(num_tokens: int, block_size: int) -> int:
    """ceil(tokens / block size)."""
    return -(-num_tokens // block_size)


def paging_waste(num_tokens: int, block_size: int) -> int:
    """Empty slots of the last block; at most block_size - 1."""
    return blocks_for(num_tokens, block_size) * block_size - num_tokens


def shared_prefix_tokens(num_users: int, prefix: int, own: int, block_size: int, shared: bool) -> int:
    """Slots that users of one prompt prefix take, each with `own` tokens of its own. Only full blocks are shared."""
    if not shared:
        return num_users * blocks_for(prefix + own, block_size) * block_size
    full = prefix // block_size
    return (full + num_users * blocks_for(prefix - full * block_size + own, block_size)) * block_size


def embedding_bytes(vocab_size: int, hidden_size: int, dtype_bytes: int) -> int:
    return vocab_size * hidden_size * dtype_bytes
