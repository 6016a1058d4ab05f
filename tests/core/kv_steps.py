"""Single moves on a block manager, as the scheduler would make them, and looks into its books."""

from typing import Any

from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.request import Request


def prefill(kv: KVCacheManager, request: Request, n: int | None = None, *, confirm: bool = True) -> int | None:
    """Admit a request as the scheduler would; cached tokens, or None when there was no room."""
    blocks, num_cached = kv.get_computed_blocks(request)
    request.num_computed_tokens = num_cached
    n = request.num_tokens - num_cached if n is None else n
    if kv.allocate_slots(request, n, blocks) is None:
        request.num_computed_tokens = 0
        return None
    request.num_computed_tokens += n
    if confirm:
        kv.confirm_step()
    kv.check_integrity()
    return num_cached


def decode(kv: KVCacheManager, request: Request, token_id: int = 7) -> bool:
    """One decode step: the newest token gets its slot, whose KV is written, and another is sampled."""
    request.append_output_token(token_id)
    if kv.allocate_slots(request, 1) is None:
        return False
    request.num_computed_tokens += 1
    kv.confirm_step()
    return True


def table(kv: KVCacheManager, request: Request) -> list[int]:
    return kv.block_ids(request.request_id)[0]


def ref_counts(kv: KVCacheManager, request: Request) -> list[int]:
    return [kv.block_pool.blocks[block_id].ref_cnt for block_id in table(kv, request)]


def free_ids(kv: KVCacheManager) -> list[int]:
    return [block.block_id for block in kv.block_pool.free_queue.get_all_free_blocks()]


def kv_snapshot(kv: KVCacheManager) -> Any:
    """Everything that an operation which "touched nothing" must have left as it was."""
    return (
        [block.block_id for block in kv.block_pool.free_queue.get_all_free_blocks()],
        [(block.ref_cnt, block.block_hash) for block in kv.block_pool.blocks],
        sorted((key, block.block_id) for key, block in kv.block_pool.cached_block_hash_to_block.items()),
        {request_id: kv.block_ids(request_id) for request_id in kv._tables},
        dict(kv._num_cached_blocks),
        [{request_id: list(blocks) for request_id, blocks in p.provisional.items()} for p in kv._unconfirmed.values()],
        [dict(p.deferred) for p in kv._unconfirmed.values()],
    )
