"""Calibration: which steps it takes, what it makes of disturbed ones, and the whole of it on a real engine."""

from typing import Any

import pytest

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.calibrate import Measured, undisturbed
from mini_vllm.simulator.calibration_sets import RequestSet, SetMaker, Staged, TokenMaker, halves, sizes_up_to
from mini_vllm.simulator.cost import StepLoad


def test_disturbed_steps_do_not_count_and_quiet_ones_are_averaged() -> None:
    assert undisturbed([1.0, 1.1, 1.05, 1.02]) == pytest.approx(1.0425)
    assert undisturbed([1.0, 1.02, 1.5, 1.6, 1.01, 1.7, 9.0]) == pytest.approx(1.01)


def test_slowdown_is_what_steps_took_on_average() -> None:
    measured = Measured(rounds=4)
    measured.steps["key"] = (StepLoad.of([(0, 1)]), [1.0, 1.0, 1.0, 1.4, 99.0])
    assert measured.slowdown() == pytest.approx((3 + 1.4 + 3.0) / 5)
    assert measured.disturbed_share() == pytest.approx(0.4)
    assert Measured().slowdown() == 1.0


def test_adding_a_request_is_fitted_by_its_length() -> None:
    measured = Measured(rounds=2)
    for length in (1, 10, 100, 1000):
        measured.adds[length] = [5e-5 + 1e-7 * length] * 3
    assert measured.adding() == pytest.approx((5e-5, 1e-7))


@pytest.mark.parametrize(
    ("context", "batch", "budget"), [(16, 1, 16), (32, 4, 16), (1024, 64, 2048), (32768, 256, 512)]
)
def test_every_set_fits_the_engine(context: int, batch: int, budget: int) -> None:
    sets = SetMaker(context, batch, budget, 2**22).all()
    assert {"alone", "batches"} <= {each.family for each in sets}
    for each in sets:
        assert each.requests
        for request in each.requests:
            assert 1 <= request.prompt_len < context and request.output_len >= 1
            assert request.prompt_len + request.output_len <= context
            assert 0 <= request.shared <= request.prompt_len
        assert sum(request.at == 0 for request in each.requests) <= batch


def test_every_number_of_rows_occurs_up_to_a_batch_that_loses_several_a_step() -> None:
    assert halves(64) == [(1, 8), (8, 16), (16, 32), (32, 64)]
    assert halves(6) == [(1, 6)] and halves(1) == [(1, 1)]
    rows: set[int] = set()
    for each in SetMaker(1024, 32, 2048, 2**20).all():
        if each.family == "batches":
            last = max(request.output_len for request in each.requests)
            rows |= {sum(request.output_len >= step for request in each.requests) for step in range(1, last + 1)}
    assert rows == set(range(1, 33))


def test_sizes_grow_by_a_ratio_and_look_just_above_powers_of_two() -> None:
    sizes = sizes_up_to(1000)
    assert sizes[:4] == [1, 2, 3, 4] and sizes[-1] == 1000
    assert {9, 17, 33, 65} <= set(sizes) and len(sizes) < 30


def test_a_small_cache_leaves_large_sets_out() -> None:
    small = SetMaker(1024, 64, 2048, 1000).all()
    assert small and all(each.num_slots <= 500 for each in small)


def test_shared_tokens_stay_and_the_others_are_new() -> None:
    maker = TokenMaker(range(1000), 0)
    first, second = (maker.tokens(Staged(0, 40, 1, shared=30, salt=7)) for _ in range(2))
    assert first[:30] == second[:30] and first[30:] != second[30:]
    assert maker.tokens(Staged(0, 40, 1, shared=30, salt=8))[:30] != first[:30]
    assert RequestSet("f", "n", [Staged(0, 4, 1, shared=2)]).is_cached


def test_a_context_too_short_to_calibrate_with_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len: 8 tokens are too few"):
        SetMaker(8, 4, 16, 1000)


def test_a_real_engine_can_be_calibrated() -> None:
    """On the bundled model, with a context so short that it is quick; how good the fit is depends on the machine."""
    from mini_vllm.engine.arg_utils import EngineArgs
    from mini_vllm.engine.llm_engine import LLMEngine
    from mini_vllm.simulator.calibrate import calibrate

    engine = LLMEngine.from_engine_args(
        EngineArgs(num_threads=1, max_model_len=64, max_num_seqs=4, num_gpu_blocks_override=80, disable_log_stats=True)
    )
    told: list[tuple[Any, ...]] = []
    try:
        cost = calibrate(engine, seconds=0.5, progress=lambda *news: told.append(news))
        assert not engine.has_unfinished_requests()
    finally:
        engine.shutdown()
    assert cost.quality["num_steps"] > 20
    assert cost.about["max_num_seqs"] == 4 and cost.about["rounds"] >= 3
    assert cost.step_seconds(StepLoad.of([(10, 1)])) > 0 and cost.add_seconds(10) > 0
    assert cost.slowdown >= 1
    assert all(0 <= passed <= total for _, passed, total in told)
