"""Rows of a table by their numbers, and logits from what the head gives: one native pass each, or torch's operators."""

import torch
import torch.nn.functional as F

from mini_vllm.ops.cpu.kernel import FLOAT, INT64, POINTER, Kernel, empty
from mini_vllm.ops.cpu.library import DTYPE_CODES

_LOOKUP = Kernel(
    "mv_lookup",
    ids=POINTER, table=POINTER, out=POINTER,
    ids_are_wide=INT64, offset=INT64, num_rows=INT64, width=INT64, dtype=INT64, scale=FLOAT,
)  # fmt: skip
_LOGITS = Kernel("mv_logits", x=POINTER, out=POINTER, x_stride=INT64, width=INT64, dtype=INT64, cap=FLOAT)
_ID_TYPES = (torch.int32, torch.int64)


def lookup(ids: torch.Tensor, table: torch.Tensor, *, scale: float = 1.0, offset: int = 0) -> torch.Tensor:
    """ids [N] int32 or int64, table [rows, width] -> table[ids + offset] * scale. Raises IndexError for a row that the
    table does not have. `scale` is a number of the table's type."""
    if not (_LOOKUP.serves(table) and table.is_contiguous() and ids.dtype in _ID_TYPES and ids.is_contiguous()):
        return lookup_reference(ids, table, scale=scale, offset=offset)
    out = empty((len(ids), table.shape[1]), table.dtype)
    _LOOKUP(
        len(ids), ids.data_ptr(), table.data_ptr(), out.data_ptr(),
        ids.dtype is torch.int64, offset, len(table), table.shape[1], DTYPE_CODES[table.dtype], scale,
    )  # fmt: skip
    return out


def lookup_reference(ids: torch.Tensor, table: torch.Tensor, *, scale: float = 1.0, offset: int = 0) -> torch.Tensor:
    """What `lookup` computes, in torch."""
    rows = F.embedding(ids + offset if offset else ids, table)
    return rows if scale == 1.0 else rows * scale


def as_logits(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """x [R, V] -> float32 [R, V]; with a cap c, c * tanh(x / c)."""
    if cap is None and x.dtype is torch.float32:
        return x
    if not _LOGITS.serves(x) or x.stride(1) != 1:
        return as_logits_reference(x, cap)
    out = empty(x.shape, torch.float32)
    _LOGITS(len(x), x.data_ptr(), out.data_ptr(), x.stride(0), x.shape[1], DTYPE_CODES[x.dtype], cap or 0.0)
    return out


def as_logits_reference(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """What `as_logits` computes, in torch."""
    x = x.to(torch.float32)
    return x if cap is None else torch.tanh(x / cap) * cap
