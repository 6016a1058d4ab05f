"""int4 weights with a scale for each group of inputs of a channel, from plain weights, while they load.

Symmetric groups hold -7 .. 7 times a scale, asymmetric ones 0 .. 15 times a scale above a minimum. Inputs become int8
with a scale for each token or for each group.
"""

from mini_vllm.config import QuantizationOptions
from mini_vllm.ops.cpu.linear import LinearFormat
from mini_vllm.quantization.packed import PackedLinearMethod


def int4_format(options: QuantizationOptions) -> LinearFormat:
    """The format that int4 layers have under these options."""
    activations = "group" if options.activation_scales == "group" else "token"
    return LinearFormat("int4", activations, options.resolved_group_size, options.symmetric)  # type: ignore[arg-type]


class Int4LinearMethod(PackedLinearMethod):
    """Two weights in a byte, their scales beside them."""
