"""Activations, plain and gated (gate and value side by side): one native pass, or torch's operators."""

from typing import Literal

import torch
import torch.nn.functional as F

from mini_vllm.ops.cpu.kernel import INT64, POINTER, Kernel, empty
from mini_vllm.ops.cpu.library import DTYPE_CODES

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
_CODES: dict[str, int] = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
_FIELDS = {"x": POINTER, "out": POINTER, "x_stride": INT64, "width": INT64, "activation": INT64, "dtype": INT64}
_ACT = Kernel("mv_activation", **_FIELDS)
_ACT_AND_MUL = Kernel("mv_act_and_mul", **_FIELDS)


def act(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(x), [N, d] -> [N, d]."""
    return _run(_ACT, x, activation, x.shape[1]) if _serves(_ACT, x) else act_reference(x, activation)


def act_reference(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """What `act` computes, in torch."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def act_and_mul(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(gate) * value: [N, 2 d] -> [N, d]."""
    if not _serves(_ACT_AND_MUL, x):
        return act_and_mul_reference(x, activation)
    return _run(_ACT_AND_MUL, x, activation, x.shape[1] // 2)


def act_and_mul_reference(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """What `act_and_mul` computes, in torch."""
    gate, value = x.chunk(2, -1)
    return act_reference(gate, activation) * value


def _serves(kernel: Kernel, x: torch.Tensor) -> bool:
    return kernel.serves(x) and x.dim() == 2 and x.stride(1) == 1


def _run(kernel: Kernel, x: torch.Tensor, activation: Activation, width: int) -> torch.Tensor:
    out = empty((len(x), width), x.dtype)
    kernel(len(x), x.data_ptr(), out.data_ptr(), x.stride(0), width, _CODES[activation], DTYPE_CODES[x.dtype])
    return out
