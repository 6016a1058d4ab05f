"""Gated activations of feed-forward layers."""

import torch
import torch.nn.functional as F
from torch import nn

from mini_vllm.exceptions import UnsupportedModelError


class SiluAndMul(nn.Module):
    """silu(gate) * up (SwiGLU, Shazeer 2020) on a fused projection: [N, 2 d] -> [N, d]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up


def get_act_and_mul(hidden_act: str) -> nn.Module:
    """The gated activation a config names. Raises `UnsupportedModelError` naming it and the supported ones."""
    if hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(f"config.json: hidden_act {hidden_act!r} is not supported; supported is silu")
    return SiluAndMul()
