"""Cost models: the roofline is the planner's, a fit finds what made the data, and files keep it."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.cost import FittedCost, RooflineCost, StepLoad, TwoConstantCost, features_of
from mini_vllm.simulator.fit import fit_cost, nonnegative_least_squares
from mini_vllm.simulator.options import SimulationOptions, sized_for
from mini_vllm.simulator.planner.hardware import hardware_preset
from mini_vllm.simulator.planner.options import PlanOptions
from mini_vllm.simulator.planner.parallel import tp_comm_seconds_per_step
from mini_vllm.simulator.planner.setup import Setup
from mini_vllm.simulator.planner.source import resolve_model

MODELS = ["llama-3-8b", "mistral-7b", "deepseek-v3", "mixtral-8x7b", "gemma-2-9b"]

chunks = st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 3000)), min_size=1, max_size=12)


def known(name: str) -> bool:
    try:
        resolve_model(preset=name)
    except ConfigError:
        return False
    return True


def setup(preset: str = "llama-3-8b", gpu: str = "h200", **options: Any) -> Setup:
    return Setup(resolve_model(preset=preset), hardware_preset(gpu), PlanOptions(**options))


@pytest.mark.parametrize("name", [name for name in MODELS if known(name)])
@given(plan=chunks, ranks=st.sampled_from([1, 4]))
def test_the_roofline_is_the_planners(name: str, plan: list[tuple[int, int]], ranks: int) -> None:
    planned = setup(name, tensor_parallel_size=ranks, efficiency=0.7)
    expected = planned.steps.seconds(plan, len(plan) // 2)
    assert RooflineCost(planned.steps).step_seconds(StepLoad.of(plan, len(plan) // 2)) == pytest.approx(expected)


def test_the_models_of_that_test_exist() -> None:
    assert sum(map(known, MODELS)) >= 3


def test_ranks_pay_for_talking() -> None:
    planned = setup(tensor_parallel_size=4)
    load, link = StepLoad.of([(100, 1)] * 8), planned.hardware.link
    talk = tp_comm_seconds_per_step(32, 8, 4096, 4, link.bytes_per_second, link.latency_seconds)
    silent, whole = RooflineCost(planned.steps), RooflineCost.from_setup(planned)
    assert whole.step_seconds(load) - silent.step_seconds(load) == pytest.approx(talk)


def test_stages_of_a_pipeline_are_refused() -> None:
    with pytest.raises(ConfigError, match="pipeline_parallel_size: 2 stages are not simulated"):
        RooflineCost.from_setup(setup(pipeline_parallel_size=2))


@pytest.mark.parametrize("cost", [TwoConstantCost(1.0, 1.0), FittedCost((1.0,) * 5), RooflineCost(setup().steps)])
def test_a_step_that_computes_nothing_takes_no_time(cost: Any) -> None:
    assert cost.step_seconds(StepLoad.of([])) == 0.0


def test_two_constants_by_hand() -> None:
    assert TwoConstantCost(0.02, 0.001).step_seconds(StepLoad.of([(5, 1), (0, 9)])) == pytest.approx(0.03)


@pytest.mark.parametrize("constants", [(-1.0, 0.1), (0.1, float("nan")), (0.0, 0.0)])
def test_constants_that_cannot_be_are_refused(constants: tuple[float, float]) -> None:
    with pytest.raises(ConfigError):
        TwoConstantCost(*constants)


def test_features_by_hand() -> None:
    """A decode at 9 tokens reads 10; a chunk of 3 after 4 reads 7, in 5 + 6 + 7 pairs."""
    assert features_of(StepLoad.of([(9, 1), (4, 3)])) == (1.0, 4, 2, 17, 18)


# -- fitting -----------------------------------------------------------------------------------------------------


def loads(count: int, seed: int = 0) -> list[StepLoad]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        rows = [(rng.randrange(2000), 1) for _ in range(rng.randrange(30))]
        rows += [(rng.randrange(500), rng.randrange(2, 400)) for _ in range(rng.randrange(3))]
        made.append(StepLoad.of(rows or [(0, 5)]))
    return made


@pytest.mark.parametrize("truth", [(4e-3, 8e-5, 2e-4, 1e-6, 3e-8), (4e-3, 8e-5, 0.0, 1e-6, 0.0)])
def test_a_fit_finds_the_coefficients_that_made_the_steps(truth: tuple[float, ...]) -> None:
    """With 3 % noise, and every twentieth step held up by something else for as long again."""
    rng, cost = random.Random(1), FittedCost(truth)
    samples = []
    for number, load in enumerate(loads(400)):
        held_up = 2.0 if number % 20 == 0 else 1.0
        samples.append((load, cost.step_seconds(load) * rng.gauss(1.0, 0.03) * held_up))
    fitted = fit_cost(samples)
    for load in loads(50, seed=9):
        assert fitted.step_seconds(load) == pytest.approx(cost.step_seconds(load), rel=0.03)
    assert fitted.quality["median_relative_error"] < 0.03
    assert fitted.quality["num_steps"] == 400


@given(st.integers(0, 2**32 - 1))
def test_least_squares_without_negatives_is_optimal(seed: int) -> None:
    """The conditions of Karush, Kuhn and Tucker: no gradient where x > 0, none that pulls x up where it is 0."""
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(30, 5)), rng.normal(size=30)
    x = nonnegative_least_squares(matrix, target)
    gradient = matrix.T @ (matrix @ x - target)
    assert (x >= 0).all()
    assert gradient[x > 0] == pytest.approx(0, abs=1e-8)
    assert (gradient[x == 0] >= -1e-8).all()


def test_a_feature_that_never_varies_does_no_harm() -> None:
    matrix = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert nonnegative_least_squares(matrix, np.array([2.0, 2.0, 2.0])).tolist() == pytest.approx([2.0, 0.0])


def test_too_few_steps_and_steps_without_a_duration_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 steps were measured, at least 10"):
        fit_cost([(load, 1.0) for load in loads(3)])
    with pytest.raises(ConfigError, match="no time at all"):
        fit_cost([(load, 0.0) for load in loads(30)])


def test_a_fitted_cost_survives_its_file(tmp_path: Path) -> None:
    cost = FittedCost((4e-3, 8e-5, 2e-4, 1e-6, 3e-8), {"num_steps": 4.0}, {"cpu": {"model": "x"}})
    cost.save(tmp_path / "cost.json")
    assert FittedCost.load(tmp_path / "cost.json") == cost


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "is no fitted cost model"),
        (json.dumps({"format": "mini-vllm step cost 1", "seconds_per": {"step": 1}}), "a number for each of"),
        (
            json.dumps(
                {"format": "mini-vllm step cost 1",
                 "seconds_per": {"step": 1, "tokens": -1, "requests": 0, "context_tokens": 0, "prefill_pairs": 0}}
            ),
            "coefficients: must be 5 numbers of at least 0",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_no_cost_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        FittedCost.load(path)


# -- from the planner --------------------------------------------------------------------------------------------


def test_the_pool_is_the_planners() -> None:
    planned = setup(gpu="a100-80g", max_num_seqs=99, block_size=32)
    options = sized_for(planned, SimulationOptions(num_replicas=3))
    assert options.num_gpu_blocks == planned.num_blocks
    assert (options.max_num_seqs, options.block_size, options.num_replicas) == (99, 32, 3)
    assert options.max_model_len == 8192


def test_no_room_for_the_weights_is_said_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"no room for a KV cache on l4: .* weights 131"):
        sized_for(setup("llama-3-70b", "l4"))


# -- calibration -------------------------------------------------------------------------------------------------


def test_a_real_engine_can_be_calibrated() -> None:
    """On the bundled model, with a context so short that it is quick; how good the fit is depends on the machine."""
    from mini_vllm.engine.arg_utils import EngineArgs
    from mini_vllm.engine.llm_engine import LLMEngine
    from mini_vllm.simulator.calibrate import calibrate, typical_steps

    engine = LLMEngine.from_engine_args(
        EngineArgs(num_threads=1, max_model_len=32, max_num_seqs=4, num_gpu_blocks_override=40, disable_log_stats=True)
    )
    told = []
    try:
        cost = calibrate(engine, repeats=2, progress=lambda *news: told.append(news))
    finally:
        engine.shutdown()
    assert cost.quality["num_steps"] > 30
    assert cost.about["max_num_seqs"] == 4
    assert cost.step_seconds(StepLoad.of([(10, 1)])) > 0
    assert [number for _, number, _ in told] == list(range(1, told[-1][2] + 1))
    load = StepLoad.of([(1, 1)])
    assert typical_steps([[(load, 1.0)], [(load, 9.0)], [(load, 2.0)]]) == [(load, 2.0)]


def test_a_context_too_short_to_calibrate_with_is_refused() -> None:
    from mini_vllm.simulator.calibrate import _Sets

    with pytest.raises(ConfigError, match="max_model_len: 8 tokens are too few"):
        _Sets([1, 2], 8, 4, 0)
