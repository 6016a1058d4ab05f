"""How GGUF files store numbers: element types by id, and blocks of quantised numbers back to float32.

The plain float types are read with numpy alone. Everything else is a block format (Q8_0, Q4_K, IQ4_XS, ...) whose
layout and arithmetic come from the `gguf` package, which is optional: without it such a tensor is a `ConfigError` that
says what to install.
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt

from mini_vllm.exceptions import ConfigError, UnsupportedModelError

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class QuantType:
    """One storage format. A block of `block_size` numbers takes `block_bytes` bytes; rows are whole blocks."""

    type_id: int
    name: str
    block_size: int
    block_bytes: int


F32 = QuantType(0, "F32", 1, 4)
F16 = QuantType(1, "F16", 1, 2)
F64 = QuantType(28, "F64", 1, 8)
BF16 = QuantType(30, "BF16", 1, 2)
FLOAT_TYPES = {kind.type_id: kind for kind in (F32, F16, F64, BF16)}


def quant_type(type_id: int) -> QuantType:
    """The format with this id. Raises `UnsupportedModelError` if nobody knows it, `ConfigError` without `gguf`."""
    if type_id in FLOAT_TYPES:
        return FLOAT_TYPES[type_id]
    gguf = import_gguf()
    try:
        kind = gguf.GGMLQuantizationType(type_id)
    except ValueError as error:
        raise UnsupportedModelError(f"is stored in type {type_id}, which gguf {_version()} does not know") from error
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return QuantType(type_id, kind.name, block_size, block_bytes)


def dequantize(raw: ByteArray, kind: QuantType) -> FloatArray:
    """Stored rows [rows, bytes] -> numbers [rows, columns] float32; always a fresh, writable array."""
    if kind == F32:
        return raw.view("<f4").astype(np.float32)
    if kind == F16:
        return raw.view("<f2").astype(np.float32)
    if kind == F64:
        return raw.view("<f8").astype(np.float32)
    if kind == BF16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    gguf = import_gguf()
    try:
        with np.errstate(all="ignore"):  # a block's scale may be anything; what comes of it is the file's business
            numbers: FloatArray = gguf.dequantize(raw, gguf.GGMLQuantizationType(kind.type_id))
    except NotImplementedError as error:
        raise UnsupportedModelError(f"is stored as {kind.name}, which cannot be turned into floats") from error
    return numbers.reshape(len(raw), -1)


def require_readable(kind: QuantType) -> None:
    """Raise what `dequantize` would raise for this type, before any weight is read."""
    dequantize(np.zeros((1, kind.block_bytes), dtype=np.uint8), kind)


def import_gguf() -> ModuleType:
    """The `gguf` package. Raises `ConfigError` saying how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            "load_format: quantised GGUF files need the gguf package; install it with: pip install 'mini-vllm[gguf]'"
        ) from error
    return gguf


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")
