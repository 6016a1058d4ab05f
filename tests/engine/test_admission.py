"""Claims about how much may be unfinished at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.engine.admission import MAX_RETRY_AFTER, Admission
from mini_vllm.exceptions import InvalidParameterError, OverloadedError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), max_size=12), st.integers(1, 6), st.integers(1, 30))
def test_the_limits_hold_and_a_batch_is_counted_whole_or_not_at_all(
    batches: list[list[int]], max_reqs: int, max_tokens: int
) -> None:
    admission = Admission(max_reqs, max_tokens)
    inside: dict[str, int] = {}
    for number, sizes in enumerate(batches):
        batch = {f"{number}-{i}": size for i, size in enumerate(sizes)}
        fits = len(inside) + len(batch) <= max_reqs and sum(inside.values()) + sum(sizes) <= max_tokens
        if fits:
            admission.admit(batch)
            inside |= batch
        else:
            with pytest.raises(OverloadedError):
                admission.admit(batch)
            for request_id in list(inside)[:1]:
                admission.release(request_id)
                admission.release(request_id)
                del inside[request_id]
        assert (admission.num_reqs, admission.num_tokens) == (len(inside), sum(inside.values()))


def test_the_error_says_which_limit_and_how_much() -> None:
    admission = Admission(max_num_reqs=2, max_num_tokens=10)
    admission.admit({"a": 4, "b": 4})
    with pytest.raises(OverloadedError, match="max_num_queued_reqs=2") as caught:
        admission.admit({"c": 1})
    assert caught.value.reason == "max_num_queued_reqs" and caught.value.retry_after == 1
    admission.release("a")
    with pytest.raises(OverloadedError, match="max_num_queued_tokens=10") as caught:
        admission.admit({"c": 7})
    assert caught.value.reason == "max_num_queued_tokens"


@pytest.mark.parametrize(("seconds_each", "expected"), [(0.01, 1), (2.0, 4), (1000.0, MAX_RETRY_AFTER)])
def test_when_to_come_back_follows_the_pace_of_the_last_requests(seconds_each: float, expected: int) -> None:
    clock = Clock()
    admission = Admission(max_num_reqs=1, clock=clock)
    for number in range(20):
        admission.admit({str(number): 5})
        admission.release(str(number))
        clock.now += seconds_each
    assert admission.retry_after(2) == expected
    assert admission.retry_after(10, in_tokens=True) == expected


def test_without_limits_nothing_is_refused_but_an_id_twice() -> None:
    admission = Admission()
    admission.admit({str(i): 10**6 for i in range(1000)})
    with pytest.raises(InvalidParameterError, match="already in use"):
        admission.admit({"new": 1, "7": 1})
    assert admission.num_reqs == 1000


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_limit_must_be_a_positive_integer(value: int) -> None:
    with pytest.raises(InvalidParameterError, match="max_num_queued_reqs"):
        Admission(max_num_reqs=value)
    with pytest.raises(InvalidParameterError, match="max_num_queued_tokens"):
        Admission(max_num_tokens=value)
