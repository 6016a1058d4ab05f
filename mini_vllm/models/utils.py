"""What model files share: building layers by prefix, and filling parameters from checkpoint tensors exactly once."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.linear import LoadedWeight

IntermediateTensors = dict[str, torch.Tensor]
"""What one pipeline stage hands to the next: hidden states and residual."""
PackedModulesMapping = Mapping[str, Sequence[str]]
"""Fused module name -> names of the checkpoint modules it holds, in shard order."""
LAYER_TYPES = ("full_attention", "sliding_attention")
_MAX_NAMES_SHOWN = 8


def join_prefix(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def make_layers(
    num_layers: int, make_layer: Callable[[str], nn.Module], prefix: str, *, start: int = 0, end: int | None = None
) -> nn.ModuleList:
    """Layers `start` to `end` built as `make_layer(prefix)`; the others stay empty slots, so that numbers hold."""
    end = num_layers if end is None else end
    return nn.ModuleList(
        make_layer(f"{prefix}.{index}") if start <= index < end else nn.Identity() for index in range(num_layers)
    )


def refuse_options(raw_config: Mapping[str, Any], model_type: str, unsupported: Iterable[str]) -> None:
    """Raise `UnsupportedModelError` for any option that is set and would change results if ignored."""
    for key in unsupported:
        if raw_config.get(key):
            raise UnsupportedModelError(
                f"config.json: {key}={raw_config[key]!r} is not supported for model_type {model_type!r}"
            )


def layer_types(config: HFConfig) -> list[str] | None:
    """The config's word on each layer, one of `LAYER_TYPES`; None when it has none. Raises `CheckpointError`."""
    types = config.raw.get("layer_types")
    if types is None:
        return None
    if (
        not isinstance(types, list)
        or len(types) != config.num_hidden_layers
        or any(t not in LAYER_TYPES for t in types)
    ):
        raise CheckpointError(f"config.json: layer_types must name one of {LAYER_TYPES} for each layer, got {types!r}")
    return types


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, shared ones once, prepacked ones (which are no parameters any more) included."""
    packed = (vars(module).get("packed_weight") for module in model.modules())
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *packed) if tensor is not None}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def load_weights(
    model: nn.Module,
    weights: Iterable[tuple[str, LoadedWeight]],
    packed_modules_mapping: PackedModulesMapping,
    *,
    aliases: Mapping[str, str] | None = None,
    ignored_suffixes: tuple[str, ...] = (),
) -> None:
    """Hand each checkpoint tensor to its parameter's `weight_loader`.

    Every (parameter, shard) is filled exactly once: a tensor that is missing, unexpected, given twice or mis-shaped
    is a `CheckpointError` naming it. aliases: other names of a tied tensor; where the checkpoint has both, they must
    be equal. Tensors ending in one of `ignored_suffixes` are skipped.
    """
    slots = expected_tensors(model, packed_modules_mapping)
    filled_by: dict[str, str] = {}
    unexpected: list[str] = []
    for name, tensor in weights:
        slot = (aliases or {}).get(name, name)
        if slot not in slots:
            unexpected += [] if name.endswith(ignored_suffixes) else [name]
        elif slot not in filled_by:
            _fill(name, *slots[slot], tensor)
            filled_by[slot] = name
        elif filled_by[slot] == name:
            raise CheckpointError(f"tensor {name} is in the checkpoint twice")
        else:
            _require_equal(name, filled_by[slot], *slots[slot], tensor)
    kinds = {"missing": [slot for slot in slots if slot not in filled_by], "unexpected": unexpected}
    problems = [f"{kind}: {_shorten(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(f"tensors do not fit {type(model).__name__}: {'; '.join(problems)}")


def expected_tensors(
    model: nn.Module, packed_modules_mapping: PackedModulesMapping
) -> dict[str, tuple[nn.Parameter, Hashable]]:
    """Checkpoint tensor name -> (parameter, shard id), for every slot of every parameter."""
    slots: dict[str, tuple[nn.Parameter, Hashable]] = {}
    for name, param in model.named_parameters():
        module_path, _, leaf = name.rpartition(".")
        parent, _, module_name = module_path.rpartition(".")
        # A module that the mapping does not name is one tensor in the checkpoint too, whatever it fuses.
        sources = packed_modules_mapping.get(module_name)
        shards = [(module_name, None)] if sources is None else zip(sources, _shard_ids(param), strict=True)
        for source, shard_id in shards:
            slots[f"{join_prefix(parent, source)}.{leaf}"] = (param, shard_id)
    return slots


def _shard_ids(param: nn.Parameter) -> tuple[Hashable, ...]:
    ids: tuple[Hashable, ...] = getattr(param, "shard_ids", (None,))
    return ids


def _fill(name: str, param: nn.Parameter, shard_id: Hashable, tensor: LoadedWeight) -> None:
    try:
        loader: Callable[..., None] = param.weight_loader  # type: ignore[attr-defined]
        loader(param, tensor, shard_id)
    except CheckpointError as error:
        raise CheckpointError(f"tensor {name} {error}") from error


def _require_equal(name: str, first_name: str, param: nn.Parameter, shard_id: Hashable, tensor: LoadedWeight) -> None:
    """A tied tensor came under its second name: take neither if they differ, for one would silently be dropped."""
    first = param.data.clone()
    _fill(name, param, shard_id, tensor)
    if not first.equal(param.data):
        raise CheckpointError(
            f"tensor {name} differs from {first_name}, but config.json ties them (tie_word_embeddings)"
        )


def _shorten(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES_SHOWN
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
