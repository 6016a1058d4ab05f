"""How fast at best: the roofline model (Williams et al., 2009) of prefill, decode and any step between.

A step takes the longer of two times: to move its bytes at the memory's bandwidth, and to do its arithmetic at the
peak. Real kernels reach a share of either, which `efficiency` stands for. `StepModel` is handed the chunks of a plan,
(tokens computed before, tokens now), and returns seconds: it is the simulator's roofline cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mini_vllm.bench.cost import attended_keys, attended_pairs
from mini_vllm.simulator.planner.geometry import KVLayers, ModelGeometry
from mini_vllm.simulator.planner.hardware import Hardware
from mini_vllm.simulator.planner.memory import (
    Quantisation,
    bytes_per_weight,
    head_bytes_per_weight,
    outside_bytes_per_weight,
)

# --- the calculators, over plain numbers ---------------------------------------------------------------------


def ridge_point(peak_flops: float, bandwidth: float) -> float:
    """Operations per byte at which compute and memory take equally long."""
    return peak_flops / bandwidth


def arithmetic_intensity(num_tokens: int, dtype_bytes: float) -> float:
    """Of a product with all weights: 2 * tokens / bytes per weight. The number of parameters cancels."""
    return 2 * num_tokens / dtype_bytes


def is_compute_bound(intensity: float, ridge: float) -> bool:
    return intensity >= ridge


def compute_utilisation(intensity: float, ridge: float) -> float:
    """Share of the peak that can be reached; 1 from the ridge on."""
    return min(1.0, intensity / ridge)


def critical_tokens(peak_flops: float, bandwidth: float, dtype_bytes: float) -> float:
    """Tokens in a step from which on it is bound by compute: ridge * bytes per weight / 2."""
    return ridge_point(peak_flops, bandwidth) * dtype_bytes / 2


def decode_tokens_per_second(batch: int, bandwidth: float, num_parameters: float, dtype_bytes: float) -> float:
    """Each step reads every weight once and makes a token for each sequence."""
    return batch * bandwidth / (num_parameters * dtype_bytes)


def prefill_tokens_per_second(peak_flops: float, num_parameters: float) -> float:
    """2 operations per parameter and token."""
    return peak_flops / (2 * num_parameters)


def context_where_kv_equals_weights(weight_bytes: float, batch: int, kv_bytes_per_token: int) -> float:
    """Tokens per sequence at which a step reads as many bytes of cache as of weights."""
    return weight_bytes / (batch * kv_bytes_per_token)


def concurrency_for(tokens_per_second: float, seconds_per_token: float) -> float:
    """Little's law: sequences in flight at that throughput and inter-token latency."""
    return tokens_per_second * seconds_per_token


# --- any step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSeconds:
    """Both sides of the roofline for one step."""

    num_bytes: float
    flops: float
    memory_seconds: float
    compute_seconds: float
    overhead_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds) + self.overhead_seconds

    @property
    def bound_by(self) -> str:
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"


@dataclass(frozen=True)
class StepModel:
    """Seconds of a step on one rank. Ranks share weights, heads and arithmetic evenly.

    efficiency: share of bandwidth and of peak that is really reached, in (0, 1].
    overhead_seconds: per step, whatever is in it (launches, scheduling, communication).
    """

    model: ModelGeometry
    hardware: Hardware
    dtype: str
    kv_dtype: str
    quant: Quantisation | None = None
    tensor_parallel_size: int = 1
    efficiency: float = 1.0
    overhead_seconds: float = 0.0

    @property
    def compute_dtype(self) -> str:
        """The product's dtype: the quantised one where the machine has units for it, else the model's."""
        wanted = self.quant.compute if self.quant is not None else None
        return wanted if wanted is not None and self.hardware.has(wanted) else self.dtype

    @property
    def peak(self) -> float:
        return self.hardware.peak_flops(self.compute_dtype) * self.tensor_parallel_size * self.efficiency

    @property
    def bandwidth(self) -> float:
        return self.hardware.bandwidth * self.tensor_parallel_size * self.efficiency

    @property
    def linear_bytes(self) -> float:
        return bytes_per_weight(self.dtype, self.quant)

    @property
    def outside_bytes(self) -> float:
        return outside_bytes_per_weight(self.dtype, self.quant)

    def weight_bytes_read(self, num_tokens: int) -> float:
        """By a step of `num_tokens` that makes logits; of experts those the tokens are expected to reach."""
        parts = self.model.parameters
        linear = parts.linear - parts.experts + parts.experts * self.model.distinct_expert_share(num_tokens)
        head = self.model.output_parameters * head_bytes_per_weight(self.dtype, self.quant)
        outside = parts.norms + num_tokens * self.model.hidden_size
        return linear * self.linear_bytes + head + outside * self.outside_bytes

    def step(self, chunks: Sequence[tuple[int, int]], sampled_rows: int | None = None) -> StepSeconds:
        """chunks: (tokens computed before, tokens now) of each request. sampled_rows: None is all of them."""
        tokens = sum(count for _, count in chunks)
        if tokens == 0:
            return StepSeconds(0, 0, 0, 0, self.overhead_seconds)
        rows = len(chunks) if sampled_rows is None else sampled_rows
        num_bytes, flops = self.weight_bytes_read(tokens), 0.0
        flops += 2 * (tokens * self.model.matmul_parameters_per_token + rows * self.model.output_parameters)
        for layers in self.model.kv_layers:
            kv_bytes, kv_flops = self._attention(layers, chunks)
            num_bytes += kv_bytes
            flops += kv_flops
        return StepSeconds(num_bytes, flops, num_bytes / self.bandwidth, flops / self.peak, self.overhead_seconds)

    def seconds(self, chunks: Sequence[tuple[int, int]], sampled_rows: int | None = None) -> float:
        return self.step(chunks, sampled_rows).seconds

    def _attention(self, layers: KVLayers, chunks: Sequence[tuple[int, int]]) -> tuple[float, float]:
        """(bytes of cache read and written, operations) of these layers."""
        size = self.model.kv_dtype_bytes(self.kv_dtype)
        if layers.kind == "mamba":
            return layers.num_layers * 2 * len(chunks) * layers.state_elements * size, 0.0
        keys = sum(attended_keys(start, count, layers.window) for start, count in chunks)
        pairs = sum(attended_pairs(start, count, layers.window) for start, count in chunks)
        written = sum(count for _, count in chunks)
        copies = self.tensor_parallel_size if layers.replicated else 1
        moved = layers.num_layers * copies * (keys + written) * layers.elements_per_token * size
        width = self.model.num_heads * (layers.elements_per_token if layers.replicated else self.model.head_dim)
        return moved, layers.num_layers * 4.0 * pairs * width

    # -- the two phases ----------------------------------------------------------------------------------

    def decode(self, batch: int, context: int) -> StepSeconds:
        """One token for each of `batch` sequences that hold `context` tokens."""
        return self.step([(context - 1, 1)] * batch)

    def prefill(self, prompt: int, chunk: int | None = None) -> list[StepSeconds]:
        """The steps of one prompt alone, cut to `chunk` tokens."""
        size = prompt if chunk is None else min(chunk, prompt)
        starts = range(0, prompt, size)
        return [self.step([(s, min(size, prompt - s))], int(s + size >= prompt)) for s in starts]

    def critical_batch(self, limit: int = 1 << 20) -> int | None:
        """Smallest number of tokens whose weights alone take no longer than their arithmetic; None if there is none."""

        def bound_by_compute(tokens: int) -> bool:
            flops = 2 * tokens * (self.model.matmul_parameters_per_token + self.model.output_parameters)
            return flops / self.peak >= self.weight_bytes_read(tokens) / self.bandwidth

        if not bound_by_compute(limit):
            return None
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if bound_by_compute(middle) else (middle, high)
        return high
