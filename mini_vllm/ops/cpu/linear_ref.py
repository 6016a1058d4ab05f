"""The arithmetic of quantised linear layers in plain torch: what kernels are tested against, and what stands in for
them where there is no compiler.

Integers are chosen as in `csrc/gemm_pack.cpp` and `csrc/gemm_quantize.cpp`. A product is that of the dequantised
operands; kernels sum integers instead and scale the sums, which is the same but for rounding.
"""

import torch
import torch.nn.functional as F

from mini_vllm.ops.cpu.linear import PANEL, LinearFormat, PackedLinear, round_up

SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)
"""Ranges tried for a group of int4 weights, as parts of the full one; the least squared error decides."""

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""(int8 values [N, K], float32 scales [N, groups], float32 minimums [N, groups] or None): w = scale * value + minimum.
Symmetric values are signed, asymmetric ones start at 0."""


class ReferenceLinear:
    """A weight [output, input] in `format` as torch tensors; dequantised in every call, so slow, and right."""

    def __init__(self, weight: torch.Tensor, format: LinearFormat) -> None:
        self.format = format
        self.output_size, self.input_size = weight.shape
        values, scales, minimums = quantize_weight(weight.detach(), format)
        self.data, self.scales, self.minimums = values, scales, minimums

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight = dequantize((self.data, self.scales, self.minimums), torch.float32)[:, : self.input_size]
        rounded = round_activations(x, self.format, torch.float32)
        return F.linear(rounded, weight, None if bias is None else bias.float()).to(x.dtype)


def quantize_weight(weight: torch.Tensor, format: LinearFormat) -> Quantized:
    """[N, K] -> integers and scales, K padded to `format.granule` with weights of 0."""
    weight = weight.float()
    size = weight.shape[1]
    if format.weights == "int8":
        absmax = weight.abs().amax(1, keepdim=True)
        usable = absmax >= 1e-30
        inverse = torch.where(usable, absmax.new_tensor(127.0).div(absmax), 0.0)  # not 127 * (1 / absmax)
        values = (weight * inverse).round().clamp(-127, 127).to(torch.int8)
        return values, torch.where(usable, absmax / 127, 1.0), None
    groups = [_quantize_group(part, format.symmetric) for part in weight.split(format.group_size, 1)]
    values = F.pad(torch.cat([values for values, _, _ in groups], 1), (0, -size % format.group_size))
    scales = torch.cat([scale for _, scale, _ in groups], 1)
    return values.to(torch.int8), scales, None if format.symmetric else torch.cat([low for *_, low in groups], 1)


def _quantize_group(part: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, group] -> (values, scale [N, 1], minimum [N, 1]), scale and minimum being float16 numbers."""
    low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
    least, best = torch.full_like(low, torch.inf), (torch.zeros_like(part), torch.ones_like(low), torch.zeros_like(low))
    for shrink in SHRINK:
        span = (high - low) * shrink
        scale = part.abs().amax(1, keepdim=True) * shrink / 7 if symmetric else span / 15
        minimum = torch.zeros_like(low) if symmetric else (low + high) / 2 - span / 2
        scale, minimum = scale.half().float(), minimum.half().float()
        scale = torch.where(scale > 0, scale, 1.0)
        values = ((part - minimum) / scale).round().clamp(*((-7, 7) if symmetric else (0, 15)))
        error = (values * scale + minimum - part).square().sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        found = (values, scale, minimum)
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
    return best


def dequantize(quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] of `dtype`, from one scale for each row or for each group."""
    values, scales, minimums = quantized
    group = values.shape[1] // scales.shape[1]
    weight = values.to(dtype).unflatten(1, (-1, group)) * scales.to(dtype)[..., None]
    if minimums is not None:
        weight += minimums.to(dtype)[..., None]
    flat: torch.Tensor = weight.flatten(1)
    return flat


def round_activations(x: torch.Tensor, format: LinearFormat, dtype: torch.dtype) -> torch.Tensor:
    """x [N, K] as its int8 values stand for it, in `dtype`; x itself where activations are not quantised."""
    if format.activations == "none":
        return x.to(dtype)
    size = x.shape[1]
    x = x.float()
    if format.activations == "group":
        x = F.pad(x, (0, -size % format.group_size)).view(len(x), -1, format.group_size)
    else:
        x = x[:, None]
    absmax = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(absmax >= 1e-30, absmax.new_tensor(127.0).div(absmax), 0.0)
    scales = torch.where(absmax >= 1e-30, absmax / 127, 0.0)
    return ((x * inverse).round().to(dtype) * scales.to(dtype)).flatten(1)[:, :size]


def unpack(packed: PackedLinear) -> Quantized:
    """The integers and scales in a layer's packed memory, K padded: the layout once more, from the other side."""
    format, channels = packed.format, round_up(packed.output_size, PANEL)
    rows, padded = slice(packed.output_size), round_up(packed.input_size, format.granule)
    if format.weights == "int8":
        panels = packed.data[: channels * padded].view(-1, padded // 4, PANEL, 4)
        values = panels.transpose(1, 2).reshape(channels, padded).int() - 128
        scales = packed.data[channels * padded :].view(torch.float32).view(channels, 1)
        return values.to(torch.int8)[rows], scales[rows], None
    groups, group = padded // format.group_size, format.group_size
    blocks = packed.data.view(channels // PANEL, groups, -1)
    header = PANEL * (2 if format.symmetric else 4)
    halves = blocks[..., :header].contiguous().view(torch.float16).view(-1, groups, header // (2 * PANEL), PANEL)
    scale_parts = halves.permute(2, 0, 3, 1).reshape(-1, channels, groups).float()
    nibbles = blocks[..., header:].view(-1, groups, group // 32, 4, PANEL, 4)
    both = torch.stack([nibbles & 15, nibbles >> 4], 3)  # [panel, group, stretch, half, quad, channel, k]
    values = both.permute(0, 5, 1, 2, 3, 4, 6).reshape(channels, padded).to(torch.int8)
    if format.symmetric:
        return (values - 8)[rows], scale_parts[0, rows], None
    return values[rows], scale_parts[0, rows], scale_parts[1, rows]
