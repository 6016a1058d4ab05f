"""Safetensors files as tensors that stay in their files: memory-mapped, read ahead by threads, let go when used.

`open_weights` is handed files and checks all their headers before a byte of weights is read. Tensors come in a fixed
order (file by file, as they lie in the file) whatever the threads do, so the first error is always the same one.
Reading ahead means touching one byte in every page: the threads wait for the disk, several places at a time, and
whoever copies the tensor afterwards finds its pages mapped. Nothing is copied on the way, and at most
`READ_AHEAD_BYTES` beyond the tensor in use are mapped: used pages are given back at once.
"""

import json
import mmap
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mini_vllm.exceptions import CheckpointError
from mini_vllm.weight_files import INDEX_FILE, without_duplicates

READ_AHEAD_BYTES = 64 << 20
READ_PIECE_BYTES = 8 << 20
READER_THREADS = 4
PROGRESS_DELAY_SECONDS = 1.0
"""Loading that takes less shows no bar."""
_WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LENGTH_BYTES = 8
"""A file begins with the length of its header, an unsigned 64-bit number."""


@dataclass
class LazyTensor:
    """A tensor that stays in its file; `narrow` is a view of just that part. start, stop: where its bytes are."""

    name: str
    shape: Sequence[int]
    dtype: str
    start: int
    stop: int
    file: "MappedFile" = field(repr=False)

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """Raises `CheckpointError` for a tensor that holds no floating-point weights."""
        return self._whole().narrow(dim, start, length)

    def _whole(self) -> torch.Tensor:
        dtype = _WEIGHT_DTYPES.get(self.dtype)
        if dtype is None:
            raise CheckpointError(f"is stored as {self.dtype}, not as floats, in {self.file.path.name}")
        count = self.num_bytes // dtype.itemsize
        if not count:
            return torch.empty(tuple(self.shape), dtype=dtype, device="cpu")
        return torch.frombuffer(self.file.mapping, dtype=dtype, count=count, offset=self.start).view(tuple(self.shape))


class MappedFile:
    """One safetensors file, its header checked and its bytes mapped.

    expected: the tensor names its index promises; None without an index. Raises `CheckpointError` for a file that is
    damaged, cut short, or holds other tensors than those.
    """

    def __init__(self, path: Path, expected: frozenset[str] | None) -> None:
        self.path = path
        _check_with_library(path)
        with open(path, "rb") as file:
            # Private and writable only because torch warns of buffers that are not; nothing is ever written.
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self.descriptor = os.dup(file.fileno())
        self.tensors = sorted(self._read_header(), key=lambda tensor: tensor.start)
        names = frozenset(tensor.name for tensor in self.tensors)
        if expected is not None and names != expected:
            self.close()
            raise CheckpointError(
                f"{path.name}: does not hold what {INDEX_FILE} says: {', '.join(sorted(names ^ expected)[:8])}"
            )

    def _read_header(self) -> Iterator[LazyTensor]:
        data = _LENGTH_BYTES + int.from_bytes(self.mapping[:_LENGTH_BYTES], "little")
        try:
            header = json.loads(self.mapping[_LENGTH_BYTES:data], object_pairs_hook=without_duplicates)
        except ValueError as error:
            self.close()
            raise CheckpointError(f"{self.path.name}: not a whole safetensors file: {error}") from error
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            yield LazyTensor(name, tuple(entry["shape"]), entry["dtype"], data + start, data + stop, self)

    def read(self, start: int, stop: int) -> None:
        """Wait until these bytes are in memory and mapped. Runs in threads: both calls release the GIL."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)
        np.bitwise_or.reduce(np.frombuffer(self.mapping, np.uint8, stop - start, start)[:: mmap.PAGESIZE])

    def forget(self, start: int, stop: int) -> None:
        """Unmap the whole pages among these bytes. A tensor that is used again is read from the file again."""
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and last > first:
            self.mapping.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Let go of the file. Tensors that somebody still holds keep the mapping until they go."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        try:
            self.mapping.close()
        except BufferError:
            return


def _check_with_library(path: Path) -> None:
    """The library checks lengths, offsets, shapes and types against the file's size, before anything is allocated."""
    try:
        with safe_open(path, framework="pt", device="cpu"):
            return
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name}: not a whole safetensors file: {error}") from error


class WeightFiles:
    """The files of one checkpoint, open. A context manager: leaving it closes them and ends the reading threads.

    wait_seconds: how long `tensors` waited for the disk so far.
    """

    def __init__(self, files: Mapping[Path, frozenset[str] | None]) -> None:
        self._files: list[MappedFile] = []
        self._pool: ThreadPoolExecutor | None = None
        self.wait_seconds = 0.0
        try:
            for path, expected in files.items():
                self._files.append(MappedFile(path, expected))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for file in self._files:
            file.close()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for file in self._files for tensor in file.tensors)

    @property
    def num_files(self) -> int:
        return len(self._files)

    def tensors(self, use_tqdm: bool = False) -> Iterator[tuple[str, LazyTensor]]:
        """(name, tensor) of each, in order. A tensor's pages are given back when the next one is asked for."""
        self._pool = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="read-weights")
        with _progress(self.total_bytes, use_tqdm) as progress:
            for tensor, pieces in self._read_ahead(self._pool):
                start = time.perf_counter()
                _wait(tensor, pieces)
                self.wait_seconds += time.perf_counter() - start
                yield tensor.name, tensor
                tensor.file.forget(tensor.start, tensor.stop)
                progress.update(tensor.num_bytes)

    def _read_ahead(self, pool: ThreadPoolExecutor) -> Iterator[tuple[LazyTensor, "Pieces"]]:
        """Each tensor with its readings under way; those of the next `READ_AHEAD_BYTES` are begun before it is used."""
        waiting = deque(tensor for file in self._files for tensor in file.tensors)
        window: deque[tuple[LazyTensor, Pieces]] = deque()
        ahead = 0
        while waiting or window:
            if window:
                current = window.popleft()
                ahead -= current[0].num_bytes
            else:
                current = _begin(pool, waiting.popleft())
            while waiting and ahead + waiting[0].num_bytes <= READ_AHEAD_BYTES:
                ahead += waiting[0].num_bytes
                window.append(_begin(pool, waiting.popleft()))
            yield current


Pieces = list[Future[None]]
"""Readings under way, which together cover one tensor."""


def _wait(tensor: LazyTensor, pieces: Pieces) -> None:
    try:
        for piece in pieces:
            piece.result()
    except OSError as error:
        raise CheckpointError(f"{tensor.file.path.name}: tensor {tensor.name} cannot be read: {error}") from error


def _begin(pool: ThreadPoolExecutor, tensor: LazyTensor) -> tuple[LazyTensor, Pieces]:
    return tensor, [pool.submit(tensor.file.read, *piece) for piece in _pieces(tensor)]


def _pieces(tensor: LazyTensor) -> Iterable[tuple[int, int]]:
    return pairwise([*range(tensor.start, tensor.stop, READ_PIECE_BYTES), tensor.stop])


def _progress(total_bytes: int, use_tqdm: bool) -> Any:
    """A bar over bytes; none where standard error is no terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024,
        desc="Loading safetensors", disable=None if use_tqdm else True, delay=PROGRESS_DELAY_SECONDS,
    )  # fmt: skip
