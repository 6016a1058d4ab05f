"""Free memory that cannot be used: reservations of any length in a row leave holes, blocks do not.

An arena and a block pool of the same size get the same sequences, and lose every second one. Then a request comes
that is smaller than what is free and larger than every hole: the pool takes it, the arena cannot.
"""

from dataclasses import dataclass

import numpy as np

from mini_vllm.core.block_pool import BlockPool
from mini_vllm.exceptions import ConfigError


class FirstFitArena:
    """Places in a row; a reservation goes into the first hole that is long enough."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken: dict[int, tuple[int, int]] = {}

    def holes(self) -> list[tuple[int, int]]:
        """(start, length) of everything free, in order."""
        found, end = [], 0
        for start, length in [*sorted(self.taken.values()), (self.size, 0)]:
            if start > end:
                found.append((end, start - end))
            end = start + length
        return found

    def reserve(self, owner: int, length: int) -> bool:
        """False when no hole is long enough, however much is free in all."""
        start = next((start for start, free in self.holes() if free >= length), None)
        if start is None:
            return False
        self.taken[owner] = (start, length)
        return True

    def release(self, owner: int) -> None:
        del self.taken[owner]


@dataclass(frozen=True)
class ExternalFragmentation:
    """What was found. arena: (start, length) of reservations; pool: places of blocks taken before the request.

    request_blocks: places of those that the pool gave to the request the arena refused.
    """

    num_places: int
    block_size: int
    free_places: int
    largest_hole: int
    request: int
    arena_takes_it: bool
    pool_takes_it: bool
    arena: tuple[tuple[int, int], ...]
    pool: tuple[int, ...]
    request_blocks: tuple[int, ...]


def external_fragmentation(seed: int = 0, num_blocks: int = 24, block_size: int = 4) -> ExternalFragmentation:
    """Random lengths of one to three blocks; every second sequence leaves. Needs at least 8 blocks."""
    if num_blocks < 8:
        raise ConfigError(f"num_blocks: must be at least 8, got {num_blocks}")
    size, rng = num_blocks * block_size, np.random.default_rng(seed)
    arena, pool = FirstFitArena(size), BlockPool(num_blocks + 1, enable_caching=False)
    tables = {}
    for owner, blocks in enumerate(rng.integers(1, 4, num_blocks).tolist()):
        if arena.reserve(owner, blocks * block_size):
            tables[owner] = pool.get_new_blocks(blocks)
    for owner in list(tables)[::2]:
        arena.release(owner)
        pool.free_blocks(reversed(tables.pop(owner)))
    holes = [length for _, length in arena.holes()]
    free, wanted = sum(holes), min(sum(holes), max(holes) + block_size)
    before = [block for table in tables.values() for block in table]
    pool_takes_it = wanted <= pool.get_num_free_blocks() * block_size
    given = pool.get_new_blocks(-(-wanted // block_size)) if pool_takes_it else []
    return ExternalFragmentation(
        num_places=size,
        block_size=block_size,
        free_places=free,
        largest_hole=max(holes),
        request=wanted,
        arena=tuple(sorted(arena.taken.values())),
        arena_takes_it=arena.reserve(-1, wanted),
        pool_takes_it=pool_takes_it,
        pool=tuple((block.block_id - 1) * block_size for block in before),
        request_blocks=tuple((block.block_id - 1) * block_size for block in given),
    )
