"""Cost models: the roofline is the planner's, two constants are by hand, and the pool is sized as planned."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.cost import RooflineCost, StepLoad, TwoConstantCost
from mini_vllm.simulator.fitted import FittedCost
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


@pytest.mark.parametrize("cost", [TwoConstantCost(1.0, 1.0), FittedCost(((1, 1.0),)), RooflineCost(setup().steps)])
def test_a_step_that_computes_nothing_takes_no_time(cost: Any) -> None:
    assert cost.step_seconds(StepLoad.of([])) == 0.0


def test_two_constants_by_hand() -> None:
    assert TwoConstantCost(0.02, 0.001).step_seconds(StepLoad.of([(5, 1), (0, 9)])) == pytest.approx(0.03)


@pytest.mark.parametrize("constants", [(-1.0, 0.1), (0.1, float("nan")), (0.0, 0.0)])
def test_constants_that_cannot_be_are_refused(constants: tuple[float, float]) -> None:
    with pytest.raises(ConfigError):
        TwoConstantCost(*constants)


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
