"""Rotary position embedding (Su et al. 2021), "neox" style: dimension i is rotated with dimension i + half.

`RotaryEmbedding(positions)` gives the step's cosines and sines once for all layers; `apply_rotary` turns heads by
them. Angles are float32 always: bfloat16 could not tell neighbouring positions apart beyond a few hundred. They are
computed for the step's positions instead of read from a table: that costs a few microseconds a step, where a table
for a 128k context takes tens of megabytes and ends at some position.
"""

import torch
from torch import nn

from mini_vllm.exceptions import CheckpointError
from mini_vllm.hf_config import RopeConfig
from mini_vllm.layers.rope_scaling import rope_frequencies
from mini_vllm.ops.rotary import apply_rotary, rotary_angles

__all__ = ["RotaryEmbedding", "apply_rotary"]


class RotaryEmbedding(nn.Module):
    """Cosines and sines for heads of `head_size`, of which the first `partial_rotary_factor` share is rotated."""

    def __init__(self, head_size: int, rope: RopeConfig) -> None:
        super().__init__()
        self.rotary_dim = int(head_size * rope.partial_rotary_factor)
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise CheckpointError(
                f"config.json: head_dim {head_size} * partial_rotary_factor {rope.partial_rotary_factor} "
                "must give an even number of rotated dimensions"
            )
        # The dummy and meta devices must not change a frequency, so they are computed on the host.
        with torch.device("cpu"):
            frequencies, self.attention_factor = rope_frequencies(rope, self.rotary_dim)
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", frequencies.to(torch.get_default_device()), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [N] -> (cos, sin), each [N, 1, rotary_dim] float32; the first half of sin is negated."""
        # The factor is on queries and on keys, so that scores carry its square.
        return rotary_angles(positions, self.inv_freq, self.attention_factor)
