"""Where the model of a plan comes from: a preset, a folder, a GGUF file, a name on the hub, or raw dimensions.

Only what describes the model is read, never its weights. Overrides are keys of config.json and win over all else, so
"this model with 32 KV heads" is a preset and one override.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mini_vllm.exceptions import CheckpointError, ConfigError
from mini_vllm.hf_config import CONFIG_FILE
from mini_vllm.hf_config.reader import read_json
from mini_vllm.simulator.planner.config import geometry_from_config
from mini_vllm.simulator.planner.geometry import ModelGeometry
from mini_vllm.simulator.planner.presets import BUNDLED, MODEL_PRESETS, nearest, preset_config, preset_names

RAW_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads")


def resolve_model(
    model: str | None = None,
    *,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    num_parameters: int | None = None,
    revision: str | None = None,
    download_dir: str | None = None,
) -> ModelGeometry:
    """The geometry that was asked for; without model, preset and overrides, of the bundled model.

    num_parameters: with raw dimensions, stands in for those that only decide the number of parameters.
    Raises `ConfigError`, `CheckpointError`.
    """
    overrides = dict(overrides or {})
    if model is not None and preset is not None:
        raise ConfigError(f"preset: {preset!r} and the model {model!r} were both given; only one can be planned")
    if preset is not None:
        return geometry_from_config({**preset_config(preset), **overrides}, _named(preset.lower(), overrides))
    if model is not None:
        config, name = _config_of(model, revision, download_dir)
        return geometry_from_config({**config, **overrides}, _named(name, overrides))
    if overrides:
        return _raw_geometry(overrides, num_parameters)
    return geometry_from_config(preset_config(BUNDLED), BUNDLED)


def _named(name: str, overrides: Mapping[str, Any]) -> str:
    return name if not overrides else f"{name} with " + ", ".join(f"{k}={v}" for k, v in overrides.items())


def _raw_geometry(dimensions: Mapping[str, Any], num_parameters: int | None) -> ModelGeometry:
    """Of a Llama-like decoder. What only decides the number of parameters may be left out when that is given."""
    missing = [key for key in RAW_NEEDED if key not in dimensions]
    config: dict[str, Any] = {"model_type": "llama", "architectures": ["raw"], **dimensions}
    if num_parameters is not None and not missing:
        config = {"intermediate_size": 4 * int(dimensions["hidden_size"]), "vocab_size": 1, **config}
    missing += [key for key in ("intermediate_size", "vocab_size") if key not in config]
    if missing:
        raise ConfigError(
            f"model: raw dimensions lack {', '.join(missing)} "
            "(num_parameters stands in for intermediate_size and vocab_size)"
        )
    return geometry_from_config(config, "raw dimensions")


def _config_of(model: str, revision: str | None, download_dir: str | None) -> tuple[Mapping[str, Any], str]:
    """(config.json, a name for people). A path goes before a preset, a preset before a name on the hub."""
    from mini_vllm.hub import fetch_snapshot, parse_hub_name

    path = Path(model).expanduser()
    if path.exists():
        return _local_config(path), path.resolve().name
    if model.lower() in MODEL_PRESETS or model.lower() == BUNDLED:
        return preset_config(model), model.lower()
    name = parse_hub_name(model)
    if name is None or "/" not in model:
        raise CheckpointError(f"model: {model!r} is neither a folder nor a preset{nearest(model, preset_names())}")
    if name.quant is not None:
        raise CheckpointError(
            f"model: plan {name.repo_id!r} with quantization={name.quant.lower()!r} instead of {model!r}"
        )
    snapshot = fetch_snapshot(name.repo_id, revision, download_dir)
    return _local_config(snapshot.folder), model


def _local_config(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(f"model: {str(path)!r} has no {CONFIG_FILE}")
        return read_json(path / CONFIG_FILE)
    if path.suffix.lower() == ".gguf":
        from mini_vllm.gguf.config import gguf_hf_config
        from mini_vllm.gguf.reader import open_gguf

        return gguf_hf_config(open_gguf(path)).raw
    if path.suffix == ".json":
        return read_json(path)
    raise CheckpointError(f"model: {str(path)!r} is no folder, {CONFIG_FILE} or .gguf file")
