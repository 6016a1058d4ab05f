"""Drawing a token from each of many rows of logits: the native kernel (`csrc/sampling.cpp`), where there is one.

It computes what `sampling.truncation` and `sampling.inversion` do in torch, which are its fallback and its oracle: the
same tokens from the same uniform numbers, but where a cut or a draw is nearer to a boundary than float32 can tell.
"""

import ctypes
import functools
from typing import Any

import torch

from mini_vllm.ops.cpu import library


def has_native_draws(logits: torch.Tensor) -> bool:
    """Whether `draw_tokens` takes these rows `[R, V]`."""
    return logits.is_cpu and logits.dtype is torch.float32 and logits.stride(1) == 1 and _kernel() is not None


def draw_tokens(
    logits: torch.Tensor,
    rows: torch.Tensor,
    best: torch.Tensor,
    limits: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    uniforms: torch.Tensor,
) -> torch.Tensor:
    """Token ids `[F]` int64, one drawn from each of the row numbers `rows` `[F]` int64; -1 if its best is not finite.

    logits: `[R, V]`, for which `has_native_draws` holds. best: `[R, 1]`, the highest of each row. uniforms: `[F]`
    float64. limits: temperature float32, top_k int64 (V is off), top_p and min_p float64, of F elements each.
    """
    tokens = torch.empty(len(rows), dtype=torch.int64)
    wanted = (torch.float32, torch.int64, torch.float64, torch.float64)
    typed = (column.to(dtype) for column, dtype in zip(limits, wanted, strict=True))
    columns = [column.contiguous() for column in (best.flatten()[rows], *typed, uniforms)]
    _kernel()(
        logits.data_ptr(), logits.stride(0), logits.shape[1], len(rows), rows.data_ptr(),
        *(column.data_ptr() for column in columns), tokens.data_ptr(),
    )  # fmt: skip
    return tokens


@functools.cache
def _kernel() -> Any:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    types = [pointer, integer, integer, integer, *[pointer] * 8]
    return library.function("mv_draw_tokens", types, ctypes.c_int)
