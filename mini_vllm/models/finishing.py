"""Finishing layers while the rest of a checkpoint is still being read.

`LayerFinisher` is handed a model whose parameters are empty and watches their `weight_loader`s. When all parameters of
a layer have been filled, its `process_weights_after_loading` runs at once, exactly once, and a plain weight that no
layer holds any more gives its memory back. So at any time one layer at most exists plain and packed.
"""

import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

Slot = tuple[int, Hashable]
"""A parameter, by id, and one of the checkpoint tensors it is filled from."""


class LayerFinisher:
    """A context manager: inside it, filling parameters finishes layers; afterwards loaders are what they were.

    seconds: spent in `process_weights_after_loading` so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        self._unfinished = [module for module in model.modules() if hasattr(module, "quant_method")]
        self._missing: dict[int, set[Slot]] = {}
        """What a layer, by id, still waits for."""
        self._layers_of: dict[int, list[nn.Module]] = {}
        self._holders: dict[int, list[tuple[nn.Module, str]]] = {}
        """Who has a parameter, by id, under which name; tied weights have several."""
        self._originals: list[tuple[nn.Parameter, Callable[..., None]]] = []
        for module in model.modules():
            for name, param in module._parameters.items():
                if param is not None:
                    self._holders.setdefault(id(param), []).append((module, name))
        for module in self._unfinished:
            self._watch(module)

    def _watch(self, module: nn.Module) -> None:
        missing = self._missing[id(module)] = set()
        for param in module.parameters(recurse=False):
            missing.update((id(param), shard_id) for shard_id in getattr(param, "shard_ids", (None,)))
            self._layers_of.setdefault(id(param), []).append(module)

    def __enter__(self) -> "LayerFinisher":
        watched = {id(param): param for module in self._unfinished for param in module.parameters(recurse=False)}
        for param in watched.values():
            original = getattr(param, "weight_loader", None)
            if original is not None:
                self._originals.append((param, original))
                param.weight_loader = self._reporting(original)  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        for param, original in self._originals:
            param.weight_loader = original  # type: ignore[attr-defined]
        self._originals.clear()

    def _reporting(self, load: Callable[..., None]) -> Callable[..., None]:
        def load_and_report(
            param: nn.Parameter, tensor: Any, shard_id: Hashable = None, expert_id: int | None = None
        ) -> None:
            load(param, tensor, shard_id, expert_id)
            # With experts, one shard says nothing of the others: such layers are left for `finish_rest`.
            if expert_id is None:
                self._filled(param, shard_id)

        return load_and_report

    def _filled(self, param: nn.Parameter, shard_id: Hashable) -> None:
        """shard_id: None stands for all of the parameter."""
        for layer in self._layers_of[id(param)]:
            missing = self._missing[id(layer)]
            done = {slot for slot in missing if slot[0] == id(param) and shard_id in (None, slot[1])}
            missing -= done
            if done and not missing:
                self._finish(layer)

    def finish_rest(self) -> None:
        """Finish the layers that nothing was read for: dummy weights, layers without parameters."""
        for layer in list(self._unfinished):
            self._finish(layer)

    def _finish(self, layer: nn.Module) -> None:
        start = time.perf_counter()
        self._unfinished = [other for other in self._unfinished if other is not layer]
        before = list(layer.parameters(recurse=False))
        layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]
        for param in before:
            # Whoever reads the checkpoint still has a list of all parameters, so the object stays; its memory goes.
            if not any(holder._parameters.get(name) is param for holder, name in self._holders[id(param)]):
                param.data = param.data.new_empty(0)
        self.seconds += time.perf_counter() - start


def release_weights(model: nn.Module) -> None:
    """Give back the memory of all weights, packed ones too, however long somebody keeps the model object."""
    for param in model.parameters():
        param.data = param.data.new_empty(0)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) or name == "linear_kernel":
                vars(module)[name] = None
