"""What the batched sampler must do, one row at a time, slowly and in the order of the definition."""

from dataclasses import dataclass

import numpy as np

from mini_vllm.sampling.philox import uniform
from mini_vllm.sampling_params import SamplingParams


@dataclass
class Expected:
    """The token of one row, and how near the decision was to another one."""

    token_id: int
    margin: float
    """Distance (as probability) of the uniform to the nearest boundary, and of top-p to the nearest sum."""
    support: set[int]


def sample_row(logits: np.ndarray, params: SamplingParams, seed: int, draw_index: int) -> Expected:
    """Temperature, min-p, top-k, top-p; then the first token (by id) whose cumulative probability exceeds the
    uniform."""
    if params.is_greedy:
        best = int(np.argmax(logits))
        return Expected(best, 1.0, {best})
    scaled = (logits - logits.max()) / np.float32(params.temperature)
    weights = np.exp(scaled.astype(np.float64))
    ranked = np.lexsort((np.arange(len(logits)), -logits))
    margin = 1.0
    if params.min_p > 0:
        margin = float(np.abs(weights[weights < 1] - params.min_p).min(initial=1.0))
        ranked = ranked[weights[ranked] >= params.min_p]
    if 0 < params.top_k < len(logits):
        ranked = ranked[: params.top_k]
    if params.top_p < 1.0:
        sums = np.cumsum(weights[ranked]) / weights[ranked].sum()
        margin = min(margin, float(np.abs(sums - params.top_p).min()))
        ranked = ranked[: int((sums < params.top_p).sum()) + 1]
    kept = np.zeros_like(weights)
    kept[ranked] = weights[ranked]
    cumulative = np.cumsum(kept) / kept.sum()
    u = float(uniform(np.array([seed % 2**64], dtype=np.uint64), np.array([draw_index]))[0])
    token_id = min(int((cumulative <= u).sum()), len(logits) - 1)
    return Expected(token_id, min(margin, float(np.abs(cumulative - u).min())), set(np.flatnonzero(kept).tolist()))
