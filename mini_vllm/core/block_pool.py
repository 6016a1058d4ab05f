"""Physical blocks of KV cache: who is free, who is shared, and which prefix each one holds.

Metadata only: the pool hands out block ids, the tensors live in the worker. A block is in the free queue
exactly when nobody references it; being cached does not make it unusable. The order of the free queue is
the eviction policy: least recently freed first, and within one request the tail before the prefix,
because tables are freed tail-first.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mini_vllm.core.interfaces import KVCacheEvent, KVEventSink
from mini_vllm.request import Request

BlockHash = bytes
"""SHA-256 of a block's tokens, everything before them and what else its KV depends on."""

NONE_HASH: BlockHash = bytes(32)
"""Parent of a first block."""


def encode_extra_key(tag: bytes, payload: bytes) -> bytes:
    """One typed, length-prefixed key, so that no two lists of keys encode alike."""
    return tag + len(payload).to_bytes(4, "little") + payload


def extra_keys(request: Request, start: int, end: int) -> bytes:
    """What the KV of tokens [start, end) depends on beside the tokens.

    Adapter and salt go into the first block only: later blocks inherit them through their parent.
    """
    keys = b""
    if start == 0 and request.lora_request is not None:
        lora = request.lora_request
        keys += encode_extra_key(b"L", lora.lora_name.encode())
        keys += encode_extra_key(b"E", str(lora.load_epoch).encode())
    if start == 0 and request.cache_salt is not None:
        keys += encode_extra_key(b"S", request.cache_salt.encode())
    for feature in request.mm_features:
        if feature.offset < end and start < feature.offset + feature.length:
            keys += encode_extra_key(b"M", feature.content_hash.encode())
            keys += encode_extra_key(b"O", str(feature.offset - start).encode())
    return keys


def hash_block_tokens(parent: BlockHash | None, token_ids: Sequence[int], extra: bytes = b"") -> BlockHash:
    """Chained hash of one full block: equal hashes mean equal prefixes from the first token on."""
    tokens = len(token_ids).to_bytes(4, "little") + array("I", token_ids).tobytes()
    return hashlib.sha256((parent or NONE_HASH) + tokens + extra).digest()


def extend_block_hashes(request: Request, num_blocks: int, block_size: int) -> list[BlockHash]:
    """Compute the request's hashes up to `num_blocks` full blocks; each is computed once in its life."""
    hashes, token_ids = request.block_hashes, request.all_token_ids
    parent = hashes[-1] if hashes else None
    for start in range(len(hashes) * block_size, num_blocks * block_size, block_size):
        end = start + block_size
        extra = extra_keys(request, start, end) if start == 0 or request.mm_features else b""
        parent = hash_block_tokens(parent, token_ids[start:end], extra)
        hashes.append(parent)
    return hashes


@dataclass(slots=True, eq=False)
class KVCacheBlock:
    """One physical block. The links belong to the free queue alone."""

    block_id: int
    ref_cnt: int = 0
    block_hash: bytes | None = None
    """Key in the pool's index (hash and group) while the block is findable."""
    is_null: bool = False
    prev_free: "KVCacheBlock | None" = field(default=None, repr=False)
    next_free: "KVCacheBlock | None" = field(default=None, repr=False)

    def reset_hash(self) -> None:
        self.block_hash = None


class FreeKVCacheBlockQueue:
    """Doubly linked list through the blocks themselves: O(1) at both ends and in the middle, no allocation.

    Front: next to be evicted. The two sentinels are never handed out.
    """

    def __init__(self, blocks: Iterable[KVCacheBlock]) -> None:
        self._head = KVCacheBlock(-1)
        self._tail = KVCacheBlock(-1)
        self._head.next_free = self._tail
        self._tail.prev_free = self._head
        self.num_free_blocks = 0
        for block in blocks:
            self.append(block)

    def append(self, block: KVCacheBlock) -> None:
        last = self._tail.prev_free
        assert last is not None
        last.next_free = block
        block.prev_free = last
        block.next_free = self._tail
        self._tail.prev_free = block
        self.num_free_blocks += 1

    def remove(self, block: KVCacheBlock) -> None:
        before, after = block.prev_free, block.next_free
        if before is None or after is None:
            raise RuntimeError(f"block {block.block_id} is not in the free queue")
        before.next_free = after
        after.prev_free = before
        block.prev_free = block.next_free = None
        self.num_free_blocks -= 1

    def popleft(self) -> KVCacheBlock:
        if self.num_free_blocks == 0:
            raise ValueError("no free blocks")
        block = self._head.next_free
        assert block is not None
        self.remove(block)
        return block

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        if n > self.num_free_blocks:
            raise ValueError(f"{n} blocks asked for, {self.num_free_blocks} free")
        blocks = []
        block = self._head.next_free
        for _ in range(n):
            assert block is not None
            blocks.append(block)
            following = block.next_free
            block.prev_free = block.next_free = None
            block = following
        assert block is not None
        self._head.next_free = block
        block.prev_free = self._head
        self.num_free_blocks -= n
        return blocks

    def append_n(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            self.append(block)

    def __iter__(self) -> Iterator[KVCacheBlock]:
        block = self._head.next_free
        while block is not None and block is not self._tail:
            yield block
            block = block.next_free

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """Every free block, next to be evicted first."""
        return list(self)


class BlockHashIndex:
    """Hash -> every block that holds that content. Identical blocks are not merged: tables never change ids."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, dict[int, KVCacheBlock]] = {}

    def insert(self, key: bytes, block: KVCacheBlock) -> None:
        self._blocks.setdefault(key, {})[block.block_id] = block

    def get_one(self, key: bytes) -> KVCacheBlock | None:
        """The block that has been findable longest."""
        holders = self._blocks.get(key)
        return next(iter(holders.values())) if holders else None

    def remove(self, key: bytes, block: KVCacheBlock) -> None:
        holders = self._blocks[key]
        del holders[block.block_id]
        if not holders:
            del self._blocks[key]

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def items(self) -> Iterator[tuple[bytes, KVCacheBlock]]:
        for key, holders in self._blocks.items():
            for block in holders.values():
                yield key, block


def index_key(block_hash: BlockHash, group: int) -> bytes:
    """Groups keep their prefixes apart: the same tokens mean other KV in another kind of layer."""
    return block_hash + group.to_bytes(2, "little")


class BlockPool:
    """All blocks of one cache. Block 0 is the null block: padding, never free, never cached, never counted.

    Raises ValueError when asked for more blocks than are free; callers check first.
    """

    def __init__(self, num_blocks: int, enable_caching: bool = True, *, event_sink: KVEventSink | None = None) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks: at least 2 (one is the null block), got {num_blocks}")
        self.num_blocks = num_blocks
        self.enable_caching = enable_caching
        self.blocks = [KVCacheBlock(i) for i in range(num_blocks)]
        self.free_queue = FreeKVCacheBlockQueue(self.blocks)
        self.cached_block_hash_to_block = BlockHashIndex()
        self.null_block = self.free_queue.popleft()
        self.null_block.is_null = True
        self._event_sink = event_sink

    @property
    def num_usable_blocks(self) -> int:
        return self.num_blocks - 1

    def get_num_free_blocks(self) -> int:
        return self.free_queue.num_free_blocks

    def get_usage(self) -> float:
        """Share of usable blocks that someone references: 0.0 when idle."""
        return 1.0 - self.free_queue.num_free_blocks / self.num_usable_blocks

    def get_new_blocks(self, n: int) -> list[KVCacheBlock]:
        """`n` blocks with one reference each; what they cached is forgotten now, not before."""
        if n > self.free_queue.num_free_blocks:
            raise ValueError(f"{n} blocks asked for, {self.free_queue.num_free_blocks} free")
        blocks = self.free_queue.popleft_n(n)
        for block in blocks:
            if block.block_hash is not None:
                self.uncache(block)
            block.ref_cnt = 1
        return blocks

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """One more reference to each; a free block leaves the queue, wherever it stands in it."""
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                self.free_queue.remove(block)
            block.ref_cnt += 1

    def free_blocks(self, blocks: Iterable[KVCacheBlock]) -> None:
        """One reference less to each, in eviction order; contents stay findable until the block is reused."""
        for block in blocks:
            block.ref_cnt -= 1
            if block.ref_cnt == 0 and not block.is_null:
                self.free_queue.append(block)

    def get_cached_block(self, block_hash: BlockHash, group: int = 0) -> KVCacheBlock | None:
        return self.cached_block_hash_to_block.get_one(index_key(block_hash, group))

    def cache_full_blocks(
        self, blocks: Sequence[KVCacheBlock], hashes: Sequence[BlockHash], group: int = 0
    ) -> list[KVCacheBlock]:
        """Make full blocks findable; null and already findable ones are skipped. Returns those that are new."""
        cached = []
        for block, block_hash in zip(blocks, hashes, strict=True):
            if block.is_null or block.block_hash is not None:
                continue
            block.block_hash = index_key(block_hash, group)
            self.cached_block_hash_to_block.insert(block.block_hash, block)
            if self._event_sink is not None:
                self._emit("stored", block)
            cached.append(block)
        return cached

    def uncache(self, block: KVCacheBlock) -> None:
        """Forget what a block holds (it is about to be reused, or was never written)."""
        if block.block_hash is None:
            return
        self.cached_block_hash_to_block.remove(block.block_hash, block)
        if self._event_sink is not None:
            self._emit("removed", block)
        block.reset_hash()

    def reset_prefix_cache(self) -> None:
        """Forget every prefix. Blocks in use stay with their requests, but nobody will find them."""
        for block in self.blocks:
            self.uncache(block)

    def _emit(self, kind: str, block: KVCacheBlock) -> None:
        if self._event_sink is not None and block.block_hash is not None:
            self._event_sink(KVCacheEvent(kind, block.block_id, block.block_hash))

    def check_integrity(self) -> None:
        """Raise AssertionError if any invariant of the pool is broken. O(num_blocks)."""
        free = self.free_queue.get_all_free_blocks()
        free_ids = {block.block_id for block in free}
        assert len(free) == len(free_ids) == self.free_queue.num_free_blocks, "free queue counts wrong"
        for block in self.blocks:
            assert block.ref_cnt >= 0, f"block {block.block_id}: negative references"
            should_be_free = block.ref_cnt == 0 and not block.is_null
            assert (block.block_id in free_ids) == should_be_free, f"block {block.block_id}: free <=> unreferenced"
        assert self.null_block.block_hash is None, "the null block is cached"
        findable = 0
        for key, block in self.cached_block_hash_to_block.items():
            assert block.block_hash == key, f"block {block.block_id}: stale hash in the index"
            findable += 1
        assert findable == sum(block.block_hash is not None for block in self.blocks), "a hash is not in the index"
