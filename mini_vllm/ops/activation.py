"""Gated activations over a projection that is gate and value side by side: one native pass, or torch's operators."""

import ctypes
import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F

from mini_vllm.ops.cpu import library
from mini_vllm.ops.cpu.library import DTYPE_CODES

GatedActivation = Literal["silu", "gelu", "gelu_tanh"]
_NATIVE_CODES: dict[str, int] = {"silu": 0, "gelu_tanh": 1}


def act_and_mul(x: torch.Tensor, activation: GatedActivation) -> torch.Tensor:
    """activation(gate) * value: [N, 2 d] -> [N, d]."""
    kernel = _kernel() if x.is_cpu else None
    code, native = DTYPE_CODES.get(x.dtype), _NATIVE_CODES.get(activation)
    if kernel is None or code is None or native is None or x.dim() != 2 or x.stride(1) != 1:
        return act_and_mul_reference(x, activation)
    rows, width = len(x), x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype)
    status = kernel(x.data_ptr(), x.stride(0), rows, width, out.data_ptr(), native, code)
    assert not status
    return out


def act_and_mul_reference(x: torch.Tensor, activation: GatedActivation) -> torch.Tensor:
    """What `act_and_mul` computes, in torch."""
    gate, value = x.chunk(2, -1)
    if activation == "silu":
        return F.silu(gate) * value
    # Contiguous, for torch takes other paths through views, and rounds otherwise at the ends of these.
    return F.gelu(gate.contiguous(), approximate="tanh" if activation == "gelu_tanh" else "none") * value


@functools.cache
def _kernel() -> Any:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    arguments = [pointer, integer, integer, integer, pointer, ctypes.c_int, ctypes.c_int]
    return library.function("mv_act_and_mul", arguments, ctypes.c_int)
