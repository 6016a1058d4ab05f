"""Root-mean-square (Zhang and Sennrich 2019) and layer normalisation (Ba et al. 2016), the residual sum beside them."""

from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import nn

from mini_vllm.layers.linear import LoadedWeight, check_shape
from mini_vllm.ops.norm import layer_norm, rms_norm
from mini_vllm.quantization.base import set_weight_attrs


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, statistics in float32."""

    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self.weight_loader, "shard_ids": (None,)})

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [N, hidden] -> (norm(x + residual), x + residual); without a residual the sum is x itself."""
        return rms_norm(x, residual, self.weight, self.eps)

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: object = None, expert_id: int | None = None
    ) -> None:
        check_shape(tensor, param.shape)
        param.data.copy_(tensor.narrow(0, 0, param.shape[0]))


class GemmaRMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + w), all of it in float32 and only then rounded to x's type.

    `weight` is 1 + w, the checkpoint having w, in float32 whatever the model's type: bfloat16 would lose most digits
    of a small w in the sum.
    """

    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(hidden_size, eps, dtype=torch.float32)

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: object = None, expert_id: int | None = None
    ) -> None:
        super().weight_loader(param, tensor, shard_id, expert_id)
        param.data.add_(1)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension. Used as `RMSNorm` is."""

    def __init__(self, hidden_size: int, eps: float, *, bias: bool = True, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=dtype), requires_grad=False) if bias else None
        for param in (self.weight, self.bias):
            if param is not None:
                set_weight_attrs(param, {"weight_loader": self.weight_loader, "shard_ids": (None,)})

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [N, hidden] -> (norm(x + residual), x + residual); without a residual the sum is x itself."""
        return layer_norm(x, residual, self.weight, self.bias, self.eps)

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: object = None, expert_id: int | None = None
    ) -> None:
        check_shape(tensor, param.shape)
        param.data.copy_(tensor.narrow(0, 0, param.shape[0]))


class PerHeadLayerNorm(nn.Module):
    """Layer norm over each head with a weight per head and no bias: [N, heads, D] -> [N, heads, D].

    In the checkpoint each head's weight is a tensor of its own, which is shard i of `weight` [heads, D] here; a rank
    keeps those from `first_head` on.
    """

    def __init__(
        self, total_heads: int, heads: int, first_head: int, head_dim: int, eps: float, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.first_head, self.eps = first_head, eps
        self.weight = nn.Parameter(torch.ones(heads, head_dim, dtype=dtype), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self.weight_loader, "shard_ids": tuple(range(total_heads))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: Hashable = None, expert_id: int | None = None
    ) -> None:
        assert isinstance(shard_id, int)
        check_shape(tensor, param.shape[1:])
        row = shard_id - self.first_head
        if 0 <= row < len(param):
            param.data[row].copy_(tensor.narrow(0, 0, param.shape[1]))


NORMS = (RMSNorm, LayerNorm, PerHeadLayerNorm)
"""Modules whose `weight` is a gain around 1."""
