"""Linear layers that know how their weight is split over tensor-parallel ranks and fused from checkpoint tensors.

Column-parallel layers hold some output rows, row-parallel layers some input columns and sum over ranks. Each
parameter carries a `weight_loader(param, tensor, shard_id=None, expert_id=None)` that copies this rank's part, read
lazily, and `shard_ids`: the checkpoint tensors that must fill it, once each.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import nn

from mini_vllm.distributed.parallel_state import get_tp_group
from mini_vllm.exceptions import CheckpointError, ConfigError
from mini_vllm.quantization.base import QuantizationConfig, QuantizeMethodBase, set_weight_attrs
from mini_vllm.quantization.unquantized import UnquantizedLinearMethod


class LoadedWeight(Protocol):
    """A checkpoint tensor: a torch tensor, or one that reads only what `narrow` asks for."""

    @property
    def shape(self) -> Sequence[int]: ...

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor: ...


def divide(numerator: int, denominator: int, what: str) -> int:
    """Exact division over ranks. Raises `ConfigError` naming `what` when it has a remainder."""
    if numerator % denominator:
        raise ConfigError(f"tensor_parallel_size: {denominator} does not divide {what} {numerator}")
    return numerator // denominator


def check_shape(tensor: LoadedWeight, expected: Sequence[int]) -> None:
    """Raise `CheckpointError` unless the whole checkpoint tensor has this shape."""
    if tuple(tensor.shape) != tuple(expected):
        raise CheckpointError(f"has shape {list(tensor.shape)}, expected {list(expected)}")


class RowRange:
    """Rows `start : start + rows` of a checkpoint tensor, seen as a tensor of its own and read just as lazily."""

    def __init__(self, tensor: LoadedWeight, start: int, rows: int) -> None:
        self._tensor, self._start, self._rows = tensor, start, rows
        self.shape: Sequence[int] = (rows, *tensor.shape[1:])

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        if dim == 0:
            return self._tensor.narrow(0, self._start + start, length)
        return self._tensor.narrow(0, self._start, self._rows).narrow(dim, start, length)


class Transposed:
    """A checkpoint matrix seen the other way round, and read just as lazily."""

    def __init__(self, tensor: LoadedWeight) -> None:
        self._tensor = tensor
        self.shape: Sequence[int] = tuple(reversed(tensor.shape))

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        return self._tensor.narrow(1 - dim, start, length).t()


class LinearBase(nn.Module):
    """What all linear layers share: sizes, the weight format's method, an optional bias."""

    packed_weight: torch.Tensor | None
    weight: torch.Tensor | None

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        *,
        bias: bool,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None,
        prefix: str,
        shard_ids: tuple[Hashable, ...] = (None,),
    ) -> None:
        super().__init__()
        self.input_size, self.output_sizes = input_size, list(output_sizes)
        self.input_size_per_partition = input_size_per_partition
        self.output_partition_sizes = list(output_partition_sizes)
        self.prefix = prefix
        self.tp_group = get_tp_group()
        method = quant_config.get_quant_method(self, prefix) if quant_config else None
        self.quant_method: QuantizeMethodBase = method or UnquantizedLinearMethod()
        attrs: dict[str, Any] = {"weight_loader": self.weight_loader, "shard_ids": shard_ids}
        self.quant_method.create_weights(self, input_size_per_partition, self.output_partition_sizes, dtype, **attrs)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(sum(output_partition_sizes), dtype=dtype), requires_grad=False)
            set_weight_attrs(self.bias, {"output_dim": 0, **attrs})

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: Hashable = None, expert_id: int | None = None
    ) -> None:
        raise TypeError(f"{type(self).__name__} has no weight_loader")

    def load_fused(self, param: nn.Parameter, tensor: LoadedWeight, shard_ids: Iterable[Hashable]) -> None:
        """Fill every shard from one checkpoint tensor that holds all outputs, one after the other."""
        check_shape(tensor, (sum(self.output_sizes), *param.shape[1:]))
        start = 0
        for shard_id, rows in zip(shard_ids, self.output_sizes, strict=True):
            self.weight_loader(param, RowRange(tensor, start, rows), shard_id)
            start += rows

    def load_transposed(self) -> Self:
        """Expect the checkpoint to have the matrix as [input, output], as GPT-2's do. Returns the layer itself."""
        assert self.weight is not None
        loader: Callable[..., None] = self.weight.weight_loader  # type: ignore[attr-defined]

        def load(
            param: nn.Parameter, tensor: LoadedWeight, shard_id: Hashable = None, expert_id: int | None = None
        ) -> None:
            loader(param, Transposed(tensor), shard_id, expert_id)

        set_weight_attrs(self.weight, {"weight_loader": load})
        return self

    def extra_repr(self) -> str:
        return f"in={self.input_size_per_partition}, out={self.output_partition_sizes}, bias={self.bias is not None}"


class ColumnParallelLinear(LinearBase):
    """y = x A^T + b with the rows of A split over ranks: [N, input] -> [N, output / world_size].

    gather_output: concatenate the parts, so that every rank has all of y.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool = False,
        gather_output: bool = False,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        per_rank = divide(output_size, get_tp_group().world_size, f"{prefix} output size")
        super().__init__(
            input_size, [output_size], input_size, [per_rank],
            bias=bias, dtype=dtype, quant_config=quant_config, prefix=prefix,
        )  # fmt: skip
        self.gather_output = gather_output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.quant_method.apply(self, x, self.bias)
        return self.tp_group.all_gather(output) if self.gather_output else output

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: Hashable = None, expert_id: int | None = None
    ) -> None:
        rows = self.output_partition_sizes[0]
        check_shape(tensor, (self.output_sizes[0], *param.shape[1:]))
        param.data.copy_(tensor.narrow(0, self.tp_group.rank * rows, rows))


class MergedColumnParallelLinear(LinearBase):
    """Several column-parallel matrices over the same input as one product; shard i is output i, None is all of them.

    [N, input] -> [N, sum(output_sizes) / world_size], this rank's part of each output side by side.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        *,
        bias: bool = False,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        world_size = get_tp_group().world_size
        super().__init__(
            input_size, output_sizes, input_size,
            [divide(size, world_size, f"{prefix} output size") for size in output_sizes],
            bias=bias, dtype=dtype, quant_config=quant_config, prefix=prefix,
            shard_ids=tuple(range(len(output_sizes))),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, self.bias)

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: Hashable = None, expert_id: int | None = None
    ) -> None:
        if shard_id is None:
            return self.load_fused(param, tensor, range(len(self.output_sizes)))
        assert isinstance(shard_id, int)
        rows = self.output_partition_sizes[shard_id]
        check_shape(tensor, (self.output_sizes[shard_id], *param.shape[1:]))
        offset = sum(self.output_partition_sizes[:shard_id])
        param.data.narrow(0, offset, rows).copy_(tensor.narrow(0, self.tp_group.rank * rows, rows))


class QKVParallelLinear(LinearBase):
    """Query, key and value projections as one product, split by heads; shards 'q', 'k', 'v', or None for all.

    [N, hidden] -> [N, (num_heads + 2 * num_kv_heads) * head_size], the counts being this rank's. With more ranks
    than KV heads, each KV head is held by `num_kv_head_replicas` neighbouring ranks.
    """

    SHARD_IDS = ("q", "k", "v")

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        world_size = get_tp_group().world_size
        self_heads = divide(total_num_heads, world_size, "num_attention_heads")
        if world_size >= total_num_kv_heads:
            kv_heads, replicas = 1, divide(world_size, total_num_kv_heads, "ranks per KV head of")
        else:
            kv_heads, replicas = divide(total_num_kv_heads, world_size, "num_key_value_heads"), 1
        kv_total, kv_local = total_num_kv_heads * head_size, kv_heads * head_size
        super().__init__(
            hidden_size, [total_num_heads * head_size, kv_total, kv_total],
            hidden_size, [self_heads * head_size, kv_local, kv_local],
            bias=bias, dtype=dtype, quant_config=quant_config, prefix=prefix, shard_ids=self.SHARD_IDS,
        )  # fmt: skip
        self.head_size = head_size
        self.num_heads, self.num_kv_heads, self.num_kv_head_replicas = self_heads, kv_heads, replicas
        self.q_size, self.kv_size = self.output_partition_sizes[:2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, self.bias)

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: Hashable = None, expert_id: int | None = None
    ) -> None:
        if shard_id is None:
            return self.load_fused(param, tensor, self.SHARD_IDS)
        shard = self.SHARD_IDS.index(str(shard_id))
        rows = self.output_partition_sizes[shard]
        check_shape(tensor, (self.output_sizes[shard], *param.shape[1:]))
        rank = self.tp_group.rank if shard == 0 else self.tp_group.rank // self.num_kv_head_replicas
        offset = sum(self.output_partition_sizes[:shard])
        param.data.narrow(0, offset, rows).copy_(tensor.narrow(0, rank * rows, rows))


class RowParallelLinear(LinearBase):
    """y = x A^T + b with the columns of A split over ranks: [N, input / world_size] -> [N, output], summed over ranks.

    The bias is added by the first rank alone, so that the sum holds it once.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        per_rank = divide(input_size, get_tp_group().world_size, f"{prefix} input size")
        super().__init__(
            input_size, [output_size], per_rank, [output_size],
            bias=bias, dtype=dtype, quant_config=quant_config, prefix=prefix,
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.tp_group.rank == 0 else None
        return self.tp_group.all_reduce(self.quant_method.apply(self, x, bias))

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: Hashable = None, expert_id: int | None = None
    ) -> None:
        if param.dim() == 1:
            check_shape(tensor, param.shape)
            param.data.copy_(tensor.narrow(0, 0, param.shape[0]))
            return
        columns = self.input_size_per_partition
        check_shape(tensor, (param.shape[0], self.input_size))
        param.data.copy_(tensor.narrow(1, self.tp_group.rank * columns, columns))
