"""Root-mean-square (Zhang and Sennrich 2019) and layer normalisation (Ba et al. 2016), the residual sum beside them."""

import torch
import torch.nn.functional as F
from torch import nn

from mini_vllm.layers.linear import LoadedWeight, check_shape
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
        if residual is not None:
            x = x + residual
        return F.rms_norm(x, (self.hidden_size,), self.weight, self.eps), x

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: object = None, expert_id: int | None = None
    ) -> None:
        check_shape(tensor, param.shape)
        param.data.copy_(tensor.narrow(0, 0, param.shape[0]))


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
        if residual is not None:
            x = x + residual
        return F.layer_norm(x, (self.hidden_size,), self.weight, self.bias, self.eps), x

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: object = None, expert_id: int | None = None
    ) -> None:
        check_shape(tensor, param.shape)
        param.data.copy_(tensor.narrow(0, 0, param.shape[0]))
