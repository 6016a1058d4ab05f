"""From hidden states to logits: the one place where vocabulary padding is cut off."""

import torch
from torch import nn

from mini_vllm.layers.embedding import ParallelLMHead


class LogitsProcessor(nn.Module):
    """hidden [R, hidden] -> float32 logits [R, org_vocab_size], gathered over ranks."""

    def forward(self, lm_head: ParallelLMHead, hidden: torch.Tensor) -> torch.Tensor:
        logits = lm_head.quant_method.apply(lm_head, hidden)
        logits = lm_head.tp_group.all_gather(logits)
        return logits[:, : lm_head.org_vocab_size].to(torch.float32)
