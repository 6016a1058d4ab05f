"""Logits processors: how they are found, told of rows, and kept from harming others."""

import dataclasses
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.exceptions import ConfigError
from mini_vllm.sampling import logits_processor
from mini_vllm.sampling.history import StepRows
from mini_vllm.sampling.logits_processor import (
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
    load_logits_processors,
    net_update,
)
from mini_vllm.sampling.metadata import SamplingMetadata
from mini_vllm.sampling.sampler import NO_TOKEN, Sampler
from mini_vllm.sampling_params import SamplingParams
from tests.sampling.rig import VOCAB, Rig, Row


class Follower(LogitsProcessor):
    """Keeps what it is told of each row in a dict, exactly as the interface says to. Forces `extra_args["force"]`."""

    invariant = False

    def __init__(self, config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, tuple[SamplingParams, list[int], list[int]]] = {}
        self.updates: list[BatchUpdate | None] = []

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if (sampling_params.extra_args or {}).get("force", 0) < 0:
            raise ValueError("force: must be 0 or more")

    def is_argmax_invariant(self) -> bool:
        return self.invariant

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        self.updates.append(batch_update)
        if batch_update is None:
            return
        for row, params, prompt, output in batch_update.added:
            self.rows[row] = params, prompt, output
        for row in batch_update.removed:
            del self.rows[row]
        for source, target, direction in batch_update.moved:
            if direction is MoveDirectionality.SWAP:
                self.rows[source], self.rows[target] = self.rows[target], self.rows[source]
            else:
                self.rows[target] = self.rows.pop(source)
        assert sorted(self.rows) == list(range(batch_update.batch_size))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        assert len(logits) == len(self.rows)
        for row, (params, _, _) in self.rows.items():
            forced = (params.extra_args or {}).get("force")
            if forced is not None:
                logits[row] = -torch.inf
                logits[row, forced] = 0.0
        return logits


class Sharpener(Follower):
    """Doubles what is there: the highest stays the highest."""

    invariant = True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * 2


def follower() -> Follower:
    return Follower(None, torch.device("cpu"), False)


@settings(max_examples=80)
@given(st.lists(st.lists(st.sampled_from(["add", "remove", "grow", "step"]), max_size=6), max_size=8), st.randoms())
def test_a_processor_that_follows_its_updates_knows_every_row(steps: list[list[str]], random: Any) -> None:
    processor = follower()
    rig = Rig([processor])
    number = 0
    for events in steps:
        for event in events:
            if event == "add" and len(rig.rows) < 5:
                number += 1
                rig.add(Row(SamplingParams(seed=number), [number % VOCAB], [1] * (number % 2)))
            elif event == "remove" and rig.rows:
                rig.remove(random.randrange(len(rig.rows)))
            elif event == "grow" and rig.rows:
                rig.append(list(range(len(rig.rows))), [number % VOCAB] * len(rig.rows))
        if rig.rows:
            rig.edited(np.zeros((len(rig.rows), VOCAB)))
            told = [processor.rows[row] for row in range(len(rig.rows))]
            assert told == [(row.params, row.prompt, row.output) for row in rig.rows]


def test_a_row_that_was_replaced_by_one_of_the_same_id_is_new() -> None:
    assert net_update([1, 2], [1, 3], {3: (9, SamplingParams(), [], [])}).added == [(1, SamplingParams(), [], [])]


def test_nothing_is_said_when_nothing_changed() -> None:
    processor = follower()
    rig = Rig([processor])
    rig.add(Row(SamplingParams(), [1]))
    for _ in range(2):
        rig.edited(np.zeros((1, VOCAB)))
        rig.append([0], [3])
    assert processor.updates[0] is not None and processor.updates[1] is None


def test_a_processor_sees_the_whole_batch_also_when_some_rows_do_not_sample() -> None:
    rig = Rig([follower()])
    for forced in (3, 5, 7):
        rig.add(Row(SamplingParams(extra_args={"force": forced}), [1]))
    assert rig.edited(np.zeros((2, VOCAB)), [0, 2]).argmax(axis=1).tolist() == [3, 7]


def test_parameters_a_processor_refuses_are_that_rows_error() -> None:
    rig = Rig([follower()])
    assert rig.add(Row(SamplingParams(extra_args={"force": -1}), [1])) == "force: must be 0 or more"
    assert rig.add(Row(SamplingParams(extra_args={"force": 2}), [1])) is None
    assert rig.edited(np.zeros((2, VOCAB)))[1].argmax() == 2


def test_an_argmax_invariant_processor_acts_after_the_temperature_and_not_on_greedy_rows() -> None:
    processor = Sharpener(None, torch.device("cpu"), False)
    rig = Rig([processor])
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    rig.add(Row(SamplingParams(), [1]))
    rig.add(Row(SamplingParams(), [1]))
    step = StepRows(np.arange(2), 2)
    assert rig.state.edit(step) is None
    hot = [SamplingParams(temperature=2.0, seed=1, top_k=9), SamplingParams(temperature=0.0)]
    cold = [SamplingParams(temperature=1.0, seed=1, top_k=9), SamplingParams(temperature=0.0)]
    for draw in range(50):
        metadata = SamplingMetadata.from_params(hot, [1, 0], [draw, 0])
        scaled = dataclasses.replace(metadata, rescale=rig.state.rescale(step))
        plain = SamplingMetadata.from_params(cold, [1, 0], [draw, 0])
        assert Sampler()(logits, scaled).tolist() == Sampler()(logits, plain).tolist()


# --- callables of single requests ---------------------------------------------------------------------------


def draw(rig: Rig, logits: np.ndarray) -> list[int]:
    step = StepRows(np.arange(len(rig.rows)), len(rig.rows))
    metadata = SamplingMetadata.from_params([row.params for row in rig.rows], [0] * len(rig.rows), [0] * len(rig.rows))
    return Sampler()(
        torch.from_numpy(logits.astype(np.float32)), dataclasses.replace(metadata, edit=rig.state.edit(step))
    ).tolist()


def test_a_callable_gets_the_output_tokens_and_a_row_of_its_own() -> None:
    seen = []

    def only_eleven(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(list(token_ids))
        logits[:] = -torch.inf
        logits[11] = 1.0
        return logits

    rig = Rig()
    rig.add(Row(SamplingParams(temperature=0.0), [1]))
    rig.add(Row(SamplingParams(temperature=0.0, logits_processors=[only_eleven]), [1, 2], [3]))  # type: ignore[arg-type]
    logits = np.eye(2, VOCAB)
    assert draw(rig, logits) == [0, 11]
    rig.append([0, 1], [0, 11])
    rig.remove(0)  # the row moves, and its callable with it
    assert draw(rig, logits[:1]) == [11]
    assert seen == [[3], [3, 11]]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda ids, logits: 1 / 0, "logits_processors[0] raised ZeroDivisionError: division by zero"),
        (lambda ids, logits: None, "logits_processors[0] raised TypeError: must return logits, got NoneType"),
        (lambda ids, logits: logits[:2], f"ValueError: returned logits (2,), expected ({VOCAB},)"),
    ],
)
def test_a_callable_that_raises_fails_its_row_alone(broken: Any, message: str) -> None:
    rig = Rig()
    for processors in ([], [broken], []):
        rig.add(Row(SamplingParams(temperature=0.0, logits_processors=processors), [1]))  # type: ignore[arg-type]
    assert draw(rig, np.eye(3, VOCAB)) == [0, NO_TOKEN, 2]
    assert list(rig.state.errors) == [1] and message in rig.state.errors[1]


def test_a_callable_that_masks_everything_fails_its_row_alone() -> None:
    rig = Rig()
    nothing = SamplingParams(logits_processors=(lambda ids, logits: torch.full_like(logits, -torch.inf),))
    for params in (SamplingParams(temperature=0.0), nothing):
        rig.add(Row(params, [1]))
    assert draw(rig, np.eye(2, VOCAB)) == [0, NO_TOKEN]


# --- loading ------------------------------------------------------------------------------------------------


def load(*given: Any) -> list[str]:
    return [type(p).__name__ for p in load_logits_processors(given, None, torch.device("cpu"), False)]


def test_processors_are_loaded_by_class_name_and_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("a_plugin")
    module.Sharpener, module.number = Sharpener, 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_plugin", module)
    assert load(Follower, "a_plugin:Sharpener") == ["Follower", "Sharpener"]
    entry = types.SimpleNamespace(name="sharp", load=lambda: Sharpener)
    monkeypatch.setattr(logits_processor, "entry_points", lambda group: [entry] if group.endswith("processors") else [])
    assert load(Follower) == ["Sharpener", "Follower"]
    assert load(Sharpener) == ["Sharpener"]  # once, however often it is named


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ("a_plugin", '"module:Class"'),
        ("no_such_module:Thing", "cannot be loaded: No module named 'no_such_module'"),
        ("math:Thing", "has no attribute 'Thing'"),
        ("math:pi", "'math:pi' is no subclass of"),
        (int, "is no subclass of"),
        (7, "is no subclass of"),
    ],
)
def test_what_cannot_be_loaded_is_said(given_: Any, message: str) -> None:
    with pytest.raises(ConfigError, match="logits_processors") as error:
        load(given_)
    assert message in str(error.value)
