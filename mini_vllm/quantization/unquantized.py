"""Plain floating-point weights, prepacked after loading where the platform gains from it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mini_vllm.ops import linear as ops
from mini_vllm.ops.lookup import lookup
from mini_vllm.quantization.base import QuantizeMethodBase, set_weight_attrs


class UnquantizedLinearMethod(QuantizeMethodBase):
    """`weight` [sum(outputs), input] until loading ends; then maybe only `packed_weight`, an opaque copy."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        shape = (sum(output_partition_sizes), input_size_per_partition)
        weight = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
        set_weight_attrs(weight, {"output_dim": 0, "input_dim": 1, **extra_weight_attrs})
        layer.register_parameter("weight", weight)
        vars(layer)["packed_weight"] = vars(layer)["linear_kernel"] = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        stored: Any = layer
        if stored.weight is None:
            return
        # Only this layer's reference goes: a tied embedding keeps the plain matrix, everyone else frees it here.
        kernel = ops.native_linear(stored.weight)
        if kernel is not None:
            stored.linear_kernel, stored.packed_weight, stored.weight = kernel, kernel.data, None
            return
        packed = ops.prepack(stored.weight)
        if packed is not None:
            stored.linear_kernel = ops.few_rows_kernel(packed, stored.weight)
            stored.packed_weight, stored.weight = packed, None

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        stored: Any = layer
        if stored.linear_kernel is not None and len(x) <= stored.linear_kernel.MAX_ROWS:
            output: torch.Tensor = stored.linear_kernel(x, bias)
            return output
        if stored.packed_weight is not None:
            return ops.packed_linear(x, stored.packed_weight, bias)
        return F.linear(x, stored.weight, bias)


class UnquantizedEmbeddingMethod(UnquantizedLinearMethod):
    """A look-up table: the plain matrix stays, since rows are gathered from it."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return

    def embedding(self, layer: nn.Module, token_ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """token_ids [N] -> [N, hidden], times `scale`."""
        stored: Any = layer
        return lookup(token_ids, stored.weight, scale=scale)
