"""A GGUF file opened: its metadata as Python values, its tensors as views of the memory-mapped file.

`open_gguf` is handed a path and checks the whole directory of the file (format: the GGUF specification of the ggml
project, versions 2 and 3) before it returns: a bad magic number, a file that ends too early, names given twice, shapes
that do not fit their type are `CheckpointError`s naming file and key or tensor. Lengths in the file are never
trusted: nothing is allocated before the bytes it claims are known to be there. A model split over several files
(`...-00001-of-00003.gguf`) is opened as one.
"""

import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mini_vllm.exceptions import CheckpointError, MiniVLLMError, UnsupportedModelError
from mini_vllm.gguf.quants import ByteArray, FloatArray, QuantType, dequantize, quant_type

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata value type -> struct code; 8 is a string, 9 an array."""
_FLOAT, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """One stored tensor. shape: rows first, as in numpy. raw: [rows, bytes of a row], a view of the file."""

    name: str
    shape: tuple[int, ...]
    kind: QuantType
    raw: ByteArray = field(repr=False)

    def read_rows(self, rows: Any = slice(None)) -> FloatArray:
        """`rows` (a slice or indices) of the tensor seen as [rows, columns], as float32."""
        try:
            return dequantize(self.raw[rows], self.kind)
        except MiniVLLMError as error:
            raise type(error)(f"tensor {self.name} {error}") from error


@dataclass(frozen=True)
class GGUFFile:
    """Everything a GGUF file holds. `path` is the first file where there are several."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        """The value of general.architecture, such as 'llama'."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str):
            raise CheckpointError(f"{self.path.name}: general.architecture must be a string, got {value!r}")
        return value


def is_gguf_path(path: str | Path) -> bool:
    """Whether this names a GGUF file, or a folder that holds one model in GGUF and no config.json."""
    folder = Path(path).expanduser()
    if folder.suffix == ".gguf":
        return not folder.is_dir()
    return folder.is_dir() and not (folder / "config.json").is_file() and len(_models_in(folder)) == 1


def resolve_gguf_path(path: str | Path) -> Path:
    """The (first) GGUF file that `path` names: itself, or the only model in a folder. Raises `CheckpointError`."""
    file = Path(path).expanduser()
    if file.is_dir():
        models = _models_in(file)
        if len(models) != 1:
            names = ", ".join(model.name for model in models) or "none"
            raise CheckpointError(f"model: {str(file)!r} must hold exactly one GGUF model, found {names}")
        return models[0]
    if not file.is_file():
        raise CheckpointError(f"model: there is no file {str(file)!r}")
    return file


def _models_in(folder: Path) -> list[Path]:
    """GGUF files of a folder, those of one split model counted as its first."""
    files = sorted(folder.glob("*.gguf"))
    return [file for file in files if (m := SPLIT_NAME.fullmatch(file.name)) is None or int(m["number"]) == 1]


def open_gguf(path: str | Path) -> GGUFFile:
    """Read the directory of a GGUF file and map its tensors. Raises `CheckpointError`, `UnsupportedModelError`."""
    first = resolve_gguf_path(path)
    opened = _open_one(first)
    count = opened.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return opened
    tensors = dict(opened.tensors)
    for file in _other_splits(first, count):
        for name, tensor in _open_one(file).tensors.items():
            if name in tensors:
                raise CheckpointError(f"{file.name}: tensor {name} is in another file of this model already")
            tensors[name] = tensor
    promised = opened.metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise CheckpointError(f"{first.name}: its files hold {len(tensors)} tensors, split.tensors.count is {promised}")
    return GGUFFile(first, opened.metadata, tensors)


def _other_splits(first: Path, count: int) -> list[Path]:
    match = SPLIT_NAME.fullmatch(first.name)
    if match is None or int(match["count"]) != count or int(match["number"]) != 1:
        raise CheckpointError(
            f"{first.name}: one of {count} files of a split model; give the first, named ...-00001-of-{count:05d}.gguf"
        )
    files = [first.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(2, count + 1)]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file.name}: missing; {first.name} says the model is split over {count} files")
    return files


def _open_one(path: Path) -> GGUFFile:
    try:
        mapped = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{path.name}: cannot be read: {error}") from error
    cursor = _Cursor(mapped, path.name)
    num_tensors, num_keys = _read_head(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise CheckpointError(f"{path.name}: metadata key {key} is given twice")
        metadata[key] = cursor.value(cursor.scalar("I"), key)
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path.name}: general.alignment must be a power of two, got {alignment!r}")
    data_start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for info in infos:
        if info.name in tensors:
            raise CheckpointError(f"{path.name}: tensor {info.name} is given twice")
        tensors[info.name] = _map_tensor(info, mapped, data_start, path.name)
    return GGUFFile(path, metadata, tensors)


def _read_head(cursor: "_Cursor") -> tuple[int, int]:
    """(number of tensors, number of metadata keys)."""
    magic = bytes(cursor.take(4, "the magic number"))
    if magic != MAGIC:
        raise CheckpointError(f"{cursor.name}: no GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    version = cursor.scalar("I")
    if version not in VERSIONS:
        big_endian = " (a file for big-endian machines)" if version and not version & 0xFFFF else ""
        raise UnsupportedModelError(f"{cursor.name}: GGUF version {version}{big_endian}; supported are 2 and 3")
    return cursor.scalar("Q"), cursor.scalar("Q")


@dataclass(frozen=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


def _read_tensor_info(cursor: "_Cursor") -> _TensorInfo:
    name = cursor.string("a tensor's name")
    num_dims = cursor.scalar("I")
    if not 1 <= num_dims <= MAX_DIMS:
        raise CheckpointError(f"{cursor.name}: tensor {name} has {num_dims} dimensions, must have 1 to {MAX_DIMS}")
    shape = tuple(cursor.scalar("Q") for _ in range(num_dims))[::-1]
    return _TensorInfo(name, shape, cursor.scalar("I"), cursor.scalar("Q"))


def _map_tensor(info: _TensorInfo, mapped: ByteArray, data_start: int, file: str) -> GGUFTensor:
    try:
        kind = quant_type(info.type_id)
    except MiniVLLMError as error:
        raise type(error)(f"{file}: tensor {info.name} {error}") from error
    columns, rows = info.shape[-1], math.prod(info.shape[:-1])
    if 0 in info.shape or columns % kind.block_size:
        raise CheckpointError(
            f"{file}: tensor {info.name} has shape {list(info.shape)}; rows of {kind.name} must be whole blocks of "
            f"{kind.block_size}"
        )
    row_bytes = columns // kind.block_size * kind.block_bytes
    start, end = data_start + info.offset, data_start + info.offset + rows * row_bytes
    if end > len(mapped):
        raise CheckpointError(
            f"{file}: truncated: tensor {info.name} would end at byte {end}, but the file has {len(mapped)}"
        )
    return GGUFTensor(info.name, info.shape, kind, mapped[start:end].reshape(rows, row_bytes))


class _Cursor:
    """Reads values one after the other, never past the end of the file."""

    def __init__(self, mapped: ByteArray, name: str) -> None:
        self.data, self.name = mapped.data, name
        self.offset = 0

    def take(self, length: int, what: str) -> memoryview:
        end = self.offset + length
        if end > len(self.data):
            raise CheckpointError(f"{self.name}: truncated: {what} would end at byte {end} of {len(self.data)}")
        part = self.data[self.offset : end]
        self.offset = end
        return part

    def scalar(self, code: str) -> Any:
        """One little-endian number of struct's `code`."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), "a number"))[0]

    def string(self, what: str) -> str:
        try:
            return str(self.take(self.scalar("Q"), what), "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.name}: {what} is not UTF-8: {error}") from error

    def value(self, type_id: int, key: str) -> Any:
        """A metadata value; float32 comes back as the shortest decimal that means the same float32."""
        if type_id == _STRING:
            return self.string(key)
        if type_id == _ARRAY:
            return self._array(key)
        if type_id not in _SCALARS:
            raise CheckpointError(f"{self.name}: {key} has a value of unknown type {type_id}")
        number = self.scalar(_SCALARS[type_id])
        return float(str(np.float32(number))) if type_id == _FLOAT else number

    def _array(self, key: str) -> list[Any]:
        item_type, length = self.scalar("I"), self.scalar("Q")
        if item_type == _STRING:
            return self._strings(length, key)
        if item_type not in _SCALARS:
            raise CheckpointError(f"{self.name}: {key} is an array of unknown type {item_type}")
        dtype = np.dtype("?" if item_type == _BOOL else "<" + _SCALARS[item_type])
        items: list[Any] = np.frombuffer(self.take(length * dtype.itemsize, key), dtype=dtype).tolist()
        return items

    def _strings(self, length: int, key: str) -> list[Any]:
        """A vocabulary has hundreds of thousands, so this loop does without calls."""
        data, offset, size, unpack = self.data, self.offset, len(self.data), struct.Struct("<Q").unpack_from
        items: list[bytes] = []
        for _ in range(length):
            start = offset + 8
            offset = start + unpack(data, offset)[0] if start <= size else start
            if offset > size:
                raise CheckpointError(f"{self.name}: truncated: {key} ends after {len(items)} of {length} strings")
            items.append(bytes(data[start:offset]))
        self.offset = offset
        try:
            return [item.decode() for item in items]
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.name}: {key} is not UTF-8: {error}") from error
