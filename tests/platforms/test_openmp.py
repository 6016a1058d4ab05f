"""Claims about how an engine's threads wait."""

import pytest

from mini_vllm.platforms import engine_environment


@pytest.mark.parametrize(
    ("num_threads", "environment", "sleeps"),
    [(2, {}, True), (3, {}, True), (None, {}, True), (1, {}, False), (None, {"OMP_NUM_THREADS": "1"}, False),
     (None, {"OMP_NUM_THREADS": "2"}, True), (None, {"OMP_NUM_THREADS": "many"}, True)],
)  # fmt: skip
def test_threads_that_fill_the_machine_sleep_while_they_wait(
    num_threads: int | None, environment: dict[str, str], sleeps: bool
) -> None:
    chosen = engine_environment(environment, num_threads, cores=2)
    assert chosen == environment | ({"OMP_WAIT_POLICY": "PASSIVE"} if sleeps else {})


def test_threads_that_leave_a_core_to_others_spin_as_they_like() -> None:
    assert engine_environment({"A": "b"}, 3, cores=4) == {"A": "b"}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_said_about_waiting_holds(name: str) -> None:
    assert engine_environment({name: "x"}, 2, cores=2) == {name: "x"}
