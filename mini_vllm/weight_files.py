"""Which safetensors files a checkpoint folder consists of, told from names alone.

Handed a folder; reads the index and nothing else. Promises that every file it returns lies in the folder (links
followed), so that an index cannot make the engine read something else, and that each problem is a `CheckpointError`
naming the file. Torch-free: hub downloads ask it too.
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from mini_vllm.exceptions import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pth", ".pt")


def find_weight_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """The files to read, each with the tensor names its index promises (None without an index)."""
    if (folder / WEIGHTS_FILE).is_file():
        return {_inside(folder, WEIGHTS_FILE, "model"): None}
    if (folder / INDEX_FILE).is_file():
        tensors_of = tensors_by_file(folder / INDEX_FILE)
        return {_inside(folder, name, INDEX_FILE): names for name, names in sorted(tensors_of.items())}
    raise no_weights_error(str(folder), (file.name for file in folder.glob("*")))


def no_weights_error(model: str, file_names: Iterable[str]) -> CheckpointError:
    """Why a model with these files cannot be loaded: it has pickles only, or nothing at all."""
    if any(name.endswith(PICKLE_SUFFIXES) for name in file_names):
        return CheckpointError(
            f"model: {model!r} has only pickled weights, which are never loaded because a pickle can run any "
            f"code; convert them to safetensors first: mini-vllm convert {shlex.quote(model)} NEW_FOLDER"
        )
    return CheckpointError(f"model: {model!r} has neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def tensors_by_file(index: Path) -> dict[str, frozenset[str]]:
    """File name -> names of its tensors, as the index says. The names are checked to be plain paths downwards."""
    names_of: dict[str, set[str]] = {}
    for tensor_name, file_name in _read_weight_map(index).items():
        names_of.setdefault(file_name, set()).add(tensor_name)
    for file_name in names_of:
        _require_path_downwards(file_name, INDEX_FILE)
    return {file_name: frozenset(names) for file_name, names in names_of.items()}


def _read_weight_map(file: Path) -> dict[str, str]:
    try:
        index = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{INDEX_FILE}: cannot be read: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE}: weight_map must be an object of tensor names to file names")
    for name, value in weight_map.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{INDEX_FILE}: weight_map[{name!r}] must be a file name, got {value!r}")
    return weight_map


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of JSON readers: a name given twice is a ValueError, not silently the last one."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen = Counter(name for name, _ in pairs)
        raise ValueError(f"named twice: {', '.join(name for name, count in seen.items() if count > 1)}")
    return result


def _require_path_downwards(name: str, source: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors" or "\0" in name:
        raise CheckpointError(f"{source}: {name!r} must be a .safetensors file inside the model's folder")


def _inside(folder: Path, name: str, source: str) -> Path:
    """`folder / name`, refused unless it is a file that really lies in the folder, links followed.

    A Hugging Face cache keeps its files as links from `snapshots/<revision>` to `blobs` beside it; those count as
    inside.
    """
    try:
        real, real_folder = (folder / name).resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{source}: {name!r} cannot be found in {str(folder)!r}") from error
    homes = [real_folder]
    if real_folder.parent.name == "snapshots":
        homes.append(real_folder.parent.parent / "blobs")
    if not real.is_file() or not any(real.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{source}: {name!r} leads outside the model's folder")
    return folder / name
