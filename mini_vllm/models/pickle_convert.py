"""From `pytorch_model.bin` to safetensors, once, so that no engine ever has to open a pickle.

The only place in the package that calls `torch.load`, always with `weights_only=True`: torch's restricted unpickler
rebuilds tensors and plain containers and refuses whatever would need other code. Files are mapped, not read, where
their format allows; one output shard is in memory at a time. The result is written beside its final place, read back,
compared bit by bit, and only then moved there.
"""

import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mini_vllm.exceptions import CheckpointError, ConfigError
from mini_vllm.hf_config import HFConfig
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5 * 10**9

_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md")
_COPIED_NAMES = ("LICENSE", "NOTICE")
_HEADS = ("lm_head", "embed_out", "output")
"""Modules whose matrix a tied model takes from its embedding."""
_REFUSAL = re.compile(r"Unsupported (?:global|class|operand)[^\n]*|GLOBAL [^\n]*|[^\n]*not (?:an )?allowed[^\n]*", re.I)
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".gguf")


@dataclass(frozen=True)
class Conversion:
    """What was written. dropped: alias -> the name its numbers are kept under."""

    files: tuple[str, ...]
    num_tensors: int
    total_bytes: int
    copied: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)


def convert_folder(
    source: Path,
    target: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    use_tqdm: bool = False,
) -> Conversion:
    """Convert the pickled weights in `source` and copy config and tokenizer files beside them into `target`.

    max_shard_bytes: no file is larger unless a single tensor is. force: replace files that are in `target` already.
    Raises `CheckpointError` for weights that are missing, damaged or need code to load, `ConfigError` for a target
    that may not be written.
    """
    tensors = read_pickles(find_pickles(source))
    kept, dropped = drop_tied_heads(tensors, tied=_is_tied(source))
    shards = split_into_shards(kept, max_shard_bytes)
    copies = [] if _same_folder(source, target) else _files_to_copy(source)
    names = [*shards, *([INDEX_FILE] if len(shards) > 1 else []), *(file.name for file in copies)]
    stale = _check_target(target, names, force)
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    target.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=target) as staging:
            _write(Path(staging), kept, shards, copies, use_tqdm)
            for file in stale:
                file.unlink()
            for name in names:
                os.replace(Path(staging) / name, target / name)
    except BaseException:
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    total = sum(_num_bytes(tensor) for tensor in kept.values())
    return Conversion(tuple(shards), len(kept), total, tuple(file.name for file in copies), dropped)


# -- reading -------------------------------------------------------------------------------------------------


def find_pickles(source: Path) -> dict[Path, frozenset[str] | None]:
    """The files to read, each with the tensor names its index promises (None without an index)."""
    if not source.is_dir():
        raise CheckpointError(f"source: {str(source)!r} is no folder")
    if (source / WEIGHTS_FILE).exists() or (source / INDEX_FILE).exists():
        raise CheckpointError(f"source: {str(source)!r} has safetensors weights already; there is nothing to convert")
    if (source / PICKLE_FILE).is_file():
        return {_inside(source, PICKLE_FILE, "source"): None}
    if not (source / PICKLE_INDEX).is_file():
        others = sorted(file.name for file in source.iterdir() if file.suffix in _OTHER_WEIGHTS)
        found = ", ".join(others[:8]) or "no weights"
        raise CheckpointError(f"source: {str(source)!r} has neither {PICKLE_FILE} nor {PICKLE_INDEX}; it has {found}")
    names_of: dict[str, set[str]] = {}
    for tensor, file in _weight_map(source / PICKLE_INDEX).items():
        names_of.setdefault(file, set()).add(tensor)
    return {_inside(source, file, PICKLE_INDEX): frozenset(names) for file, names in sorted(names_of.items())}


def _weight_map(file: Path) -> dict[str, str]:
    index = _read_json(file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{file.name}: weight_map must be an object of tensor names to file names")
    return weight_map


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name}: must hold a JSON object")
    return value


def _inside(folder: Path, name: str, source: str) -> Path:
    """`folder / name`, refused unless it is a file of the folder itself (or of the hub cache's blobs beside it)."""
    if Path(name).name != name:
        raise CheckpointError(f"{source}: {name!r} must be a file in the model's folder")
    try:
        real, home = (folder / name).resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{source}: {name!r} cannot be found in {str(folder)!r}") from error
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not real.is_file() or not any(real.is_relative_to(place) for place in homes):
        raise CheckpointError(f"{source}: {name!r} leads outside the model's folder")
    return folder / name


def read_pickles(files: Mapping[Path, frozenset[str] | None]) -> dict[str, torch.Tensor]:
    """Every tensor of all files by name, in order. Raises `CheckpointError` naming the file at fault."""
    tensors: dict[str, torch.Tensor] = {}
    for file, expected in files.items():
        part = _load_pickle(file)
        if expected is not None and part.keys() != expected:
            raise CheckpointError(
                f"{file.name}: does not hold what {PICKLE_INDEX} says: {', '.join(sorted(part.keys() ^ expected)[:8])}"
            )
        for name, tensor in part.items():
            if name in tensors:
                raise CheckpointError(f"{file.name}: tensor {name} is in another file already")
            tensors[name] = tensor
    return tensors


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    mappable = zipfile.is_zipfile(file)  # torch before 1.6 wrote another format, which can only be read whole
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
        raise CheckpointError(f"{file.name}: {_why_refused(error)}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{file.name}: holds {type(loaded).__name__}, not a dictionary of tensors")
    others = [
        name for name, value in loaded.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)
    ]
    if others:
        raise CheckpointError(
            f"{file.name}: not only tensors by name: {', '.join(map(str, others[:8]))} (a training checkpoint? save "
            "the model's state_dict() alone)"
        )
    for name, tensor in loaded.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
            raise CheckpointError(
                f"{file.name}: tensor {name} is {tensor.layout} {tensor.dtype}, which is not supported"
            )
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _why_refused(error: Exception) -> str:
    text = str(error)
    refusal = _REFUSAL.search(text)
    if refusal or "weights_only" in text or "Weights only" in text:
        detail = refusal[0].strip() if refusal else text.partition("\n")[0]
        return f"refused, for it asks for more than tensors, and a pickle can run any code: {detail}"
    return f"not a readable PyTorch file: {text.partition(chr(10))[0] or type(error).__name__}"


# -- what to write -------------------------------------------------------------------------------------------


def drop_tied_heads(
    tensors: Mapping[str, torch.Tensor], *, tied: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors without output heads that share the embedding's memory, and what was dropped for what.

    safetensors has no sharing. A tied model takes its head from the embedding, so the head goes; other tensors that
    share memory are written out each.
    """
    owners: dict[Any, str] = {}
    dropped: dict[str, str] = {}
    for name in sorted(tensors, key=_is_head):  # heads last, in order otherwise
        tensor = tensors[name]
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        owner = owners.setdefault(key, name)
        if tied and tensor.numel() and owner != name and _is_head(name):
            dropped[name] = owner
    return {name: tensor for name, tensor in tensors.items() if name not in dropped}, dropped


def _is_head(name: str) -> bool:
    return name.rpartition(".")[0].rpartition(".")[2] in _HEADS


def _is_tied(source: Path) -> bool:
    """What config.json says, or what its model_type means where it is silent; tied if nobody can say."""
    if not (source / "config.json").is_file():
        return True
    config = _read_json(source / "config.json")
    value = config.get("tie_word_embeddings")
    if isinstance(value, bool):
        return value
    try:
        return HFConfig.from_dict(config).tie_word_embeddings
    except CheckpointError:
        return True


def split_into_shards(tensors: Mapping[str, torch.Tensor], max_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names, in order, each file at most `max_bytes` unless it is one tensor."""
    if max_bytes < 1:
        raise ConfigError(f"max_shard_size: must be at least 1 byte, got {max_bytes}")
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + _num_bytes(tensor) > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += _num_bytes(tensor)
    if len(parts) == 1:
        return {WEIGHTS_FILE: parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _same_folder(source: Path, target: Path) -> bool:
    return target.exists() and target.samefile(source)


def _files_to_copy(source: Path) -> list[Path]:
    """Config, tokenizer and licence: text that says what the weights are. Never code."""
    return [
        _inside(source, file.name, "source")
        for file in sorted(source.iterdir())
        if file.is_file() and not file.name.endswith(".index.json") and not file.name.startswith(".")
        if file.suffix in _COPIED_SUFFIXES or file.stem.upper() in _COPIED_NAMES
    ]


def _check_target(target: Path, names: Sequence[str], force: bool) -> list[Path]:
    """Weights in `target` that the new ones replace. Raises `ConfigError` if anything is there and `force` is not."""
    if target.exists() and not target.is_dir():
        raise ConfigError(f"target: {str(target)!r} is a file")
    old = {*target.glob("model*.safetensors"), *target.glob(INDEX_FILE)} if target.is_dir() else set()
    present = sorted({file.name for file in old} | {name for name in names if (target / name).exists()})
    if present and not force:
        raise ConfigError(f"target: {str(target)!r} has {', '.join(present[:8])} already; --force replaces them")
    return sorted(old)


# -- writing -------------------------------------------------------------------------------------------------


def _write(
    staging: Path,
    tensors: Mapping[str, torch.Tensor],
    shards: Mapping[str, Sequence[str]],
    copies: Sequence[Path],
    use_tqdm: bool,
) -> None:
    for file, names in _progress(list(shards.items()), use_tqdm):
        part = _on_their_own({name: tensors[name] for name in names})
        save_file(part, staging / file, metadata={"format": "pt"})
        verify(staging / file, part)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        total = sum(_num_bytes(tensor) for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (staging / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    for file in copies:
        shutil.copyfile(file, staging / file.name)


def _on_their_own(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous, and each in memory of its own where it was a part of something larger or shared."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == _num_bytes(tensor)
        alone = whole and tensor.data_ptr() not in seen
        seen.add(tensor.data_ptr())
        result[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
    return result


def verify(file: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Read `file` back. Raises `CheckpointError` unless it holds exactly these tensors, bit for bit."""
    with safe_open(file, framework="pt", device="cpu") as handle:
        if set(handle.keys()) != set(expected):
            raise CheckpointError(f"{file.name}: does not hold the tensors that were written")
        for name, tensor in expected.items():
            written = handle.get_tensor(name)
            if written.dtype != tensor.dtype or written.shape != tensor.shape or not _same_bits(written, tensor):
                raise CheckpointError(f"{file.name}: tensor {name} is not what was written; is the disk sound?")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))


def _progress(items: list[Any], use_tqdm: bool) -> Any:
    if not use_tqdm:
        return items
    from tqdm import tqdm

    return tqdm(items, desc="Converting", unit="file")
