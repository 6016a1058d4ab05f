"""Logits processors of the user's own: for whole batches (`LogitsProcessor`), or callables of single requests.

A batch-level processor has vLLM's interface: it is told which rows come, go and move, and changes all logits at once.
It is given to `LLM(logits_processors=[...])`, as a class or as "module:Class", or installed under the entry point group
`mini_vllm.logits_processors`.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import entry_points
from typing import Any

import torch

from mini_vllm.exceptions import ConfigError
from mini_vllm.sampling_params import SamplingParams

ENTRY_POINT_GROUP = "mini_vllm.logits_processors"
RequestProcessor = Callable[[list[int], torch.Tensor], torch.Tensor]
"""From the output tokens so far and a row of logits `[vocab]` (its own to change) to the new row."""


class MoveDirectionality(Enum):
    """Whether the second row of a move takes the place of the first."""

    UNIDIRECTIONAL = 0
    SWAP = 1


AddedRequest = tuple[int, SamplingParams, list[int], list[int]]
"""Row, parameters, prompt ids, and output ids: a list that grows as tokens are sampled."""
MovedRequest = tuple[int, int, MoveDirectionality]
"""From row, to row."""


@dataclass
class BatchUpdate:
    """How the rows changed since the last update. To be followed in this order: added, removed, moved.

    batch_size: rows there are now. added: rows that are new, which may take the places of removed ones.
    removed: rows that are gone and whose places nobody took.
    """

    batch_size: int
    removed: Sequence[int] = field(default_factory=list)
    added: Sequence[AddedRequest] = field(default_factory=list)
    moved: Sequence[MovedRequest] = field(default_factory=list)


class LogitsProcessor(ABC):
    """Changes the logits of a batch. One instance a worker; row i of the logits is row i of the batch."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for parameters (say, of `extra_args`) it cannot work with: that request fails."""

    @abstractmethod
    def __init__(self, config: Any, device: torch.device, is_pin_memory: bool) -> None:
        """config: the `EngineConfig`."""

    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """New logits `[batch_size, vocab]` float32; they may be the given ones, changed in place.

        Rows of requests in the middle of their prompt are there too, and what becomes of them does not matter.
        """

    @abstractmethod
    def is_argmax_invariant(self) -> bool:
        """Whether the highest logit of a row always stays so. Then it is applied after the temperature, and not at
        all in steps in which every row is greedy; otherwise before the penalties."""

    @abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before every `apply` of a step; None if no row came, went or moved."""


def load_logits_processors(
    given: Sequence[str | type[LogitsProcessor]], config: Any, device: torch.device, is_pin_memory: bool
) -> list[LogitsProcessor]:
    """Instances of the installed processors and then of the given ones. Raises `ConfigError` naming what is wrong."""
    installed = [_installed(entry) for entry in entry_points(group=ENTRY_POINT_GROUP)]
    classes = installed + [_class_of(item) for item in given]
    return [cls(config, device, is_pin_memory) for cls in dict.fromkeys(classes)]


def _installed(entry: Any) -> type[LogitsProcessor]:
    try:
        loaded = entry.load()
    except Exception as error:
        raise ConfigError(f"logits_processors: entry point {entry.name!r} cannot be loaded: {error}") from error
    return _checked(loaded, f"entry point {entry.name!r}")


def _class_of(item: Any) -> type[LogitsProcessor]:
    if not isinstance(item, str):
        return _checked(item, repr(item))
    module, separator, name = item.partition(":")
    if not (module and separator and name):
        raise ConfigError(f'logits_processors: must be a class or "module:Class", got {item!r}')
    try:
        loaded = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"logits_processors: {item!r} cannot be loaded: {error}") from error
    return _checked(loaded, repr(item))


def _checked(loaded: Any, name: str) -> type[LogitsProcessor]:
    if not (isinstance(loaded, type) and issubclass(loaded, LogitsProcessor)):
        raise ConfigError(
            f"logits_processors: {name} is no subclass of mini_vllm.sampling.logits_processor.LogitsProcessor"
        )
    return loaded


def net_update(before: Sequence[int], after: Sequence[int], added: dict[int, AddedRequest]) -> BatchUpdate:
    """What turns one layout of rows into another, in the order in which a `BatchUpdate` is followed.

    before, after: the request in every row, as numbers of which none is used twice. added: by number, what is said of
    each new one, with any row. New requests take the places of removed ones first, so that none is lost that is yet to
    move.
    """
    remaining = set(after)
    layout: dict[int, int] = {row: number for row, number in enumerate(before) if number in remaining}
    holes = [row for row in range(max(len(before), len(after))) if row not in layout]
    news = [number for number in after if number not in set(before)]
    update = BatchUpdate(len(after))
    places = dict(zip(news, holes, strict=False))
    update.added = [(row, *added[number][1:]) for number, row in places.items()]
    update.removed = [row for row in holes[len(news) :] if row < len(before)]
    layout |= {row: number for number, row in places.items()}
    update.moved = _moves(layout, after)
    return update


def _moves(layout: dict[int, int], after: Sequence[int]) -> list[MovedRequest]:
    row_of = {number: row for row, number in layout.items()}
    moves: list[MovedRequest] = []
    for target, number in enumerate(after):
        source = row_of[number]
        if source == target:
            continue
        evicted = layout.pop(target, None)
        del layout[source]
        layout[target], row_of[number] = number, target
        if evicted is None:
            moves.append((source, target, MoveDirectionality.UNIDIRECTIONAL))
        else:
            moves.append((source, target, MoveDirectionality.SWAP))
            layout[source], row_of[evicted] = evicted, source
    return moves
