"""A GGUF file's tensors under the names, and in the row order, of a Hugging Face checkpoint.

`checkpoint_tensors` is handed an opened file and gives `CheckpointTensor`s, which turn into float32 only the rows
that are asked for: nothing is dequantised twice and no second copy of the model ever exists.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mini_vllm.exceptions import CheckpointError, MiniVLLMError
from mini_vllm.gguf.families import IGNORED_TENSORS, Family, family_of
from mini_vllm.gguf.metadata import Metadata
from mini_vllm.gguf.quants import FloatArray, QuantType, require_readable
from mini_vllm.gguf.reader import GGUFFile, GGUFTensor

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor under its checkpoint name. row_order: stored row of each of our rows, where they differ."""

    name: str
    stored: GGUFTensor
    row_order: npt.NDArray[np.int64] | None = None
    transposed: bool = False
    offset: float = 0.0
    """Added to every number."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[::-1] if self.transposed else self.stored.shape

    def read(self, start: int, stop: int) -> FloatArray:
        """Rows `start` to `stop` (entries, of a vector) in our order. A transposed matrix is read whole for them."""
        if len(self.shape) == 1 or self.transposed:
            numbers = self.stored.read_rows().reshape(self.stored.shape).T
            numbers = numbers[start:stop] if self.row_order is None else numbers[self.row_order[start:stop]]
        else:
            numbers = self.stored.read_rows(
                slice(start, stop) if self.row_order is None else self.row_order[start:stop]
            )
        if self.offset:
            numbers += self.offset
        return numbers


def checkpoint_tensors(file: GGUFFile) -> Iterator[CheckpointTensor]:
    """Every weight of the model. Raises `CheckpointError` naming a tensor that the architecture does not have."""
    family, metadata = family_of(file), Metadata(file)
    _require_readable_types(file)
    for tensor in file.tensors.values():
        if tensor.name in IGNORED_TENSORS:
            continue
        module = tensor.name.rpartition(".")[0]
        block = _BLOCK.fullmatch(module)
        stem = block[2] if block else module
        if block and stem in family.per_head:
            yield from _heads(tensor, f"{family.layers}.{block[1]}.{family.per_head[stem]}")
            continue
        yield CheckpointTensor(
            checkpoint_name(file, family, tensor.name),
            tensor,
            row_order=_row_order(metadata, tensor, stem) if block and stem in family.rotary_pairs else None,
            transposed=stem in family.transposed and len(tensor.shape) == 2,
            offset=-1.0 if family.norms_plus_one and stem.endswith("norm") else 0.0,
        )


def _heads(tensor: GGUFTensor, prefix: str) -> Iterator[CheckpointTensor]:
    for head, row in enumerate(tensor.raw):
        stored = GGUFTensor(tensor.name, tensor.shape[1:], tensor.kind, row[None])
        yield CheckpointTensor(f"{prefix}.{head}.{tensor.name.rpartition('.')[2]}", stored)


def checkpoint_name(file: GGUFFile, family: Family, name: str) -> str:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    module, _, leaf = name.rpartition(".")
    block = _BLOCK.fullmatch(module)
    ours = family.blocks.get(block[2]) if block else family.top.get(module)
    if ours is None or leaf not in ("weight", "bias"):
        raise CheckpointError(f"{file.path.name}: tensor {name} is no part of {family.architecture}")
    return f"{family.layers}.{block[1]}.{ours}.{leaf}" if block else f"{ours}.{leaf}"


def _row_order(metadata: Metadata, tensor: GGUFTensor, stem: str) -> npt.NDArray[np.int64] | None:
    """For each row of a head [first half, second half], where the file has it: halves interleaved pair by pair."""
    heads = metadata.integer("attention.head_count")
    if stem == "attn_k":
        heads = metadata.integer("attention.head_count_kv", heads)
    rows = tensor.shape[0]
    if rows % (2 * heads):
        raise CheckpointError(
            f"{metadata.file.path.name}: tensor {tensor.name} has {rows} rows, no even number for each of {heads} heads"
        )
    stored = np.arange(rows, dtype=np.int64).reshape(heads, rows // heads // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)


def _require_readable_types(file: GGUFFile) -> None:
    """Before any weight is read, so that no engine is left half loaded."""
    seen: dict[QuantType, str] = {}
    for tensor in file.tensors.values():
        seen.setdefault(tensor.kind, tensor.name)
    for kind, name in seen.items():
        try:
            require_readable(kind)
        except MiniVLLMError as error:
            raise type(error)(f"{file.path.name}: tensor {name} {error}") from error


def describe_types(file: GGUFFile) -> str:
    """The mix of storage types by size: '2.1 GiB in 201 tensors, 4.85 bits a number: Q4_K 85 %, Q6_K 15 %'."""
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.kind.name] += tensor.raw.size
    total = sizes.total()
    numbers = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    mix = ", ".join(f"{name} {100 * size / total:.3g} %" for name, size in sizes.most_common())
    size = f"{total / 2**30:.2f} GiB" if total >= 2**30 else f"{total / 2**20:.1f} MiB"
    return f"{size} in {len(file.tensors)} tensors, {8 * total / numbers:.2f} bits a number: {mix}"
