"""Capacity searches and choices under limits, on curves whose answer is known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.capacity import Probe, find_capacity
from mini_vllm.simulator.constraints import Constraint, best_within, broken, parse_constraint


def _up_to(limit):
    """Keeps its limits up to a load of `limit`, and counts how often it is asked."""

    def attempt(load):
        attempt.loads.append(load)
        return Probe(load, load <= limit, "" if load <= limit else f"{load:g} > {limit:g}", {"load": load})

    attempt.loads = []
    return attempt


@given(limit=st.floats(1, 1e6), tolerance=st.sampled_from([0.2, 0.02, 0.001]))
def test_the_answer_is_within_the_tolerance_below_the_limit(limit, tolerance):
    found = find_capacity(_up_to(limit), 1.0, tolerance=tolerance)
    assert found.load <= limit < found.broken_at
    assert found.broken_at - found.load <= tolerance * found.broken_at
    assert found.monotone
    assert found.probe.load == found.load


@given(limit=st.integers(1, 5000))
def test_counts_are_found_exactly_when_the_tolerance_is_small(limit):
    attempt = _up_to(limit)
    found = find_capacity(attempt, 1, tolerance=1e-9, whole=True)
    assert (found.load, found.broken_at) == (limit, limit + 1)
    assert all(load == int(load) for load in attempt.loads)


def test_no_load_is_tried_twice():
    attempt = _up_to(37.0)
    find_capacity(attempt, 1.0)
    assert len(attempt.loads) == len(set(attempt.loads))


def test_a_highest_load_that_keeps_the_limits_is_the_answer():
    found = find_capacity(_up_to(50.0), 1.0, 20.0)
    assert (found.load, found.broken_at) == (20.0, None)


def test_even_the_smallest_load_misses_and_the_error_says_by_how_much():
    with pytest.raises(ConfigError, match=r"smallest load, 1, does not keep the limits: 1 > 0\.5"):
        find_capacity(_up_to(0.5), 1.0)


def test_a_limit_that_nothing_breaks_is_an_error():
    with pytest.raises(ConfigError, match="no limit is broken even at"):
        find_capacity(_up_to(math.inf), 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lowest": 0}, "lowest: must be above 0, got 0"),
        ({"lowest": 2, "highest": 1}, r"highest: must be at least lowest \(2\), got 1"),
        ({"lowest": 1, "tolerance": 0}, "tolerance: must be between 0 and 1, got 0"),
        ({"lowest": 1.5, "whole": True}, "whole numbers"),
    ],
)
def test_ranges_are_checked(arguments, message):
    with pytest.raises(ConfigError, match=message):
        find_capacity(_up_to(5), **arguments)


def _with_a_hole(load):
    """Breaks between 20 and 40, though not again before 100."""
    ok = load < 100 and not 20 <= load < 40
    return Probe(load, ok, "" if ok else "in the hole")


def test_a_hole_below_the_answer_is_found_and_reported():
    found = find_capacity(_with_a_hole, 10.0, 120.0, checks=4)
    assert found.load < 20 <= found.broken_at
    assert not found.monotone


def test_control_without_the_check_the_hole_is_missed():
    found = find_capacity(_with_a_hole, 10.0, 120.0, checks=0)
    assert found.load > 40


# --- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("p99_ttft_ms<=500", Constraint("p99_ttft_ms", "<=", 500.0)),
        (" slo_attainment >= 0.99 ", Constraint("slo_attainment", ">=", 0.99)),
        ("num_steps<1e4", Constraint("num_steps", "<", 1e4)),
    ],
)
def test_limits_are_read_as_people_write_them(text, expected):
    assert parse_constraint(text) == expected


@pytest.mark.parametrize("text", ["p99_ttft_ms", "p99<=", "<=5", "a=5", "a<=b", "a<=1.2.3", "a<=1e999"])
def test_what_is_no_limit_is_refused(text):
    with pytest.raises(ConfigError, match="constraint"):
        parse_constraint(text)


def test_a_broken_limit_is_explained_with_figures():
    limits = [parse_constraint("p99_ttft_ms<=500"), parse_constraint("goodput>=4")]
    assert broken(limits, {"p99_ttft_ms": 500.0, "goodput": 4}) == ""
    said = broken(limits, {"p99_ttft_ms": 812.0, "goodput": 4})
    assert said == "p99_ttft_ms 812 is not <= 500 (62.4 % off)"


def test_an_unknown_figure_is_an_error_that_names_like_ones():
    with pytest.raises(ConfigError, match=r"no figure 'p99_ttft'; it has p99_ttft_ms"):
        broken([parse_constraint("p99_ttft<=1")], {"p99_ttft_ms": 1.0, "duration": 2.0})


RUNS = [
    {"gain": 30.0, "spike": 65.0, "wait": 2.0},
    {"gain": 20.0, "spike": 40.0, "wait": 5.0},
    {"gain": 20.0, "spike": 33.0, "wait": 3.0},
]


def test_the_best_run_that_breaks_a_limit_is_not_chosen():
    assert best_within(RUNS, [], maximise="gain") == 0
    assert best_within(RUNS, [parse_constraint("spike<=40")], maximise="gain") == 1
    assert best_within(RUNS, [parse_constraint("spike<=40")], maximise="gain", tie="wait") == 2
    assert best_within(RUNS, [], minimise="wait") == 0


def test_when_nothing_qualifies_it_raises_and_says_how_near_the_best_came():
    with pytest.raises(ConfigError, match=r"none of 3 runs keeps spike<=30; the nearest is C: spike 33 .*10 % off"):
        best_within(RUNS, [parse_constraint("spike<=30")], maximise="gain", names=["A", "B", "C"])


def test_a_run_without_the_figure_never_wins():
    runs = [{"tpot": None}, {"tpot": 5.0}]
    assert best_within(runs, [], minimise="tpot") == 1
    assert best_within(runs, [parse_constraint("tpot<=9")], maximise="tpot") == 1


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12), st.integers(0, 20))
def test_the_choice_is_the_largest_of_those_within(pairs, limit):
    runs = [{"gain": gain, "cost": cost} for gain, cost in pairs]
    within = [gain for gain, cost in pairs if cost <= limit]
    constraint = [Constraint("cost", "<=", limit)]
    if within:
        assert runs[best_within(runs, constraint, maximise="gain")]["gain"] == max(within)
    else:
        with pytest.raises(ConfigError, match="nearest"):
            best_within(runs, constraint, maximise="gain")
