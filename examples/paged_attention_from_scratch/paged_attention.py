"""Paged attention from scratch: the KV cache of a language model kept in blocks, as an operating system keeps memory.

Read it from top to bottom; each part needs only those above it.

1. `Sequence`            what is being generated
2. `ContiguousCache`     the naive way: one row per sequence, as long as the longest could get
3. `BlockAllocator`      a pool of equal blocks, a free list, a count of references to each
4. `BlockTables`         which blocks hold which tokens of which sequence; growing, forking, copy on write
5. `PagedCache`          keys and values in these blocks
6. `paged_attention`     attention that walks the table instead of a row

`python paged_attention.py` runs the claims at the end. `simulate.py` measures what paging buys.
The idea is that of Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
SOSP 2023, https://arxiv.org/abs/2309.06180.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

# --- 1. what is being generated ------------------------------------------------------------------------------


@dataclass
class Sequence:
    """One request. Its cache holds `current_pos` tokens now and `prompt_len + output_len` at its end.

    group, prefix_len: sequences of a group begin with the same `prefix_len` tokens.
    """

    id: int
    prompt_len: int
    output_len: int
    current_pos: int = 0
    group: int = 0
    prefix_len: int = 0

    @property
    def final_len(self) -> int:
        return self.prompt_len + self.output_len

    @property
    def is_finished(self) -> bool:
        return self.current_pos >= self.final_len


# --- 2. the naive way ----------------------------------------------------------------------------------------


@dataclass
class ContiguousCache:
    """Every sequence gets a row of `max_seq_len` tokens when it starts, since nobody knows how long it will become.

    Reserving for the prompt alone would overflow while decoding. `kv` is [2, rows, tokens, layers, heads, head_dim];
    the leading 2 is keys and values.
    """

    max_concurrent: int
    max_seq_len: int
    num_layers: int = 1
    num_heads: int = 1
    head_dim: int = 4
    rows: dict[int, int] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (2, self.max_concurrent, self.max_seq_len, self.num_layers, self.num_heads, self.head_dim)
        self.kv = np.zeros(shape, np.float32)
        self.free_rows = deque(range(self.max_concurrent))

    def start(self, seq_id: int) -> bool:
        """Take a row; False when there is none."""
        if not self.free_rows:
            return False
        self.rows[seq_id], self.lengths[seq_id] = self.free_rows.popleft(), 0
        return True

    def append(self, seq_id: int, key: np.ndarray, value: np.ndarray) -> None:
        """key, value: [layers, heads, head_dim] of one token."""
        position = self.lengths[seq_id]
        self.kv[:, self.rows[seq_id], position] = key, value
        self.lengths[seq_id] += 1

    def read(self, seq_id: int) -> tuple[np.ndarray, np.ndarray]:
        """(keys, values) of all its tokens, [tokens, layers, heads, head_dim] each."""
        keys, values = self.kv[:, self.rows[seq_id], : self.lengths[seq_id]]
        return keys, values

    def finish(self, seq_id: int) -> None:
        self.free_rows.append(self.rows.pop(seq_id))
        del self.lengths[seq_id]

    @property
    def wasted_tokens(self) -> int:
        """Reserved, but holding nothing."""
        return len(self.rows) * self.max_seq_len - sum(self.lengths.values())


# --- 3. blocks -----------------------------------------------------------------------------------------------


class OutOfBlocks(Exception):
    """The pool has fewer free blocks than were asked for."""


class BlockAllocator:
    """`num_blocks` equal blocks. A block is free exactly when nobody refers to it.

    References are counted per block, not per sequence: any number of sequences may hold the same one.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free_list = deque(range(num_blocks))
        self.ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self.free_list)

    def allocate(self) -> int:
        """A free block, with one reference to it."""
        if not self.free_list:
            raise OutOfBlocks("no free block")
        block = self.free_list.popleft()
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        self.ref_counts[block] += 1

    def release(self, block: int) -> None:
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            self.free_list.append(block)


# --- 4. tables -----------------------------------------------------------------------------------------------


class BlockTables:
    """Logical to physical: token t of a sequence is in block `table[t // block_size]` at offset `t % block_size`.

    Blocks are taken when a sequence crosses into them, never ahead. Whoever writes to a block that others hold, too,
    gets a copy first.
    """

    def __init__(self, num_blocks: int, block_size: int = 16) -> None:
        self.block_size = block_size
        self.allocator = BlockAllocator(num_blocks)
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def start(self, seq_id: int) -> None:
        self.tables[seq_id], self.lengths[seq_id] = [], 0

    def translate(self, seq_id: int, token: int) -> tuple[int, int]:
        """(physical block, offset in it) of a token: the walk through the page table."""
        if not 0 <= token < self.lengths[seq_id]:
            raise IndexError(f"token {token} of a sequence of {self.lengths[seq_id]}")
        return self.tables[seq_id][token // self.block_size], token % self.block_size

    def extend(self, seq_id: int, num_tokens: int) -> list[tuple[int, int]]:
        """Room for `num_tokens` more. Returns the copies to make first, as (from block, to block).

        Raises `OutOfBlocks` and changes nothing when the pool has not enough.
        """
        table, length = self.tables[seq_id], self.lengths[seq_id]
        copies_tail = num_tokens > 0 and self._tail_is_shared(seq_id)
        num_new = -(-(length + num_tokens) // self.block_size) - len(table)
        if num_new + copies_tail > self.allocator.num_free:
            raise OutOfBlocks(f"{num_new + copies_tail} blocks needed, {self.allocator.num_free} free")
        copies = [self._copy_on_write(table)] if copies_tail else []
        table.extend(self.allocator.allocate() for _ in range(num_new))
        self.lengths[seq_id] += num_tokens
        return copies

    def _tail_is_shared(self, seq_id: int) -> bool:
        """Whether the next token goes into a block that somebody else refers to."""
        table, length = self.tables[seq_id], self.lengths[seq_id]
        return length % self.block_size != 0 and self.allocator.ref_counts[table[-1]] > 1

    def _copy_on_write(self, table: list[int]) -> tuple[int, int]:
        """Replace the last block of `table` by one of its own."""
        shared, table[-1] = table[-1], self.allocator.allocate()
        self.allocator.release(shared)
        return shared, table[-1]

    def fork(self, parent_id: int, child_id: int, num_tokens: int | None = None) -> None:
        """Let `child_id` begin with the parent's first tokens (all, unless told), without copying any of them."""
        length = self.lengths[parent_id] if num_tokens is None else num_tokens
        if not 0 <= length <= self.lengths[parent_id]:
            raise ValueError(f"cannot share {length} tokens of {self.lengths[parent_id]}")
        table = self.tables[parent_id][: -(-length // self.block_size)]
        for block in table:
            self.allocator.share(block)
        self.tables[child_id], self.lengths[child_id] = table, length

    def finish(self, seq_id: int) -> None:
        """Give up all references, last block first, so that what others may begin with is reused last."""
        for block in reversed(self.tables.pop(seq_id)):
            self.allocator.release(block)
        del self.lengths[seq_id]

    @property
    def num_used_blocks(self) -> int:
        return self.allocator.num_blocks - self.allocator.num_free

    @property
    def wasted_tokens(self) -> int:
        """Empty places in last blocks: at most block_size - 1 for each sequence."""
        return sum(len(table) * self.block_size - self.lengths[seq] for seq, table in self.tables.items())


# --- 5. keys and values in blocks ----------------------------------------------------------------------------


class PagedCache:
    """`kv` is [2, blocks, block_size, layers, heads, head_dim]: as many bytes as the blocks hold, in any order."""

    def __init__(
        self, num_blocks: int, block_size: int = 16, num_layers: int = 1, num_heads: int = 1, head_dim: int = 4
    ) -> None:
        self.blocks = BlockTables(num_blocks, block_size)
        self.kv = np.zeros((2, num_blocks, block_size, num_layers, num_heads, head_dim), np.float32)

    def start(self, seq_id: int) -> None:
        self.blocks.start(seq_id)

    def append(self, seq_id: int, key: np.ndarray, value: np.ndarray) -> None:
        """key, value: [layers, heads, head_dim] of one token."""
        for source, target in self.blocks.extend(seq_id, 1):
            self.kv[:, target] = self.kv[:, source]
        block, offset = self.blocks.translate(seq_id, self.blocks.lengths[seq_id] - 1)
        self.kv[:, block, offset] = key, value

    def read(self, seq_id: int, token: int) -> tuple[np.ndarray, np.ndarray]:
        """(key, value) of one token."""
        block, offset = self.blocks.translate(seq_id, token)
        return self.kv[0, block, offset], self.kv[1, block, offset]

    def fork(self, parent_id: int, child_id: int) -> None:
        self.blocks.fork(parent_id, child_id)

    def finish(self, seq_id: int) -> None:
        self.blocks.finish(seq_id)


# --- 6. attention --------------------------------------------------------------------------------------------


def dense_attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One query [heads, head_dim] over keys and values [tokens, heads, head_dim] that lie in a row."""
    scores = np.einsum("hd,thd->ht", query, keys) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("ht,thd->hd", weights / weights.sum(axis=1, keepdims=True), values)


def paged_attention(query: np.ndarray, cache: PagedCache, seq_id: int, layer: int = 0) -> np.ndarray:
    """The same over a block table, block by block, with the softmax kept up as it goes (online softmax).

    No row is ever gathered: for each block the running maximum may grow, and what was summed before is scaled to it.
    """
    length, block_size = cache.blocks.lengths[seq_id], cache.blocks.block_size
    largest = np.full(query.shape[0], -np.inf)
    total, weighted = np.zeros(query.shape[0]), np.zeros(query.shape)
    for index, block in enumerate(cache.blocks.tables[seq_id]):
        valid = min(block_size, length - index * block_size)  # the last block may be partly empty
        keys, values = cache.kv[:, block, :valid, layer]
        scores = np.einsum("hd,thd->ht", query, keys) / np.sqrt(query.shape[-1])
        new_largest = np.maximum(largest, scores.max(axis=1))
        scale, weights = np.exp(largest - new_largest), np.exp(scores - new_largest[:, None])
        total = total * scale + weights.sum(axis=1)
        weighted = weighted * scale[:, None] + np.einsum("ht,thd->hd", weights, values)
        largest = new_largest
    return weighted / total[:, None]


# --- the claims ----------------------------------------------------------------------------------------------


def check_reading_back(num_tokens: int = 1000) -> None:
    """What was appended is read back, though its blocks lie anywhere, and attention gives what it gives over a row."""
    rng = np.random.default_rng(0)
    paged, row = PagedCache(200, num_heads=2), ContiguousCache(1, num_tokens, num_heads=2)
    for other in (8, 9):  # a stranger between each two tokens, so that no two blocks of ours are neighbours
        paged.start(other)
    paged.start(1), row.start(1)
    for t in range(num_tokens):
        key, value = rng.standard_normal((2, 1, 2, 4)).astype(np.float32)
        paged.append(1, key, value), row.append(1, key, value)
        paged.append(8 if t % 2 else 9, key, value)
    keys, values = row.read(1)
    assert all(np.array_equal(paged.read(1, t)[0], keys[t]) for t in range(num_tokens))
    query = rng.standard_normal((2, 4))
    assert np.allclose(paged_attention(query, paged, 1), dense_attention(query, keys[:, 0], values[:, 0]))


def check_copy_on_write() -> tuple[int, int]:
    """Two branches from token 100 share what neither writes to: blocks 0 to 5. Block 6 holds 96 to 99 and is copied."""
    cache = PagedCache(100)
    cache.start(1)
    for t in range(100):
        cache.append(1, np.full((1, 1, 4), t), np.full((1, 1, 4), t))
    cache.fork(1, 2)
    assert cache.blocks.tables[1] == cache.blocks.tables[2]
    for t in range(50):
        cache.append(1, np.full((1, 1, 4), 1000 + t), np.zeros((1, 1, 4)))
        cache.append(2, np.full((1, 1, 4), 2000 + t), np.zeros((1, 1, 4)))
    one, two = cache.blocks.tables[1], cache.blocks.tables[2]
    shared = sum(a == b for a, b in zip(one, two, strict=True))
    assert one[:6] == two[:6] and all(a != b for a, b in zip(one[6:], two[6:], strict=True))
    assert cache.read(1, 100)[0].max() == 1000 and cache.read(2, 100)[0].max() == 2000
    assert cache.read(1, 99)[0].max() == cache.read(2, 99)[0].max() == 99
    cache.finish(1), cache.finish(2)
    assert cache.blocks.num_used_blocks == 0 and not any(cache.blocks.allocator.ref_counts)
    return shared, len(one) - shared


if __name__ == "__main__":
    check_reading_back()
    print("1000 tokens read back from scattered blocks; attention over them equals attention over a row")
    print("forked at token 100: {} blocks stay shared, {} part".format(*check_copy_on_write()))
