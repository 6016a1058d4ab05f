"""Rotary angles of positions, and turning heads by them: one native pass each, or torch's operators."""

import torch

from mini_vllm.ops.cpu.kernel import FLOAT, INT64, POINTER, Kernel, empty
from mini_vllm.ops.cpu.library import DTYPE_CODES

CosSin = tuple[torch.Tensor, torch.Tensor]

_ANGLES = Kernel(
    "mv_angles",
    positions=POINTER, frequencies=POINTER, cosines=POINTER, sines=POINTER, half=INT64, factor=FLOAT,
)  # fmt: skip
_ROTARY = Kernel(
    "mv_rotary",
    x=POINTER, cosines=POINTER, sines=POINTER, out=POINTER,
    token_stride=INT64, head_stride=INT64, heads=INT64, head_size=INT64, rotary_dim=INT64, dtype=INT64,
)  # fmt: skip


def rotary_angles(positions: torch.Tensor, inv_freq: torch.Tensor, factor: float) -> CosSin:
    """positions [N] int64, inv_freq [rotary_dim / 2] float32 -> cosines and sines of position * frequency, times
    `factor`, each [N, 1, rotary_dim] float32; both halves are the same, but the first half of the sines is negated."""
    if not _ANGLES.serves(inv_freq) or positions.dtype is not torch.int64 or not positions.is_contiguous():
        return rotary_angles_reference(positions, inv_freq, factor)
    tokens, half = len(positions), len(inv_freq)
    cos, sin = (empty((tokens, 1, 2 * half), torch.float32) for _ in range(2))
    _ANGLES(tokens, positions.data_ptr(), inv_freq.data_ptr(), cos.data_ptr(), sin.data_ptr(), half, factor)
    return cos, sin


def rotary_angles_reference(positions: torch.Tensor, inv_freq: torch.Tensor, factor: float) -> CosSin:
    """What `rotary_angles` computes, in torch."""
    angles = positions.to(torch.float32)[:, None] * inv_freq
    cos, sin = angles.cos(), angles.sin()
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def apply_rotary(x: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
    """Turn heads x [N, heads, head_size] by cosines and sines, each [N, 1, rotary_dim] float32, the first half of the
    sines negated; computed in float32, returned in x's type. Dimensions from rotary_dim on stay as they are."""
    if not _ROTARY.serves(x):
        return apply_rotary_reference(x, cos_sin)
    cos, sin = cos_sin[0].contiguous(), cos_sin[1].contiguous()
    if x.stride(2) != 1:
        x = x.contiguous()
    out = empty(x.shape, x.dtype)
    tokens, heads, head_size = x.shape
    _ROTARY(
        tokens, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
        x.stride(0), x.stride(1), heads, head_size, cos.shape[-1], DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return out


def apply_rotary_reference(x: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
    """What `apply_rotary` computes, in torch."""
    cos, sin = cos_sin
    rotary_dim = cos.shape[-1]
    turned = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    first, second = turned.chunk(2, -1)
    turned = torch.addcmul(turned * cos, torch.cat((second, first), -1), sin).to(x.dtype)
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), -1)
