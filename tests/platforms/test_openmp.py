"""Claims about how an engine's threads wait."""

import pytest

from mini_vllm.platforms import engine_environment
from mini_vllm.platforms.openmp import SHAPE_CACHES


@pytest.mark.parametrize(
    ("num_threads", "environment", "sleeps"),
    [(2, {}, True), (3, {}, True), (None, {}, True), (1, {}, False), (None, {"OMP_NUM_THREADS": "1"}, False),
     (None, {"OMP_NUM_THREADS": "2"}, True), (None, {"OMP_NUM_THREADS": "many"}, True)],
)  # fmt: skip
def test_threads_that_fill_the_machine_sleep_while_they_wait(
    num_threads: int | None, environment: dict[str, str], sleeps: bool
) -> None:
    chosen = engine_environment(environment, num_threads, cores=2)
    assert chosen == SHAPE_CACHES | environment | ({"OMP_WAIT_POLICY": "PASSIVE"} if sleeps else {})


def test_threads_that_leave_a_core_to_others_spin_as_they_like() -> None:
    assert engine_environment({"A": "b"}, 3, cores=4) == SHAPE_CACHES | {"A": "b"}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_said_about_waiting_holds(name: str) -> None:
    assert engine_environment({name: "x"}, 2, cores=2) == SHAPE_CACHES | {name: "x"}


def test_caches_of_shapes_are_small_unless_the_user_says_otherwise() -> None:
    """They would grow to a GiB in bfloat16."""
    chosen = engine_environment({"LRU_CACHE_CAPACITY": "9"}, 1, cores=2)
    assert chosen == SHAPE_CACHES | {"LRU_CACHE_CAPACITY": "9"}
