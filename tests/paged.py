"""The smallest thing that can drive a model over a paged cache: no scheduler, no runner, everything by hand.

Each sequence has its own shuffled blocks, and every slot nobody wrote holds NaN, so that a row read by mistake shows
in every number after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from mini_vllm.attention.backend import CommonAttentionMetadata
from mini_vllm.attention.context import ForwardContext, set_forward_context
from mini_vllm.layers.attention import get_attention_layers


def common_metadata(
    query_lens: Sequence[int], seq_lens: Sequence[int], block_table: np.ndarray, block_size: int, causal: bool = True
) -> CommonAttentionMetadata:
    """The batch whose row r holds the last `query_lens[r]` of `seq_lens[r]` tokens."""
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    slots = [
        block_table[row, position // block_size] * block_size + position % block_size
        for row, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True))
        for position in range(seq_len - query_len, seq_len)
    ]
    lens = np.asarray(seq_lens, np.int32)
    table = block_table.astype(np.int32)
    return CommonAttentionMetadata(
        num_actual_tokens=int(starts[-1]),
        num_reqs=len(lens),
        max_query_len=max(query_lens),
        max_seq_len=int(lens.max()),
        query_start_loc=torch.from_numpy(starts),
        seq_lens=torch.from_numpy(lens),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        block_table=torch.from_numpy(table),
        query_start_loc_cpu=starts,
        seq_lens_cpu=lens,
        block_table_cpu=table,
        causal=causal,
    )


@dataclass
class PagedDriver:
    """Runs flat batches of (sequence id, tokens) and returns each sequence's new logits."""

    model: nn.Module
    block_size: int = 16
    max_len: int = 128
    max_seqs: int = 8
    seed: int = 0
    num_computed: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        per_seq = -(-self.max_len // self.block_size)
        num_blocks = 1 + per_seq * self.max_seqs
        shuffled = 1 + np.random.default_rng(self.seed).permutation(num_blocks - 1)
        self.block_table = shuffled.reshape(self.max_seqs, per_seq)
        self.layers = get_attention_layers(self.model)
        self.caches = {name: self._poisoned_cache(layer, num_blocks) for name, layer in self.layers.items()}

    def _poisoned_cache(self, layer, num_blocks: int) -> torch.Tensor:
        shape = layer.backend.kv_cache_shape(num_blocks, self.block_size, layer.num_kv_heads, layer.head_size)
        dtype = next(iter(self.model.parameters())).dtype
        return torch.full(shape, float("nan"), dtype=dtype)

    @torch.inference_mode()
    def step(self, batch: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """Advance each sequence by its tokens; [number of tokens, vocab] logits for each, in batch order."""
        starts = [self.num_computed.get(seq, 0) for seq, _ in batch]
        lens = [len(tokens) for _, tokens in batch]
        ends = [start + n for start, n in zip(starts, lens, strict=True)]
        table = self.block_table[[seq for seq, _ in batch]]
        common = common_metadata(lens, ends, table, self.block_size)
        layer = next(iter(self.layers.values()))
        builder = layer.backend.builder_cls(layer.get_kv_cache_spec(self.block_size, "float32"), torch.device("cpu"))
        metadata = builder.build(common)
        positions = torch.cat([torch.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        ids = torch.tensor([token for _, tokens in batch for token in tokens])
        with set_forward_context(ForwardContext(dict.fromkeys(self.layers, metadata), self.caches)):
            logits = self.model.compute_logits(self.model(ids, positions))
        self.num_computed |= {seq: end for (seq, _), end in zip(batch, ends, strict=True)}
        return list(logits.split(lens))
