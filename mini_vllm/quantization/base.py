"""The seam between layers and weight formats: one config and one method class for each format.

A layer asks its `QuantizationConfig` (or, without one, takes the unquantized method) for a method object and lets it
create, finish and apply the weights. Models never branch on the format.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mini_vllm.config import QuantizationOptions
from mini_vllm.exceptions import UnsupportedModelError

WeightLoader = Callable[..., None]
"""`(param, tensor, shard_id=None, expert_id=None)`: copies this rank's part of `tensor` into `param`. `tensor` is a
torch tensor, or anything with `.shape` and `.narrow(dim, start, length)`, so that only that part need be read."""


class QuantizeMethodBase(ABC):
    """How one kind of layer stores and uses its weights."""

    @abstractmethod
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters on `layer`, each carrying `extra_weight_attrs` (its `weight_loader` among them)."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Called once when every tensor is in place: prepack, repack, transpose."""

    @abstractmethod
    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, input] -> [N, output]."""


class QuantizationConfig(ABC):
    """A weight format as the checkpoint declares it."""

    @abstractmethod
    def get_name(self) -> str:
        """The format's name, as in `quantization_config.quant_method`."""

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for this layer; None leaves it unquantized."""

    def check_complete(self) -> None:
        """Called once when all layers have been asked for. Raises `ConfigError` for what fits none of them."""


def set_weight_attrs(weight: torch.Tensor, attrs: Mapping[str, Any]) -> None:
    """Hang loading facts (`weight_loader`, `output_dim`, `shard_ids`, ...) on a parameter."""
    for key, value in attrs.items():
        setattr(weight, key, value)


def get_quant_config(raw_config: Mapping[str, Any], requested: QuantizationOptions | None) -> QuantizationConfig | None:
    """The format weights come in or are brought into, None for plain ones.

    Raises `UnsupportedModelError` naming a checkpoint's format that is not known, `ConfigError` for what was requested.
    """
    declared = raw_config.get("quantization_config") or {}
    method = declared.get("quant_method") if isinstance(declared, dict) else declared
    if declared:
        raise UnsupportedModelError(
            f"config.json: quantization_config.quant_method {method!r} is not supported; only unquantized weights are"
        )
    if requested is None:
        return None
    from mini_vllm.quantization.on_load import OnLoadQuantization  # which is built on this module

    return OnLoadQuantization(requested)
