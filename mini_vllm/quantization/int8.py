"""int8 weights with a scale for each output channel, from plain weights, while they load.

With dynamic activations each token's input becomes int8 as well, with a scale of its own (or one for each group of
inputs, which outliers hurt less), so that a neighbour's outlier never shows; weight-only leaves inputs as they are.
"""

from mini_vllm.config import QuantizationOptions
from mini_vllm.ops.cpu.linear import LinearFormat
from mini_vllm.quantization.packed import PackedLinearMethod


def int8_format(options: QuantizationOptions) -> LinearFormat:
    """The format that int8 layers have under these options; a head beside int4 layers has it too."""
    if options.method == "int8_per_channel_weight_only":
        return LinearFormat("int8", "none")
    if options.activation_scales == "group":
        return LinearFormat("int8", "group", options.resolved_group_size)
    return LinearFormat("int8", "token")


class Int8LinearMethod(PackedLinearMethod):
    """One int8 scale for each output channel."""
