"""Normalisation with the residual sum before it: one native pass, or torch's operators."""

import torch
import torch.nn.functional as F

from mini_vllm.ops.cpu.kernel import FLOAT, INT64, POINTER, Kernel, empty
from mini_vllm.ops.cpu.library import DTYPE_CODES

_FIELDS = {"sum_out": POINTER, "out": POINTER, "x_stride": INT64, "residual_stride": INT64, "width": INT64}
_RMS_NORM = Kernel(
    "mv_rms_norm", x=POINTER, residual=POINTER, weight=POINTER, **_FIELDS, dtype=INT64, weight_dtype=INT64, eps=FLOAT
)
_RMS_NORM_HEADS = Kernel(
    "mv_rms_norm_heads",
    x=POINTER, first_weight=POINTER, other_weight=POINTER, out=POINTER,
    token_stride=INT64, head_stride=INT64, heads=INT64, first_heads=INT64, width=INT64,
    dtype=INT64, weight_dtype=INT64, eps=FLOAT,
)  # fmt: skip
_LAYER_NORM = Kernel(
    "mv_layer_norm", x=POINTER, residual=POINTER, weight=POINTER, bias=POINTER, **_FIELDS, dtype=INT64, eps=FLOAT
)


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [..., hidden] -> (norm(x + residual), x + residual); without a residual the sum is x itself.

    `weight` [hidden] is of x's type, or float32: then everything up to the last rounding is.
    """
    if not _RMS_NORM.serves(x):
        return rms_norm_reference(x, residual, weight, eps)
    x, total, out, (residual_address, *sizes) = _places(x, residual)
    _RMS_NORM(
        x.numel() // x.shape[-1],
        x.data_ptr(), residual_address, weight.data_ptr(), total.data_ptr(), out.data_ptr(), *sizes,
        DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype], eps,
    )  # fmt: skip
    return out, total


def rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rms_norm` computes, in torch."""
    if residual is not None:
        x = x + residual
    if weight.dtype is x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps), x
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype), x


def rms_norm_heads(
    heads: torch.Tensor, first_weight: torch.Tensor, other_weight: torch.Tensor, num_first: int, eps: float
) -> torch.Tensor:
    """Each head of [N, heads, D] normalised by itself: `num_first` of them with one weight [D], others with another."""
    if not _RMS_NORM_HEADS.serves(heads) or heads.stride(2) != 1:
        return rms_norm_heads_reference(heads, first_weight, other_weight, num_first, eps)
    tokens, count, width = heads.shape
    out = empty(heads.shape, heads.dtype)
    _RMS_NORM_HEADS(
        tokens, heads.data_ptr(), first_weight.data_ptr(), other_weight.data_ptr(), out.data_ptr(),
        heads.stride(0), heads.stride(1), count, num_first, width,
        DTYPE_CODES[heads.dtype], DTYPE_CODES[first_weight.dtype], eps,
    )  # fmt: skip
    return out


def rms_norm_heads_reference(
    heads: torch.Tensor, first_weight: torch.Tensor, other_weight: torch.Tensor, num_first: int, eps: float
) -> torch.Tensor:
    """What `rms_norm_heads` computes, in torch."""
    first, others = heads[:, :num_first], heads[:, num_first:]
    parts = (rms_norm_reference(part, None, w, eps)[0] for part, w in ((first, first_weight), (others, other_weight)))
    return torch.cat(tuple(parts), 1)


def layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rms_norm`, with the mean taken away first and `bias` [hidden] added last; all of one type."""
    if not _LAYER_NORM.serves(x):
        return layer_norm_reference(x, residual, weight, bias, eps)
    x, total, out, (residual_address, *sizes) = _places(x, residual)
    _LAYER_NORM(
        x.numel() // x.shape[-1],
        x.data_ptr(), residual_address, weight.data_ptr(), None if bias is None else bias.data_ptr(),
        total.data_ptr(), out.data_ptr(), *sizes, DTYPE_CODES[x.dtype], eps,
    )  # fmt: skip
    return out, total


def layer_norm_reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `layer_norm` computes, in torch."""
    if residual is not None:
        x = x + residual
    return F.layer_norm(x, weight.shape, weight, bias, eps), x


def _places(
    x: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int | None, int, int, int]]:
    """(x, where the sum goes, where the norm goes, (address of residual, strides of x and of it, width))."""
    x, stride = _rows(x)
    width = x.shape[-1]
    out = empty(x.shape, x.dtype)
    if residual is None:
        return x, x, out, (None, stride, 0, width)
    residual, residual_stride = _rows(residual)
    return x, empty(x.shape, x.dtype), out, (residual.data_ptr(), stride, residual_stride, width)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(x, elements from row to row), copied only if its rows do not lie at one stride."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]
