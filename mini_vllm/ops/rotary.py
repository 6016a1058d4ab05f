"""Turning heads by rotary angles: one native pass, or torch's operators."""

import ctypes
import functools
from typing import Any

import torch

from mini_vllm.ops.cpu import library
from mini_vllm.ops.cpu.library import DTYPE_CODES


def apply_rotary(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn heads x [N, heads, head_size] by cosines and sines, each [N, 1, rotary_dim] float32, the first half of the
    sines negated; computed in float32, returned in x's type. Dimensions from rotary_dim on stay as they are."""
    kernel = _kernel() if x.is_cpu else None
    code = DTYPE_CODES.get(x.dtype)
    if kernel is None or code is None:
        return apply_rotary_reference(x, cos_sin)
    cos, sin = cos_sin[0].contiguous(), cos_sin[1].contiguous()
    if x.stride(2) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    tokens, heads, head_size = x.shape
    status = kernel(
        x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(),
        tokens, heads, head_size, cos.shape[-1], out.data_ptr(), code,
    )  # fmt: skip
    assert not status
    return out


def apply_rotary_reference(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What `apply_rotary` computes, in torch."""
    cos, sin = cos_sin
    rotary_dim = cos.shape[-1]
    turned = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    first, second = turned.chunk(2, -1)
    turned = torch.addcmul(turned * cos, torch.cat((second, first), -1), sin).to(x.dtype)
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), -1)


@functools.cache
def _kernel() -> Any:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    arguments = [pointer, integer, integer, pointer, pointer, *(integer,) * 4, pointer, ctypes.c_int]
    return library.function("mv_rotary", arguments, ctypes.c_int)
