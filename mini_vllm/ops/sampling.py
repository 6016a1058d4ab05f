"""Drawing a token from each of many rows of logits: the native kernel (`csrc/sampling.cpp`), where there is one.

It computes what `sampling.truncation` and `sampling.inversion` do in torch, which are its fallback and its oracle: the
same tokens from the same uniform numbers, but where a cut or a draw is nearer to a boundary than float32 can tell.
"""

import torch

from mini_vllm.ops.cpu.kernel import INT64, POINTER, Kernel

_DRAW = Kernel(
    "mv_draw_tokens",
    logits=POINTER, rows=POINTER, best=POINTER, temperature=POINTER, top_k=POINTER, top_p=POINTER, min_p=POINTER,
    uniforms=POINTER, tokens=POINTER, stride=INT64, vocab=INT64,
)  # fmt: skip


def has_native_draws(logits: torch.Tensor) -> bool:
    """Whether `draw_tokens` takes these rows `[R, V]`."""
    return _DRAW.serves(logits) and logits.dtype is torch.float32 and logits.stride(1) == 1


def draw_tokens(
    logits: torch.Tensor,
    rows: torch.Tensor,
    best: torch.Tensor,
    limits: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    uniforms: torch.Tensor,
) -> torch.Tensor:
    """Token ids `[F]` int64, one drawn from each of the row numbers `rows` `[F]` int64; -1 if its best is not finite.

    logits: `[R, V]`, for which `has_native_draws` holds. best: `[R, 1]`, the highest of each row. uniforms: `[F]`
    float64. limits: temperature float32, top_k int64 (V is off), top_p and min_p float64, of F elements each.
    """
    tokens = torch.empty(len(rows), dtype=torch.int64)
    wanted = (torch.float32, torch.int64, torch.float64, torch.float64)
    typed = (column.to(dtype) for column, dtype in zip(limits, wanted, strict=True))
    columns = [column.contiguous() for column in (best.flatten()[rows], *typed, uniforms)]
    _DRAW(
        len(rows), logits.data_ptr(), rows.data_ptr(), *(column.data_ptr() for column in columns), tokens.data_ptr(),
        logits.stride(0), logits.shape[1],
    )  # fmt: skip
    return tokens
