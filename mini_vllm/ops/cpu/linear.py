"""Linear layers on quantised weights: packing them once, and y = x W^T + bias for any number of rows.

`PackedLinear` holds one layer's weights in the layout of the native kernels (`csrc/gemm.h`) and calls them; every row
of its result depends on that row of x alone. The same products in plain torch are in `linear_ref.py`: what kernels
are tested against, and what computes where no library could be built.
"""

import ctypes
import functools
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mini_vllm.ops.cpu import library

WeightType = Literal["int8", "int4"]
ActivationType = Literal["none", "token", "group"]

PANEL = 32
"""Output channels side by side in memory."""
WIDE = 64
"""Output channels side by side of floating-point weights."""
_KINDS = {"int8": 1, "int4": 2, "bf16": 3, "float": 4}
_ACTIVATIONS = {"none": 0, "token": 1, "group": 2}


@dataclass(frozen=True)
class LinearFormat:
    """How weights and activations become integers.

    weights: 'int8' has a scale for each output channel, 'int4' one for each `group_size` inputs of a channel, and if
        not `symmetric` a minimum.
    activations: 'token' and 'group' are int8 with a scale for each row, or for each `group_size` of a row; 'none'
        leaves them as they are (int8 weights only).
    """

    weights: WeightType
    activations: ActivationType = "token"
    group_size: int = 32
    symmetric: bool = True

    @property
    def granule(self) -> int:
        """Inputs are padded to a multiple of this."""
        return self.group_size if self.weights == "int4" or self.activations == "group" else 32

    @property
    def panel_bytes_per_granule(self) -> int:
        """Bytes that `granule` inputs of one panel take."""
        if self.weights == "int8":
            return self.granule * PANEL
        return self.granule * PANEL // 2 + PANEL * (2 if self.symmetric else 4)

    def describe(self) -> str:
        """For the log: 'int4 (group 32, symmetric) x int8 per token'."""
        weights = "int8 per channel"
        if self.weights == "int4":
            weights = f"int4 (group {self.group_size}, {'symmetric' if self.symmetric else 'asymmetric'})"
        return weights + {
            "none": ", activations as they are",
            "token": " x int8 per token",
            "group": f" x int8 per {self.group_size} of a token",
        }[self.activations]  # fmt: skip


class _Linear(ctypes.Structure):
    """`mv::gemm::Linear`."""

    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n", "k", "k_padded", "panel_bytes")),
        *(
            (name, ctypes.c_int32)
            for name in ("kind", "group", "asymmetric", "activation", "bias_dtype", "weight_dtype")
        ),
    ]


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class PackedLinear:
    """A weight [output, input] in `format`, packed. Holds its memory and the structure that kernels are handed.

    data: uint8, all panels, then for int8 a float32 scale for each channel; the only memory there is.
    """

    def __init__(self, data: torch.Tensor, format: LinearFormat, output_size: int, input_size: int) -> None:
        self.data, self.format = data, format
        self.output_size, self.input_size = output_size, input_size
        padded = round_up(input_size, format.granule)
        panel_bytes = padded // format.granule * format.panel_bytes_per_granule
        self._struct = _Linear(
            packed=data.data_ptr(),
            scales=data.data_ptr() + round_up(output_size, PANEL) // PANEL * panel_bytes,
            n=output_size, k=input_size, k_padded=padded, panel_bytes=panel_bytes,
            kind=_KINDS[format.weights], group=format.granule, asymmetric=not format.symmetric,
            activation=_ACTIVATIONS[format.activations],
        )  # fmt: skip

    @classmethod
    def pack(cls, weight: torch.Tensor, format: LinearFormat) -> "PackedLinear":
        """Quantise and pack a floating-point weight [output, input]; `available()` must be true."""
        output_size, input_size = weight.shape
        padded, panels = round_up(input_size, format.granule), round_up(output_size, PANEL) // PANEL
        panel_bytes = padded // format.granule * format.panel_bytes_per_granule
        scale_bytes = panels * PANEL * 4 if format.weights == "int8" else 0
        data = torch.empty(panels * panel_bytes + scale_bytes, dtype=torch.uint8)
        _kernels().advise_huge_pages(data.data_ptr(), data.numel())
        source = weight.detach()
        source = source if source.stride(1) == 1 else source.contiguous()
        head = (source.data_ptr(), library.DTYPE_CODES[source.dtype], output_size, input_size, source.stride(0), padded)
        if format.weights == "int8":
            failed = _kernels().pack_int8(*head, data.data_ptr(), data.data_ptr() + panels * panel_bytes)
        else:
            failed = _kernels().pack_int4(*head, format.group_size, not format.symmetric, data.data_ptr())
        if failed:
            raise ValueError(f"cannot pack a weight of shape {tuple(weight.shape)} as {format}")
        return cls(data, format, output_size, input_size)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, input] -> [N, output] in x's dtype."""
        return _call(self._struct, x, bias, self.output_size)


class PackedFloatLinear:
    """A weight in float32, bfloat16 or float16, packed for the native kernel that multiplies any number of rows.

    It computes in float32, a channel's sum over the inputs in one order whatever the number of rows.
    """

    MAX_ROWS = sys.maxsize

    def __init__(self, data: torch.Tensor, output_size: int, input_size: int) -> None:
        self.data, self.output_size, self.input_size = data, output_size, input_size
        self._struct = _Linear(
            packed=data.data_ptr(), n=output_size, k=input_size, k_padded=input_size,
            panel_bytes=WIDE * input_size * data.element_size(), kind=_KINDS["float"],
            weight_dtype=library.DTYPE_CODES[data.dtype],
        )  # fmt: skip

    @classmethod
    def pack(cls, weight: torch.Tensor) -> "PackedFloatLinear":
        """Pack `weight` [output, input]; `available()` must be true."""
        output_size, input_size = weight.shape
        data = torch.empty(round_up(output_size, WIDE) * input_size, dtype=weight.dtype)
        _kernels().advise_huge_pages(data.data_ptr(), data.nbytes)
        source = weight.detach()
        source = source if source.stride(1) == 1 else source.contiguous()
        code = library.DTYPE_CODES[source.dtype]
        _kernels().pack_float(source.data_ptr(), code, output_size, input_size, source.stride(0), data.data_ptr())
        return cls(data, output_size, input_size)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, input] -> [N, output] in x's dtype."""
        return _call(self._struct, x, bias, self.output_size)


class PackedBF16Linear:
    """oneDNN's packed bfloat16 weight, read in place for products of at most `MAX_ROWS` rows.

    Its own call costs more there; for more rows it is at the machine's limit.
    """

    MAX_ROWS = 8

    def __init__(self, packed: torch.Tensor, output_size: int, input_size: int) -> None:
        address, num_bytes = _onednn_memory(packed)
        wide = round_up(output_size, 64) // 64
        self._keep, self.output_size = packed, output_size
        self._struct = _Linear(
            packed=address, n=output_size, k=input_size, k_padded=input_size,
            panel_bytes=num_bytes // wide, kind=_KINDS["bf16"],
        )  # fmt: skip

    @classmethod
    def wrap(cls, packed: torch.Tensor, weight: torch.Tensor) -> "PackedBF16Linear | None":
        """For `packed`, made of `weight` [output, input]; None where this machine has no kernel for it."""
        usable = weight.dtype is torch.bfloat16 and weight.shape[1] % 2 == 0 and _onednn_layout_is_known()
        return cls(packed, *weight.shape) if usable else None

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _call(self._struct, x, bias, self.output_size)


def available() -> bool:
    """Whether there are native kernels for this process's platform."""
    return library.available()


def _call(struct: _Linear, x: torch.Tensor, bias: torch.Tensor | None, output_size: int) -> torch.Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows = len(x)
    output = torch.empty((rows, output_size), dtype=x.dtype)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if bias is None:
        struct.bias = None
    else:
        struct.bias, struct.bias_dtype = bias.data_ptr(), library.DTYPE_CODES[bias.dtype]
    code = library.DTYPE_CODES[x.dtype]
    # The stride of a single row is arbitrary, and never used.
    failed = _kernels().linear(
        ctypes.byref(struct), x.data_ptr(), x.stride(0), code, output.data_ptr(), output_size, code, rows
    )
    if failed:
        raise RuntimeError(f"no kernel for this linear layer and {x.dtype} activations")
    return output


class _Kernels:
    """The C functions, their types declared once."""

    def __init__(self) -> None:
        pointer, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        weight = [pointer, number, wide, wide, wide, wide]
        self.linear: Any = library.function(
            "mv_linear", [pointer, pointer, wide, number, pointer, wide, number, wide], number
        )
        self.pack_int8: Any = library.function("mv_pack_int8", [*weight, pointer, pointer], number)
        self.pack_int4: Any = library.function("mv_pack_int4", [*weight, wide, number, pointer], number)
        self.pack_float: Any = library.function("mv_pack_float", [*weight[:5], pointer], number)
        self.advise_huge_pages: Any = library.function("mv_advise_huge_pages", [pointer, wide])


@functools.cache
def _kernels() -> _Kernels:
    return _Kernels()


def _onednn_memory(packed: torch.Tensor) -> tuple[int, int]:
    """(address, bytes) of an opaque tensor."""
    return torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)


@functools.cache
def _onednn_layout_is_known() -> bool:
    """Whether oneDNN packs bfloat16 as [output / 64][input / 2][64][2] here: asked with a weight that tells.

    The kernel relies on that, and it is nobody's promise.
    """
    if library.loaded_isa() != "avx512_bf16":
        return False
    try:
        for output_size, input_size in ((192, 256), (200, 104)):
            weight = torch.arange(output_size * input_size).remainder(251).reshape(output_size, input_size)
            weight = weight.to(torch.bfloat16)
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
            raw = torch.frombuffer(bytearray(ctypes.string_at(*_onednn_memory(packed))), dtype=torch.bfloat16)
            wide = raw.view(round_up(output_size, 64) // 64, -1, 64, 2)
            found = wide.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:output_size, :input_size]
            if not found.equal(weight):
                return False
    except (AttributeError, RuntimeError):
        return False
    return True
