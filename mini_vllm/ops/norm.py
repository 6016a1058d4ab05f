"""Root-mean-square normalisation with the residual sum before it: one native pass, or torch's operators."""

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F

from mini_vllm.ops.cpu import library
from mini_vllm.ops.cpu.library import DTYPE_CODES


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [..., hidden] -> (norm(x + residual), x + residual); without a residual the sum is x itself.

    `weight` [hidden] is of x's type, or float32: then everything up to the last rounding is.
    """
    kernel = _kernel() if x.is_cpu else None
    code = DTYPE_CODES.get(x.dtype)
    if kernel is None or code is None:
        return rms_norm_reference(x, residual, weight, eps)
    width = x.shape[-1]
    x, stride = _rows(x)
    total, residual_address, residual_stride = x, None, 0
    if residual is not None:
        residual, residual_stride = _rows(residual)
        total, residual_address = torch.empty(x.shape, dtype=x.dtype), residual.data_ptr()
    out = torch.empty(x.shape, dtype=x.dtype)
    status = kernel(
        x.data_ptr(), stride, residual_address, residual_stride, weight.data_ptr(), eps,
        x.numel() // width, width, total.data_ptr(), out.data_ptr(), code, DTYPE_CODES[weight.dtype],
    )  # fmt: skip
    assert not status
    return out, total


def rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rms_norm` computes, in torch."""
    if residual is not None:
        x = x + residual
    if weight.dtype is x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps), x
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype), x


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(x, elements from row to row), copied only if its rows do not lie at one stride."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]


@functools.cache
def _kernel() -> Any:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    return library.function(
        "mv_rms_norm",
        [pointer, integer, pointer, integer, pointer, ctypes.c_float, integer, integer, pointer, pointer]
        + [ctypes.c_int] * 2,
        ctypes.c_int,
    )
