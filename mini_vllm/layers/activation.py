"""Activations of feed-forward layers: plain, and gated over a projection that is gate and value side by side."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from mini_vllm.exceptions import UnsupportedModelError
from mini_vllm.ops.activation import Activation, act, act_and_mul


class Act(nn.Module):
    """An activation of every number, [N, d] -> [N, d]."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return act(x, self.activation)


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
        self.activation: Activation = "gelu_tanh" if approximate == "tanh" else "gelu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return act_and_mul(x, self.activation)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: Act("relu"),
    "silu": lambda: Act("silu"),
    "swish": lambda: Act("silu"),
    "gelu": lambda: Act("gelu"),
    "gelu_new": lambda: Act("gelu_tanh"),
    "gelu_fast": lambda: Act("gelu_tanh"),
    "gelu_pytorch_tanh": lambda: Act("gelu_tanh"),
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
