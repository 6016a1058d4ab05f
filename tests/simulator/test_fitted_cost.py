"""The fitted cost: tables by hand, a fit that finds what made the steps, files that keep it."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.cost import StepLoad, TwoConstantCost
from mini_vllm.simulator.fit import entries_for, fit_cost, nonnegative_least_squares
from mini_vllm.simulator.fitted import FORMAT, FittedCost

COST = FittedCost(
    ((1, 0.010), (8, 0.012), (9, 0.020), (100, 0.111)), ((2, 0.001), (4, 0.003)), key_seconds=1e-6, chunk_seconds=2e-4,
    pair_seconds=1e-8, request_seconds=1e-3, prompt_token_seconds=1e-6,
)  # fmt: skip


def test_a_step_by_hand() -> None:
    """Two decodes at 9 and 19 tokens read 30 keys; a chunk of 6 after 4 is 5 + ... + 10 = 45 pairs; 8 tokens in all."""
    load = StepLoad.of([(9, 1), (19, 1), (4, 6)])
    assert COST.step_seconds(load) == pytest.approx(0.012 + 0.002 + 30e-6 + 2e-4 + 45e-8)
    assert COST.step_seconds(StepLoad.of([(9, 1)])) == pytest.approx(0.010 + 10e-6)
    assert COST.add_seconds(500) == pytest.approx(1.5e-3)


def test_tables_jump_where_they_were_measured_to_and_go_on_behind_their_end() -> None:
    table = FittedCost(COST.token_seconds)
    steps = [table.step_seconds(StepLoad.of([(0, tokens)])) for tokens in (8, 9, 54, 55, 100, 200)]
    assert steps[:3] == pytest.approx([0.012, 0.020, 0.065])
    assert steps[5] == pytest.approx(0.111 + 100 * 0.001), "as it rose from 50 to 100"


def test_a_slow_machine_slows_everything() -> None:
    slow = FittedCost(((1, 0.01),), request_seconds=0.5, slowdown=1.25)
    assert slow.step_seconds(StepLoad.of([(0, 1)])) == pytest.approx(0.0125)
    assert slow.add_seconds(9) == pytest.approx(0.625)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_seconds": ()}, "token_seconds: sizes must ascend"),
        ({"token_seconds": ((4, 1.0), (2, 1.0))}, "token_seconds: sizes must ascend"),
        ({"token_seconds": ((1, -1.0),)}, "token_seconds: seconds must be at least 0"),
        ({"token_seconds": ((1, 0.0),)}, "steps that take no time"),
        ({"sample_seconds": ((2, math.nan),)}, "sample_seconds: seconds must be at least 0"),
        ({"pair_seconds": -1.0}, "pair_seconds: must be at least 0"),
        ({"slowdown": 0.5}, "slowdown: must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FittedCost(**{"token_seconds": ((1, 1.0),)} | change)


# -- fitting -----------------------------------------------------------------------------------------------------


def loads(count: int, seed: int = 0) -> list[StepLoad]:
    """Decodes alone, chunks alone, and both."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        rows = [(rng.randrange(900), 1) for _ in range(rng.randrange(1, 40) if number % 3 else 0)]
        if number % 3 != 1:
            rows += [(rng.choice((0, 0, 300)), rng.randrange(2, 200)) for _ in range(rng.randrange(1, 4))]
        made.append(StepLoad.of(rows))
    return made


class Jumping:
    """Like `COST`, with jumps where a fit must find them: at 9 tokens and at 17."""

    def step_seconds(self, load: StepLoad) -> float:
        tokens, rows = load.num_tokens, load.num_sampled
        level = 5e-3 + 1e-4 * tokens + (2e-3 if tokens > 8 else 0.0) - (1.5e-3 if tokens > 16 else 0.0)
        keys = sum(load.starts) + len(load.starts)
        chunks = 3e-4 * len(load.chunks) + 2e-8 * load.prefill_pairs
        return level + 5e-5 * (rows - 1) + 1e-6 * keys + chunks


def test_a_fit_finds_what_made_the_steps_wherever_it_jumps() -> None:
    """With 2 % noise, and every twentieth step held up by something else for as long again."""
    rng, truth = random.Random(1), Jumping()
    samples = []
    for number, load in enumerate(loads(900)):
        held_up = 2.0 if number % 20 == 0 else 1.0
        samples.append((load, truth.step_seconds(load) * rng.gauss(1.0, 0.02) * held_up))
    fitted = fit_cost(samples)
    errors = [abs(fitted.step_seconds(load) / truth.step_seconds(load) - 1) for load in loads(300, seed=9)]
    assert np.median(errors) < 0.02 and np.percentile(errors, 95) < 0.06
    for tokens in (8, 9, 16, 17):
        load = StepLoad.of([(5, 1)] * tokens)
        assert fitted.step_seconds(load) == pytest.approx(truth.step_seconds(load), rel=0.08)
    smooth = TwoConstantCost(5e-3, 1e-4)  # the control: a straight line would be far off just there
    assert smooth.step_seconds(StepLoad.of([(5, 1)] * 9)) != pytest.approx(
        truth.step_seconds(StepLoad.of([(5, 1)] * 9)), rel=0.2
    )


def test_small_sizes_all_get_an_entry_and_large_ones_a_few() -> None:
    assert entries_for([5, 1, 2, 2, 3], 64, 1.15) == [1, 2, 3, 5]
    assert entries_for([1, 10, 11, 12, 13, 30, 31], 4, 1.2) == [1, 10, 12, 31]
    assert entries_for([], 4, 1.3) == []


@given(st.integers(0, 2**32 - 1), st.integers(1, 25))
def test_least_squares_without_negatives_is_optimal(seed: int, columns: int) -> None:
    """The conditions of Karush, Kuhn and Tucker: no gradient where x > 0, none that pulls x up where it is 0."""
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(30, columns)), rng.normal(size=30)
    x = nonnegative_least_squares(matrix, target)
    gradient = matrix.T @ (matrix @ x - target)
    assert (x >= 0).all()
    assert gradient[x > 0] == pytest.approx(0, abs=1e-6)
    assert (gradient[x == 0] >= -1e-6).all()


def test_a_feature_that_never_varies_does_no_harm() -> None:
    matrix = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert nonnegative_least_squares(matrix, np.array([2.0, 2.0, 2.0])).tolist() == pytest.approx([2.0, 0.0])


def test_too_few_steps_and_steps_without_a_duration_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 steps were measured, at least 10"):
        fit_cost([(load, 1.0) for load in loads(3)])
    with pytest.raises(ConfigError, match="no time at all"):
        fit_cost([(load, 0.0) for load in loads(30)])


# -- files -------------------------------------------------------------------------------------------------------


def test_a_fitted_cost_survives_its_file(tmp_path: Path) -> None:
    cost = FittedCost(((1, 0.5),), ((2, 0.25),), 1e-6, slowdown=1.5, quality={"num_steps": 4.0}, about={"cpu": {}})
    cost.save(tmp_path / "cost.json")
    assert FittedCost.load(tmp_path / "cost.json") == cost


WHOLE: dict[str, Any] = {
    "format": FORMAT, "token_seconds": [[1, 0.5]], "sample_seconds": [], "slowdown": 1,
    "seconds_per": {"key": 0, "chunk": 0, "pair": 0, "request": 0, "prompt_token": 0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "is no fitted cost model"),
        (json.dumps({"format": "mini-vllm step cost 1"}), "is no fitted cost model .* write one with --calibrate"),
        (json.dumps(WHOLE | {"seconds_per": {"key": 1}}), "a number for each of"),
        (json.dumps(WHOLE | {"token_seconds": [1, 2]}), r"token_seconds must be a list of \[size, seconds\]"),
        (json.dumps(WHOLE | {"token_seconds": [[1, -1]]}), "token_seconds: seconds must be at least 0"),
        (json.dumps(WHOLE | {"slowdown": None}), "slowdown must be a number"),
    ],
)
def test_a_file_that_is_no_cost_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(WHOLE), encoding="utf-8")
    FittedCost.load(path)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        FittedCost.load(path)
