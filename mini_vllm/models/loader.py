"""From a folder to a model ready to run: find the safetensors files, read them lazily, fill, prepack.

Nothing but safetensors is opened: no pickle, no code from the folder. A tensor is read slice by slice, so that a rank
reads its own part only and no second copy of the model ever exists. Every problem is a `CheckpointError` that names
the file or tensor.
"""

import hashlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mini_vllm.attention.selector import use_attn_backend
from mini_vllm.config import LoadConfig, ModelConfig
from mini_vllm.exceptions import CheckpointError
from mini_vllm.layers.linear import LoadedWeight
from mini_vllm.layers.norm import LayerNorm, RMSNorm
from mini_vllm.models.registry import ModelRegistry
from mini_vllm.quantization.base import get_quant_config

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DUMMY_STD = 0.02
_WEIGHT_DTYPES = {"F64", "F32", "F16", "BF16"}


def load_model(
    model_config: ModelConfig, load_config: LoadConfig, device: torch.device, *, attention_backend: str | None = None
) -> nn.Module:
    """The model on `device` in `model_config.dtype`, in eval mode, weights loaded and prepacked.

    Raises `UnsupportedModelError` for an architecture or option that is not implemented, `CheckpointError` for
    weights that are absent, damaged or do not fit.
    """
    hf_config = model_config.hf_config.with_max_model_len(model_config.max_model_len)
    model_class = ModelRegistry.resolve(hf_config.architectures)
    quant_config = get_quant_config(hf_config.raw, model_config.quantization)
    with torch.device(device), use_attn_backend(attention_backend):
        model = model_class(hf_config, dtype=getattr(torch, model_config.dtype), quant_config=quant_config)
    if load_config.load_format == "dummy":
        fill_with_random_weights(model, model_config.seed)
    else:
        fill_from_files(model, model_config, load_config)
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
    return model.eval()


def fill_from_files(model: nn.Module, model_config: ModelConfig, load_config: LoadConfig) -> None:
    path = Path(model_config.model)
    if load_config.load_format == "gguf":
        from mini_vllm.models.gguf_loader import fill_from_gguf

        fill_from_gguf(model, path, getattr(torch, model_config.dtype), load_config.use_tqdm)
    else:
        model.load_weights(iterate_weights(path, load_config.use_tqdm))  # type: ignore[operator]


class LazyTensor:
    """A tensor that stays in its file; `narrow` reads just that part."""

    def __init__(self, slices: Any) -> None:
        self._slices = slices
        self.shape: Sequence[int] = tuple(slices.get_shape())

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        part = (slice(None),) * dim + (slice(start, start + length),)
        tensor: torch.Tensor = self._slices[part]
        return tensor


def iterate_weights(folder: Path, use_tqdm: bool = False) -> Iterator[tuple[str, LoadedWeight]]:
    """(name, lazy tensor) of every tensor in the checkpoint, one file open at a time."""
    files = find_weight_files(folder)
    for file, expected in _progress(list(files.items()), use_tqdm):
        yield from _iterate_file(file, expected)


def _iterate_file(file: Path, expected: frozenset[str] | None) -> Iterator[tuple[str, LoadedWeight]]:
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name}: not a whole safetensors file: {error}") from error
    with handle:
        names = frozenset(handle.keys())
        if expected is not None and names != expected:
            raise CheckpointError(
                f"{file.name}: does not hold what {INDEX_FILE} says: {', '.join(sorted(names ^ expected)[:8])}"
            )
        for name in handle.keys():  # noqa: SIM118 - not a dict
            slices = handle.get_slice(name)
            if slices.get_dtype() not in _WEIGHT_DTYPES:
                raise CheckpointError(f"{file.name}: tensor {name} is stored as {slices.get_dtype()}, not as floats")
            yield name, LazyTensor(slices)


def find_weight_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """The files to read, each with the tensor names its index promises (None without an index)."""
    if (folder / WEIGHTS_FILE).is_file():
        return {_inside(folder, WEIGHTS_FILE, "model"): None}
    if (folder / INDEX_FILE).is_file():
        return _indexed_files(folder)
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")) or list(folder.glob("*.pt")):
        raise CheckpointError(
            f"model: {str(folder)!r} has only pickled weights, which are never loaded because a pickle can run any "
            f"code; convert them to safetensors first: mini-vllm convert {shlex.quote(str(folder))} NEW_FOLDER"
        )
    raise CheckpointError(f"model: {str(folder)!r} has neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def _indexed_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    names_of: dict[str, set[str]] = {}
    for tensor_name, file_name in _read_weight_map(folder / INDEX_FILE).items():
        names_of.setdefault(file_name, set()).add(tensor_name)
    return {_inside(folder, name, INDEX_FILE): frozenset(tensors) for name, tensors in sorted(names_of.items())}


def _read_weight_map(file: Path) -> dict[str, str]:
    try:
        index = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{INDEX_FILE}: cannot be read: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE}: weight_map must be an object of tensor names to file names")
    for name, value in weight_map.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{INDEX_FILE}: weight_map[{name!r}] must be a file name, got {value!r}")
    return weight_map


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen = Counter(name for name, _ in pairs)
        raise ValueError(f"named twice: {', '.join(name for name, count in seen.items() if count > 1)}")
    return result


def _inside(folder: Path, name: str, source: str) -> Path:
    """`folder / name`, refused unless it is a file that really lies in the folder, links followed.

    A Hugging Face cache keeps its files as links from `snapshots/<revision>` to `blobs` beside it; those count as
    inside.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
        raise CheckpointError(f"{source}: {name!r} must be a .safetensors file inside the model's folder")
    try:
        real, real_folder = (folder / path).resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{source}: {name!r} cannot be found in {str(folder)!r}") from error
    homes = [real_folder]
    if real_folder.parent.name == "snapshots":
        homes.append(real_folder.parent.parent / "blobs")
    if not real.is_file() or not any(real.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{source}: {name!r} leads outside the model's folder")
    return folder / path


def _progress(files: list[Any], use_tqdm: bool) -> Any:
    if not use_tqdm or len(files) < 2:
        return files
    from tqdm import tqdm

    return tqdm(files, desc="Loading safetensors checkpoint shards", unit="file")


def fill_with_random_weights(model: nn.Module, seed: int) -> None:
    """Small random matrices and biases, norms at 1; each parameter's values depend on `seed` and its name only."""
    norms = {id(module.weight) for module in model.modules() if isinstance(module, (RMSNorm, LayerNorm))}
    bound = DUMMY_STD * math.sqrt(3)
    for name, param in model.named_parameters():
        if id(param) in norms:
            param.data.fill_(1)
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(device=param.device).manual_seed(int.from_bytes(digest[:7], "little"))
        param.data.uniform_(-bound, bound, generator=generator)
