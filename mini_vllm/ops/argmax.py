"""The highest of each row and where it is: one native pass over the logits, or torch's two."""

import torch

from mini_vllm.ops.cpu.kernel import INT64, POINTER, Kernel, empty

_ARGMAX = Kernel("mv_argmax", x=POINTER, best=POINTER, index=POINTER, x_stride=INT64, width=INT64)


def has_native_argmax(x: torch.Tensor) -> bool:
    """Whether `argmax` reads these rows just once."""
    return _ARGMAX.serves(x) and x.dtype is torch.float32 and x.stride(1) == 1


def argmax(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R, V] float32 -> (highest [R, 1], its index [R] int64): the first of equals; NaN counts as the highest."""
    if not has_native_argmax(x):
        return argmax_reference(x)
    best, index = empty((len(x), 1), torch.float32), empty((len(x),), torch.int64)
    _ARGMAX(len(x), x.data_ptr(), best.data_ptr(), index.data_ptr(), x.stride(0), x.shape[1])
    return best, index


def finite_argmax(x: torch.Tensor) -> torch.Tensor:
    """As `argmax`, only the index, -1 where the highest is no finite number. `has_native_argmax(x)` must hold."""
    index = empty((len(x),), torch.int64)
    _ARGMAX(len(x), x.data_ptr(), None, index.data_ptr(), x.stride(0), x.shape[1])
    return index


def argmax_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `argmax` computes, in torch."""
    index = x.argmax(dim=1)
    return x.gather(1, index.unsqueeze(1)), index
