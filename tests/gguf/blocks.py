"""Block formats decoded one number at a time, straight from their definition in ggml: a second opinion for tests."""

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType as Type

BLOCKS = {Type.Q8_0: (32, 34), Type.Q4_0: (32, 18), Type.Q4_K: (256, 144), Type.Q6_K: (256, 210)}
"""Numbers and bytes of one block."""


def half(block: bytes, offset: int) -> float:
    return float(np.frombuffer(block[offset : offset + 2], dtype="<f2")[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def decode_q8_0(block: bytes) -> list[float]:
    return [half(block, 0) * signed(byte) for byte in block[2:]]


def decode_q4_0(block: bytes) -> list[float]:
    scale, nibbles = half(block, 0), block[2:]
    return [scale * ((byte & 15) - 8) for byte in nibbles] + [scale * ((byte >> 4) - 8) for byte in nibbles]


def scale_and_min(packed: bytes, index: int) -> tuple[int, int]:
    """The 6-bit scale and minimum of one of eight sub-blocks, packed in 12 bytes."""
    if index < 4:
        return packed[index] & 63, packed[index + 4] & 63
    low = packed[index + 4]
    return (low & 15) | (packed[index - 4] >> 6) << 4, (low >> 4) | (packed[index] >> 6) << 4


def decode_q4_k(block: bytes) -> list[float]:
    scale, minimum, packed, nibbles = half(block, 0), half(block, 2), block[4:16], block[16:]
    numbers: list[float] = []
    for index in range(8):
        sub_scale, sub_min = scale_and_min(packed, index)
        part = nibbles[index // 2 * 32 : index // 2 * 32 + 32]
        digits = [byte >> 4 if index % 2 else byte & 15 for byte in part]
        numbers += [scale * sub_scale * digit - minimum * sub_min for digit in digits]
    return numbers


def decode_q6_k(block: bytes) -> list[float]:
    low, high, scales, scale = block[:128], block[128:192], block[192:208], half(block, 208)
    numbers = [0.0] * 256
    for n in range(2):
        for quarter in range(4):
            for i in range(32):
                byte = low[n * 64 + i + (32 if quarter % 2 else 0)]
                digit = (byte >> 4 if quarter > 1 else byte & 15) | (high[n * 32 + i] >> 2 * quarter & 3) << 4
                sub_scale = signed(scales[n * 8 + quarter * 2 + i // 16])
                numbers[n * 128 + quarter * 32 + i] = scale * sub_scale * (digit - 32)
    return numbers


DECODERS: dict[Type, Callable[[bytes], list[float]]] = {
    Type.Q8_0: decode_q8_0, Type.Q4_0: decode_q4_0, Type.Q4_K: decode_q4_k, Type.Q6_K: decode_q6_k,
}  # fmt: skip
_HALVES = {Type.Q8_0: (0,), Type.Q4_0: (0,), Type.Q4_K: (0, 2), Type.Q6_K: (208,)}


def random_blocks(kind: Type, shape: tuple[int, ...], seed: int, scale: float = 1e-3) -> np.ndarray:
    """Valid blocks with every bit random except the scales, which are near `scale`: [rows, bytes]."""
    numbers, size = BLOCKS[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (shape[0], shape[1] // numbers, size), dtype=np.uint8)
    for offset in _HALVES[kind]:
        scales = (scale * rng.uniform(0.5, 1.5, raw.shape[:2])).astype("<f2")
        raw[:, :, offset : offset + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(shape[0], -1)


def decode(kind: Type, raw: np.ndarray) -> np.ndarray:
    """[rows, bytes] -> [rows, numbers] float32."""
    size = BLOCKS[kind][1]
    rows = [
        [number for start in range(0, len(row), size) for number in DECODERS[kind](bytes(row[start : start + size]))]
        for row in raw
    ]
    return np.asarray(rows, dtype=np.float32)
