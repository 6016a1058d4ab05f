"""Vocabulary matrices (the token embedding and the head, split over ranks by vocabulary rows), learned positions.

The matrices know two sizes. `org_vocab_size` rows come from the checkpoint; `num_embeddings_padded` rounds that up so
that ranks hold equal parts and kernels see round numbers. Padding rows are zero, are no tokens, and never leave
`LogitsProcessor`.
"""

from collections.abc import Hashable

import torch
from torch import nn

from mini_vllm.distributed.parallel_state import get_tp_group
from mini_vllm.exceptions import ConfigError
from mini_vllm.layers.linear import LoadedWeight, check_shape
from mini_vllm.ops.lookup import lookup
from mini_vllm.quantization.base import QuantizationConfig, QuantizeMethodBase, set_weight_attrs
from mini_vllm.quantization.unquantized import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

VOCAB_PADDING_SIZE = 64


def pad_vocab_size(vocab_size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-vocab_size // multiple) * multiple


class VocabParallelEmbedding(nn.Module):
    """Token ids [N] -> rows [N, embedding_dim]; each rank looks up its own ids and the sum joins them."""

    weight: torch.Tensor | None
    packed_weight: torch.Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        padding_size: int = VOCAB_PADDING_SIZE,
    ) -> None:
        super().__init__()
        self.tp_group = get_tp_group()
        self.prefix, self.embedding_dim, self.org_vocab_size = prefix, embedding_dim, num_embeddings
        self.num_embeddings_padded = pad_vocab_size(num_embeddings, padding_size * self.tp_group.world_size)
        self.num_embeddings_per_partition = self.num_embeddings_padded // self.tp_group.world_size
        self.vocab_start = self.tp_group.rank * self.num_embeddings_per_partition
        method = quant_config.get_quant_method(self, prefix) if quant_config else None
        self.quant_method: QuantizeMethodBase = method or self._default_method()
        self.quant_method.create_weights(
            self, embedding_dim, [self.num_embeddings_per_partition], dtype,
            weight_loader=self.weight_loader, shard_ids=(None,),
        )  # fmt: skip

    def _default_method(self) -> QuantizeMethodBase:
        return UnquantizedEmbeddingMethod()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.look_up(token_ids)

    def look_up(self, token_ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """[N] -> [N, embedding_dim], times a factor of the table's type."""
        method = self.quant_method
        assert isinstance(method, UnquantizedEmbeddingMethod)
        if self.tp_group.world_size == 1:
            return method.embedding(self, token_ids, scale)
        local = token_ids - self.vocab_start
        elsewhere = (local < 0) | (local >= self.num_embeddings_per_partition)
        rows = method.embedding(self, local.masked_fill(elsewhere, 0), scale)
        return self.tp_group.all_reduce(rows.masked_fill(elsewhere[:, None], 0))

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: Hashable = None, expert_id: int | None = None
    ) -> None:
        check_shape(tensor, (self.org_vocab_size, *param.shape[1:]))
        rows = max(0, min(self.num_embeddings_per_partition, self.org_vocab_size - self.vocab_start))
        if rows:
            param.data[:rows].copy_(tensor.narrow(0, self.vocab_start, rows))
        param.data[rows:].zero_()


class ParallelLMHead(VocabParallelEmbedding):
    """The output matrix: used as a linear layer by `LogitsProcessor`, maybe tied to the embedding."""

    def _default_method(self) -> QuantizeMethodBase:
        return UnquantizedLinearMethod()

    def tie_weights(self, embedding: VocabParallelEmbedding) -> "ParallelLMHead":
        """Share the embedding's matrix. It is filled once, through the embedding."""
        self.weight = embedding.weight
        return self

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the language-model head is no look-up table: use LogitsProcessor")


class LearnedPositionEmbedding(nn.Module):
    """A vector for each position, [N] -> [N, embedding_dim], whole on every rank. There are no others to be had.

    offset: rows of the checkpoint's table before that of position 0. max_model_len: what the engine will ask for;
    more than `num_positions` is a `ConfigError`.
    """

    def __init__(
        self,
        num_positions: int,
        embedding_dim: int,
        *,
        offset: int = 0,
        max_model_len: int | None = None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        if max_model_len is not None and max_model_len > num_positions:
            raise ConfigError(
                f"max_model_len: {max_model_len} is more than the {num_positions} positions that the model has learned"
            )
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(num_positions + offset, embedding_dim, dtype=dtype), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self.weight_loader, "shard_ids": (None,)})

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return lookup(positions, self.weight, offset=self.offset)

    def weight_loader(
        self, param: nn.Parameter, tensor: LoadedWeight, shard_id: Hashable = None, expert_id: int | None = None
    ) -> None:
        check_shape(tensor, param.shape)
        param.data.copy_(tensor.narrow(0, 0, param.shape[0]))
