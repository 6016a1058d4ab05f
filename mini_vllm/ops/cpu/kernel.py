"""Native kernels as Python sees them: a C function of one shape, its arguments a structure, its rows a number.

`Kernel("mv_rms_norm", x=POINTER, width=INT64, ...)` declares one. Calling it runs the function, or, inside
`recording.record()`, notes it down to be run later by a program (see `recording.py`); so whoever is written in kernels
can be recorded without knowing. Their results come from `empty`, for the same reason.
"""

import ctypes
import functools
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from mini_vllm.ops.cpu import library

POINTER, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

OUT_OF_RANGE = 2
"""What a kernel returns for an index that its table does not have."""


class Recorder(Protocol):
    """Takes note of what would run; see `recording.Recording`."""

    def add(self, kernel: "Kernel", args: ctypes.Structure, rows: int) -> None: ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor: ...


recorder: ContextVar[Recorder | None] = ContextVar("mini_vllm_recorder", default=None)


class Kernel:
    """`int name(const Args*, int64_t rows)` of the native library. It does not exist where there is no library."""

    def __init__(self, name: str, /, **fields: Any) -> None:
        self.name = name
        self.Args = type(f"{name}_args", (ctypes.Structure,), {"_fields_": list(fields.items())})

    @functools.cached_property
    def function(self) -> Any:
        """The C function, found when it is first asked for; None without a library."""
        return library.function(self.name, [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int)

    def serves(self, x: torch.Tensor) -> bool:
        """Whether there is a library, and `x` lies where it can be read and is of a type that kernels know."""
        return x.is_cpu and x.dtype in library.DTYPE_CODES and self.function is not None

    def __call__(self, rows: int, *values: Any) -> None:
        """Run for `rows` rows with the values of the fields in their order, or have it noted down.

        Raises IndexError for an index outside a table, RuntimeError for arguments that the kernel does not take.
        """
        args = self.Args(*values)
        noting = recorder.get()
        if noting is not None:
            return noting.add(self, args, rows)
        status = self.function(ctypes.addressof(args), rows)
        if status == OUT_OF_RANGE:
            raise IndexError(f"{self.name}: an index is outside the table")
        if status:
            raise RuntimeError(f"{self.name} does not take such arguments")
        return None


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory on the CPU for what a kernel writes, its first dimension the step's rows."""
    noting = recorder.get()
    return torch.empty(shape, dtype=dtype) if noting is None else noting.empty(shape, dtype)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """As `empty`, of x's shape, type and device; dense."""
    return x.new_empty(x.shape) if recorder.get() is None else empty(x.shape, x.dtype)
