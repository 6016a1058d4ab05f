"""Which tensor-parallel rank this process is, and how ranks talk.

Layers ask `get_tp_group()` when they are built (which slice of a weight is mine?) and when they run (sum or gather
over ranks). With one rank both collectives are the identity, so a model is written once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


class TensorParallelGroup(Protocol):
    """Ranks that hold slices of the same layers."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of every rank's tensor, on every rank."""

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Every rank's tensor, concatenated along `dim` in rank order, on every rank."""


class SingleProcessGroup:
    """The group of one: nothing to exchange."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return tensor


_tp_group: TensorParallelGroup = SingleProcessGroup()


def get_tp_group() -> TensorParallelGroup:
    """The group that layers built now belong to."""
    return _tp_group


@contextmanager
def use_tp_group(group: TensorParallelGroup) -> Iterator[None]:
    """Build and run layers as a member of `group` inside the `with` block."""
    global _tp_group
    previous, _tp_group = _tp_group, group
    try:
        yield
    finally:
        _tp_group = previous
