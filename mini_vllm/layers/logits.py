"""From hidden states to logits: the one place where vocabulary padding is cut off."""

import torch
from torch import nn

from mini_vllm.layers.embedding import ParallelLMHead
from mini_vllm.ops.lookup import as_logits


class LogitsProcessor(nn.Module):
    """hidden [R, hidden] -> float32 logits [R, org_vocab_size], gathered over ranks.

    soft_cap c: logits become c * tanh(logits / c), as Gemma 2's do.
    """

    def __init__(self, *, soft_cap: float | None = None) -> None:
        super().__init__()
        self.soft_cap = soft_cap

    def forward(self, lm_head: ParallelLMHead, hidden: torch.Tensor) -> torch.Tensor:
        logits = lm_head.quant_method.apply(lm_head, hidden)
        logits = lm_head.tp_group.all_gather(logits)
        return as_logits(logits[:, : lm_head.org_vocab_size], self.soft_cap)
