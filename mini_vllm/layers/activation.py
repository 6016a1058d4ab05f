"""Activations of feed-forward layers: plain, and gated over a projection that is gate and value side by side."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from mini_vllm.exceptions import UnsupportedModelError
from mini_vllm.ops.activation import GatedActivation, act_and_mul
from mini_vllm.ops.batch_invariance import is_batch_invariant


class SiluAndMul(nn.Module):
    """silu(gate) * up (SwiGLU, Shazeer 2020) on a fused projection: [N, 2 d] -> [N, d]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return act_and_mul(x, "silu")


class GeluAndMul(nn.Module):
    """gelu(gate) * up (GeGLU, Shazeer 2020) on a fused projection: [N, 2 d] -> [N, d].

    approximate: "none" for x * Phi(x), "tanh" for the formula that stands in for it (Hendrycks and Gimpel 2016).
    """

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.activation: GatedActivation = "gelu_tanh" if approximate == "tanh" else "gelu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return act_and_mul(x, self.activation)


class _RowwiseActivation(nn.Module):
    """A plain activation through the gated kernel, beside ones.

    torch's own are vectors and, at the ends of whatever parts a batch is cut into, single numbers that differ in the
    last bit.
    """

    def __init__(self, activation: GatedActivation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return act_and_mul(torch.cat((x, torch.ones_like(x)), -1), self.activation)


def _gelu_tanh() -> nn.Module:
    return _RowwiseActivation("gelu_tanh") if is_batch_invariant() else nn.GELU(approximate="tanh")


def _silu() -> nn.Module:
    return _RowwiseActivation("silu") if is_batch_invariant() else nn.SiLU()


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": _silu,
    "swish": _silu,
    "gelu": nn.GELU,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
_GATED_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": SiluAndMul,
    "swish": SiluAndMul,
    "gelu": lambda: GeluAndMul("none"),
    "gelu_new": lambda: GeluAndMul("tanh"),
    "gelu_pytorch_tanh": lambda: GeluAndMul("tanh"),
}


def get_act(hidden_act: str) -> nn.Module:
    """The activation a config names, [N, d] -> [N, d]. Raises `UnsupportedModelError` naming the supported ones."""
    return _make(hidden_act, _ACTIVATIONS)


def get_act_and_mul(hidden_act: str) -> nn.Module:
    """The gated activation a config names. Raises `UnsupportedModelError` naming it and the supported ones."""
    return _make(hidden_act, _GATED_ACTIVATIONS)


def _make(hidden_act: str, known: Mapping[str, Callable[[], nn.Module]]) -> nn.Module:
    if hidden_act not in known:
        raise UnsupportedModelError(
            f"config.json: hidden_act {hidden_act!r} is not supported; supported are {', '.join(known)}"
        )
    return known[hidden_act]()
