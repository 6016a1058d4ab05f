"""Memory of weights that is used again instead of being given back and asked for anew.

Each layer is filled, packed and its plain weights freed. Blocks of megabytes are a mapping of their own in the C
library: freeing one gives its pages back to the system, and the next layer pays for fresh ones, page by page, which
takes as long as the packing. `recycled_memory` lets the C library keep them.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULT_MMAP_MAX, _DEFAULT_TRIM_THRESHOLD = 65536, 128 << 10
_NEVER = 2**31 - 1


@contextmanager
def recycled_memory() -> Iterator[None]:
    """Inside, freed memory is kept and used again; at the end what is free goes back. Does nothing without glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        libc.malloc_trim(0)
