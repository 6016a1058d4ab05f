"""Weights out of a GGUF file for `load_weights`: each tensor is dequantised in pieces, straight into its final type.

At no time is more than one tensor of the model held twice, and the float32 in between is a piece of a few megabytes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from mini_vllm.exceptions import CheckpointError
from mini_vllm.gguf.reader import open_gguf
from mini_vllm.gguf.weights import CheckpointTensor, checkpoint_tensors, describe_types
from mini_vllm.layers.linear import LoadedWeight
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

NUMBERS_PER_PIECE = 2**20


class GGUFWeight:
    """A tensor that stays in its file; `narrow` dequantises the rows it is asked for into `dtype`."""

    def __init__(self, tensor: CheckpointTensor, dtype: torch.dtype) -> None:
        self._tensor, self._dtype = tensor, dtype
        self.shape: Sequence[int] = tensor.shape

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        if dim == 0:
            return self._rows(start, length, slice(None))
        return self._rows(0, self.shape[0], slice(start, start + length))

    def _rows(self, start: int, length: int, columns: slice) -> torch.Tensor:
        if len(self.shape) == 1:
            return torch.from_numpy(self._tensor.read(start, start + length).copy()).to(self._dtype)
        width = len(range(self.shape[1])[columns])
        result = torch.empty(length, width, dtype=self._dtype, device="cpu")
        step = length if self._tensor.transposed else max(1, NUMBERS_PER_PIECE // self.shape[1])
        for first in range(0, length, step):
            last = min(first + step, length)
            numbers = self._tensor.read(start + first, start + last)[:, columns]
            result[first:last] = torch.from_numpy(numbers)
        return result


def fill_from_gguf(model: nn.Module, path: Path, dtype: torch.dtype, use_tqdm: bool = False) -> None:
    """Load `path` into a model whose parameters have `dtype`. Errors of the model's own checks name the file too."""
    weights = iterate_gguf_weights(path, dtype, use_tqdm)
    try:
        model.load_weights(weights)  # type: ignore[operator]
    except CheckpointError as error:
        if path.name in str(error):
            raise
        raise type(error)(f"{path.name}: {error}") from error


def iterate_gguf_weights(path: Path, dtype: torch.dtype, use_tqdm: bool = False) -> Iterator[tuple[str, LoadedWeight]]:
    """(checkpoint name, lazy tensor) of every weight of the model in `path`.

    Raises `CheckpointError` for a damaged file, `UnsupportedModelError` for one that cannot be served, `ConfigError`
    when the gguf package is needed and not installed.
    """
    file = open_gguf(path)
    logger.info("GGUF %s: %s; dequantised on load to %s", path.name, describe_types(file), str(dtype).partition(".")[2])
    for tensor in _progress(list(checkpoint_tensors(file)), use_tqdm):
        yield tensor.name, GGUFWeight(tensor, dtype)


def _progress(tensors: list[CheckpointTensor], use_tqdm: bool) -> Iterator[CheckpointTensor]:
    if not use_tqdm:
        return iter(tensors)
    from tqdm import tqdm

    return iter(tqdm(tensors, desc="Dequantising GGUF tensors", unit="tensor", delay=2, disable=None))
