"""Matrix products for layers: weights packed once, used by every batch size.

Where there are native kernels and no bfloat16 instructions, the native float kernel multiplies any number of rows; it
is also what batch invariance takes. Otherwise weights are oneDNN's: on a CPU, `F.linear` in bf16 converts the weight's
layout in every call, and at batch 1 that costs more than the product. Packing after loading and calling oneDNN on the
packed weight is 2.3 times faster there, and never slower in larger batches. In float32 the same call has more overhead
than MKL's, and pays only where the weight is large.
"""

import torch

from mini_vllm.ops.batch_invariance import is_batch_invariant, require_dtype
from mini_vllm.ops.cpu import library
from mini_vllm.ops.cpu import linear as kernels
from mini_vllm.ops.cpu.linear import PackedBF16Linear, PackedFloatLinear

MIN_FLOAT32_ELEMENTS = 1 << 20
"""Float32 weights below this stay plain in oneDNN's care: call overhead outweighs the gain."""


def native_linear(weight: torch.Tensor) -> PackedFloatLinear | None:
    """`weight` [output, input] packed for the native kernel, or None where others are faster or there is none."""
    if is_batch_invariant():
        require_dtype(weight.dtype)
        return PackedFloatLinear.pack(weight)  # on every level: its sums have one order
    if weight.dtype not in library.DTYPE_CODES or not kernels.available() or not _native_is_fastest(weight.dtype):
        return None
    return PackedFloatLinear.pack(weight)


def _native_is_fastest(dtype: torch.dtype) -> bool:
    from mini_vllm.platforms import current_platform

    if library.loaded_isa() == "portable":
        return False
    return dtype is not torch.bfloat16 or not current_platform.supports_bf16()


def prepack(weight: torch.Tensor) -> torch.Tensor | None:
    """An opaque packed copy of `weight` [output, input], or None when this platform or dtype does not gain."""
    from mini_vllm.platforms import current_platform

    if not current_platform.prepacks_linears or not _worth_packing(weight):
        return None
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)
    return packed


def _worth_packing(weight: torch.Tensor) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32 and weight.numel() >= MIN_FLOAT32_ELEMENTS


def few_rows_kernel(packed_weight: torch.Tensor, weight: torch.Tensor) -> PackedBF16Linear | None:
    """What is faster for few rows, on the same packed weight; None where there is no such kernel."""
    return PackedBF16Linear.wrap(packed_weight, weight) if kernels.available() else None


def packed_linear(x: torch.Tensor, packed_weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [N, input] -> [N, output] with a weight from `prepack`."""
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, "none", [], "")
    return output
