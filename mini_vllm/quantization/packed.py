"""What quantised linear layers have in common: plain weights while they load, then only packed integers."""

from typing import Any

import torch
from torch import nn

from mini_vllm.ops.cpu import linear as kernels
from mini_vllm.ops.cpu.linear import LinearFormat, PackedLinear
from mini_vllm.ops.cpu.linear_ref import ReferenceLinear
from mini_vllm.quantization.unquantized import UnquantizedLinearMethod


class PackedLinearMethod(UnquantizedLinearMethod):
    """`weight` [sum(outputs), input] until loading ends; then `linear_kernel`, with its memory as `packed_weight`.

    A tied embedding keeps the plain matrix, since rows are gathered from it; only this layer's reference goes.
    """

    def __init__(self, format: LinearFormat) -> None:
        self.format = format

    def describe(self) -> str:
        """The format, and who multiplies."""
        return f"{self.format.describe()}, {'native' if kernels.available() else 'torch reference'} kernel"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        stored: Any = layer
        if stored.weight is None:
            return
        pack = PackedLinear.pack if kernels.available() else ReferenceLinear
        stored.linear_kernel = pack(stored.weight, self.format)
        stored.packed_weight, stored.weight = stored.linear_kernel.data, None

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        stored: Any = layer
        output: torch.Tensor = stored.linear_kernel(x, bias)
        return output
