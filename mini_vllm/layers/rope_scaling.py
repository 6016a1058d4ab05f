"""Rotary frequencies, and the ways published models stretch them over longer contexts than they were trained on.

`rope_frequencies` is handed a `RopeConfig` and gives each pair of dimensions its angle per position, and what cosines
and sines are multiplied by. Everything is decided here, once per engine: what depends on a length depends on
`RopeConfig.max_model_len`, never on the requests of a step, since keys in the cache were turned once and for all.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from mini_vllm.exceptions import CheckpointError
from mini_vllm.hf_config import RopeConfig


def rope_frequencies(rope: RopeConfig, rotary_dim: int) -> tuple[torch.Tensor, float]:
    """([rotary_dim / 2] float32 angles per position, attention factor). Raises `CheckpointError`."""
    return _SCALINGS[rope.rope_type](rope, rotary_dim)


def _exponents(rotary_dim: int) -> torch.Tensor:
    return torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim


def _frequencies(theta: float, rotary_dim: int) -> torch.Tensor:
    return 1.0 / (theta ** _exponents(rotary_dim))


def _default(rope: RopeConfig, rotary_dim: int) -> tuple[torch.Tensor, float]:
    return _frequencies(rope.theta, rotary_dim), 1.0


def _linear(rope: RopeConfig, rotary_dim: int) -> tuple[torch.Tensor, float]:
    """Position interpolation (Chen et al. 2023): every position counts as a `factor`-th of one."""
    return _frequencies(rope.theta, rotary_dim) / rope.scaling["factor"], 1.0


def _dynamic(rope: RopeConfig, rotary_dim: int) -> tuple[torch.Tensor, float]:
    """NTK-aware scaling: a larger base, so that the slowest pair spans the context and the fastest keeps its speed.

    How much larger depends on the length to be reached, which is `max_model_len`; up to the original context the base
    stays as it is.
    """
    if rotary_dim == 2:
        raise CheckpointError("config.json: rope_type 'dynamic' needs more than 2 rotated dimensions per head")
    factor, original = rope.scaling["factor"], rope.scaling["original_max_position_embeddings"]
    length = max(rope.max_model_len or 0, original)
    stretch = factor * length / original - (factor - 1)
    return _frequencies(rope.theta * stretch ** (rotary_dim / (rotary_dim - 2)), rotary_dim), 1.0


def _llama3(rope: RopeConfig, rotary_dim: int) -> tuple[torch.Tensor, float]:
    """Llama 3.1's rule: short wavelengths stay, long ones are divided by `factor`, those between are blended."""
    scaling, frequencies = rope.scaling, _frequencies(rope.theta, rotary_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept_share = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept_share + (1 - kept_share) / scaling["factor"]), 1.0


def _yarn(rope: RopeConfig, rotary_dim: int) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023): pairs that turn often within the original context stay, those that turn less than
    `beta_slow` times are interpolated, with a linear ramp over the pairs between; attention gets sharper as well."""
    scaling, frequencies = rope.scaling, _frequencies(rope.theta, rotary_dim)
    original = scaling["original_max_position_embeddings"]
    _require_above_one("rope_theta", rope.theta)

    def pair_with(turns: float) -> float:
        """Index (a real number) of the pair that turns this often within the original context."""
        return rotary_dim / 2 * math.log(original / (turns * 2 * math.pi)) / math.log(rope.theta)

    first, last = pair_with(scaling.get("beta_fast", 32.0)), pair_with(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first if last != first else 0.001
    interpolated = ((torch.arange(rotary_dim // 2) - first) / width).clamp(0, 1)
    return frequencies * (1 - interpolated + interpolated / scaling["factor"]), _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: dict[str, Any]) -> float:
    """`attention_factor` if given; else 0.1 ln(factor) + 1, or the ratio of two such when both mscales are given."""

    def sharpening(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0

    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return sharpening(scaling["mscale"]) / sharpening(scaling["mscale_all_dim"])
    return sharpening(1.0)


def _longrope(rope: RopeConfig, rotary_dim: int) -> tuple[torch.Tensor, float]:
    """LongRoPE (Ding et al. 2024): a divisor for each pair; one list within the original context, one beyond it."""
    scaling = rope.scaling
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    name = "long_factor" if (rope.max_model_len or 0) > original else "short_factor"
    if len(scaling[name]) != rotary_dim // 2:
        raise CheckpointError(
            f"config.json: {name} must have a number for each of the {rotary_dim // 2} pairs of rotated dimensions, "
            f"got {len(scaling[name])}"
        )
    if "attention_factor" in scaling:
        attention_factor = float(scaling["attention_factor"])
    else:
        _require_above_one("original_max_position_embeddings", original)
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (torch.tensor(scaling[name]) * rope.theta ** _exponents(rotary_dim)), attention_factor


def _require_above_one(name: str, value: float) -> None:
    """The formula takes its logarithm as a divisor."""
    if value <= 1:
        raise CheckpointError(f"config.json: {name} must be above 1 for this rope_type, got {value}")


_SCALINGS: dict[str, Callable[[RopeConfig, int], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
