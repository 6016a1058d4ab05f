"""Numbers computed ahead are the numbers that would have been drawn."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.sampling import draws
from mini_vllm.sampling.draws import DrawsAhead
from mini_vllm.sampling.philox import uniform

ROWS = 4


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(0, 9), st.integers(0, 200)), max_size=30))
def test_any_row_at_any_time_gets_its_draw(events: list[tuple[int, int, int]]) -> None:
    """Rows change hands (kind 0), move (kind 1), jump to any draw (2) or take the next (others)."""
    seed = np.arange(ROWS, dtype=np.uint64) * 7
    ahead, at = DrawsAhead(seed), np.zeros(ROWS, dtype=np.int64)
    for row, kind, value in events:
        if kind == 0:
            seed[row], at[row] = value, 0
            ahead.forget(row)
        elif kind == 1:
            other = value % ROWS
            seed[other], at[other] = seed[row], at[row]
            ahead.move(row, other)
        elif kind == 2:
            at[row] = value
        rows = np.arange(ROWS) if kind % 2 else np.array([row])
        assert ahead.take(rows, at[rows]).tolist() == uniform(seed[rows], at[rows]).tolist()
        at[rows] += 1


def test_the_generator_is_called_once_in_many_steps(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    calls = []

    def counted(seed: np.ndarray, index: np.ndarray) -> np.ndarray:
        calls.append(len(seed))
        return uniform(seed, index)

    monkeypatch.setattr(draws.philox, "uniform", counted)
    ahead, rows = DrawsAhead(np.arange(ROWS, dtype=np.uint64)), np.arange(ROWS)
    for step in range(320):
        ahead.take(rows, np.full(ROWS, step) + rows)  # rows that began at different times
    assert len(calls) <= 21
