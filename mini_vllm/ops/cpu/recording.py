"""Steps recorded once and replayed: the counterpart of a CUDA graph on a CPU.

Inside `record(...)` the forward runs as always, but kernels (`kernel.Kernel`) only note down their arguments: addresses
in an arena where every tensor of the step has its place, for the largest number of tokens. Replaying calls the kernels
in that order with today's number of tokens, all in one native call: no Python between them, no allocation. Since rows
lie one after the other whatever their number, one recording serves every number up to the largest.

Operators of torch inside the forward run between native stretches, on the same places (`TorchCall`): nothing is refused
for using them, it only gains less. What cannot be replayed with fewer tokens raises `CannotRecord`: a result that does
not have the tokens as its first and outermost dimension, or a decision on a value.
"""

import ctypes
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from mini_vllm.ops.cpu import library
from mini_vllm.ops.cpu.kernel import Kernel, recorder

ALIGNMENT = 64
MIN_KERNELS_PER_BREAK = 4
FEW_BREAKS = 8
"""So many operators of torch are always allowed; more only with `MIN_KERNELS_PER_BREAK` kernels to each."""
_DECISIONS = frozenset(
    "item tolist numpy nonzero is_nonzero __bool__ __int__ __float__ __index__ __contains__ equal allclose".split()
)


class CannotRecord(Exception):
    """The forward does something that cannot be replayed with another number of tokens; the message says what."""


class TooManyBreaks(Exception):
    """Operators of torch come so often between the kernels that replaying would save nothing."""


class Arena:
    """Memory for the tensors of one recording; a place is used again as soon as no tensor lies there any more."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[np.ndarray[Any, Any]]] = defaultdict(list)
        self._places: list[np.ndarray[Any, Any]] = []
        self._ends: dict[int, int] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A dense tensor of zeros or of what was there before."""
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        size = max(1, -(-num_bytes // ALIGNMENT)) * ALIGNMENT
        place = self._free[size].pop() if self._free[size] else self._new_place(size)
        lease = place[:]  # torch keeps this view alive as long as the memory is in use
        weakref.finalize(lease, self._free[size].append, place).atexit = False
        return torch.from_numpy(lease)[:num_bytes].view(dtype).view(tuple(shape))

    def holds(self, address: int) -> bool:
        """Whether `address` is in the arena."""
        return any(start <= address < end for start, end in self._ends.items())

    @property
    def num_bytes(self) -> int:
        return sum(place.nbytes for place in self._places)

    def _new_place(self, size: int) -> "np.ndarray[Any, Any]":
        memory = np.zeros(size + ALIGNMENT, dtype=np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        place = memory[start : start + size]
        self._places.append(place)
        self._ends[place.ctypes.data] = place.ctypes.data + size
        return place


class _Call(ctypes.Structure):
    """`ProgramCall` in program.cpp."""

    _fields_ = [("kernel", ctypes.c_void_p), ("args", ctypes.c_void_p), ("rows_per_token", ctypes.c_int64)]


class NativeStretch:
    """Kernels one after the other, as one native call."""

    def __init__(self, calls: Sequence[tuple[Kernel, ctypes.Structure, int]]) -> None:
        self.names = [kernel.name for kernel, _, _ in calls]
        self._keep = [args for _, args, _ in calls]
        self._calls = (_Call * len(calls))(
            *(_Call(ctypes.cast(k.function, ctypes.c_void_p), ctypes.addressof(args), n) for k, args, n in calls)
        )
        self._address = ctypes.addressof(self._calls)
        self._run = library.function("mv_run_program", [ctypes.c_void_p] + [ctypes.c_int64] * 2, ctypes.c_int64)

    def __call__(self, num_tokens: int) -> None:
        failed = self._run(self._address, len(self.names), num_tokens)
        if failed:
            raise RuntimeError(f"{self.names[failed - 1]} failed in a recorded step of {num_tokens} tokens")


class TorchCall:
    """An operator of torch between two stretches: the same one, on the first rows of the same places."""

    def __init__(self, func: Any, args: Any, kwargs: Any, results: Sequence[torch.Tensor], recording: "Recording"):
        self.name = _name(func)
        self._func, self._args, self._kwargs, self._results = func, args, kwargs, results
        self._recording = recording

    def __call__(self, num_tokens: int) -> None:
        def narrow(leaf: Any) -> Any:
            return self._recording.first_rows(leaf, num_tokens)

        found = self._func(*tree_map(narrow, self._args), **tree_map(narrow, self._kwargs))
        for result, now in zip(self._results, _tensors(found), strict=True):
            to = narrow(result)
            if to.data_ptr() != now.data_ptr():
                to.copy_(now)


class Recording(TorchFunctionMode):
    """What is noted down while a forward of `num_tokens` tokens runs; `inputs` are the tensors that it is handed."""

    def __init__(self, num_tokens: int, inputs: Sequence[torch.Tensor], few_breaks: int = FEW_BREAKS) -> None:
        super().__init__()
        self.num_tokens, self.few_breaks = num_tokens, few_breaks
        self.arena = Arena()
        self._inputs = [(x.data_ptr(), x.data_ptr() + x.numel() * x.itemsize) for x in inputs]
        self._native: list[tuple[Kernel, ctypes.Structure, int]] = []
        self.pieces: list[Callable[[int], None]] = []
        self.num_kernels = self.num_breaks = 0

    # -- kernels -----------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A place in the arena."""
        with torch._C.DisableTorchFunction():
            return self.arena.empty(shape, dtype)

    def add(self, kernel: Kernel, args: ctypes.Structure, rows: int) -> None:
        """A kernel that would run now. Raises `CannotRecord` if its rows are not those of the step's tokens."""
        if rows % self.num_tokens or not rows:
            raise CannotRecord(f"{kernel.name} has {rows} rows for {self.num_tokens} tokens")
        self._native.append((kernel, args, rows // self.num_tokens))
        self.num_kernels += 1

    def finish(self) -> list[Callable[[int], None]]:
        """All pieces in order."""
        self._close_stretch()
        return self.pieces

    def _close_stretch(self) -> None:
        if self._native:
            self.pieces.append(NativeStretch(self._native))
            self._native = []

    # -- operators of torch --------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _name(func) in _DECISIONS and any(map(self.is_of_step, _tensors(args))):
            raise CannotRecord(f"{_name(func)} decides on a value")
        found = func(*args, **kwargs)
        results, writes = _tensors(found), _writes(func, kwargs)
        if not results and not writes:
            return found  # a question about a tensor
        touched = [x for x in _tensors((args, kwargs)) if self.is_of_step(x)]
        if not touched:
            self._require_constant(func, results)
            return found
        if not writes and all(map(self.is_of_step, results)):
            return found  # views: other words for the same places
        self._count_break()
        self._require_rows(func, touched)
        placed = [x if self.is_of_step(x) else self._place(func, x) for x in results]
        self._close_stretch()
        self.pieces.append(TorchCall(func, args, kwargs, placed, self))
        left = iter(placed)
        return tree_map(lambda leaf: next(left) if isinstance(leaf, torch.Tensor) else leaf, found)

    def _count_break(self) -> None:
        self.num_breaks += 1
        if self.num_breaks > max(self.few_breaks, self.num_kernels / MIN_KERNELS_PER_BREAK):
            raise TooManyBreaks

    def first_rows(self, leaf: Any, num_tokens: int) -> Any:
        """A tensor of the step cut to its first `num_tokens`; anything else as it is."""
        if isinstance(leaf, torch.Tensor) and self.is_of_step(leaf):
            return leaf[: num_tokens * (leaf.shape[0] // self.num_tokens)]
        return leaf

    def is_of_step(self, x: torch.Tensor) -> bool:
        """Whether a tensor lies where the step's inputs or results do."""
        if x.layout is not torch.strided:
            return False  # a packed weight, whose memory is nobody's business
        address = x.data_ptr()
        return any(start <= address < end for start, end in self._inputs) or self.arena.holds(address)

    def _require_constant(self, func: Any, results: Sequence[torch.Tensor]) -> None:
        if any(x.dim() and x.shape[0] == self.num_tokens for x in results):
            raise CannotRecord(f"{_name(func)} makes something of the number of tokens")

    def _require_rows(self, func: Any, touched: Sequence[torch.Tensor]) -> None:
        """What an operator reads must be cut at a number of tokens by its first dimension."""
        for x in touched:
            if x.dim() == 0 or x.shape[0] % self.num_tokens or x.stride(0) < max(x.stride()):
                raise CannotRecord(f"{_name(func)} is given {list(x.shape)}, not one row or more for each token")

    def _place(self, func: Any, result: torch.Tensor) -> torch.Tensor:
        """Where a new result will be found."""
        if result.dim() == 0 or result.shape[0] % self.num_tokens or not result.is_contiguous():
            raise CannotRecord(f"{_name(func)} gives {list(result.shape)}, not one row or more for each token")
        return self.arena.empty(result.shape, result.dtype)


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _writes(func: Any, kwargs: Any) -> bool:
    """Whether a function changes what it is given: by torch's convention the name says so."""
    name = _name(func)
    return "out" in kwargs or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _tensors(found: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]


@contextmanager
def record(num_tokens: int, inputs: Sequence[torch.Tensor], few_breaks: int = FEW_BREAKS) -> Iterator[Recording]:
    """Note down what runs inside. inputs: tensors that keep their addresses, of `num_tokens` rows. few_breaks: so many
    operators of torch are allowed, however few kernels there are."""
    recording = Recording(num_tokens, inputs, few_breaks)
    token = recorder.set(recording)
    try:
        with recording:
            yield recording
    finally:
        recorder.reset(token)
