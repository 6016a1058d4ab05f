"""The highest of each row and where it is: one native pass over the logits, or torch's two."""

import ctypes
import functools
from typing import Any

import torch

from mini_vllm.ops.cpu import library


def has_native_argmax(x: torch.Tensor) -> bool:
    """Whether `argmax` reads these rows just once."""
    return x.is_cpu and x.dtype is torch.float32 and x.stride(1) == 1 and _kernel() is not None


def argmax(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R, V] float32 -> (highest [R, 1], its index [R] int64): the first of equals; NaN counts as the highest."""
    if not has_native_argmax(x):
        return argmax_reference(x)
    best = torch.empty((len(x), 1), dtype=torch.float32)
    index = torch.empty(len(x), dtype=torch.int64)
    _kernel()(x.data_ptr(), x.stride(0), len(x), x.shape[1], best.data_ptr(), index.data_ptr())
    return best, index


def argmax_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `argmax` computes, in torch."""
    index = x.argmax(dim=1)
    return x.gather(1, index.unsqueeze(1)), index


@functools.cache
def _kernel() -> Any:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    return library.function("mv_argmax", [pointer, integer, integer, integer, pointer, pointer], ctypes.c_int)
