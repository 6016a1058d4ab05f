"""Knees and Pareto fronts, against answers worked out by hand and by brute force."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.curves import find_knee, first_below, pareto_front

FLAT_THEN_STEEP = [(1, 10), (2, 10), (3, 10), (4, 10), (5, 110)]


def _split(points):
    return [x for x, _ in points], [y for _, y in points]


def test_a_bend_by_hand():
    # the chord goes from 10 at load 1 to 110 at load 5, so it is 75 above the curve at load 4: 0.75 of the range
    knee = find_knee(*_split(FLAT_THEN_STEEP))
    assert (knee.index, knee.x, knee.y) == (3, 4, 10)
    assert knee.distance == pytest.approx(0.75)


def test_the_bend_of_1_over_1_minus_x_is_where_its_slope_is_the_chords():
    # f(x) = 1/(1-x) on [0, 0.9]: the chord rises 9 over 0.9, and f' = 1/(1-x)^2 = 10 at x = 1 - 10^-0.5 = 0.684
    x = [i / 1000 * 0.9 for i in range(1001)]
    knee = find_knee(x, [1 / (1 - value) for value in x])
    assert knee.x == pytest.approx(1 - 10**-0.5, abs=1e-3)


def test_saturation_is_found_from_the_other_side():
    x, y = [1, 2, 4, 8, 16], [100, 190, 300, 310, 315]
    assert find_knee(x, y, "saturating").x == 4
    assert find_knee(x, y, "rising") is None


def test_a_curve_that_levels_off_again_keeps_its_knee():
    # far past saturation the waits of a finite run level off; without the part after the steepest segment this is
    # flat, flat, flat, steep: at load 8 the chord is three quarters of the way up, and the curve is still at its foot
    x, y = [2, 4, 8, 10, 20, 40], [10, 10, 10, 400, 500, 550]
    assert find_knee(x, y).x == 8
    assert find_knee(x, y).distance == pytest.approx((10 + 390 * 6 / 8 - 10) / 390)


def test_a_curve_that_is_steepest_at_once_has_no_knee_left():
    assert find_knee([1, 2, 3, 4], [0, 100, 150, 160]) is None


@pytest.mark.parametrize("y", [[5, 5, 5, 5], [1, 2, 3, 4], [4, 3, 2, 1]])
def test_a_straight_line_has_no_knee(y):
    assert find_knee([1, 2, 3, 4], y) is None
    assert find_knee([1, 2, 3, 4], y, "saturating") is None


@given(
    bend=st.integers(1, 8),
    slopes=st.tuples(st.floats(0, 1), st.floats(20, 1000)),
    stretch=st.floats(1e-3, 1e3),
    lift=st.floats(-100, 100),
)
def test_two_straight_lines_bend_where_they_meet(bend, slopes, stretch, lift):
    low, high = slopes
    x = [float(i) for i in range(10)]
    y = [low * min(v, bend) + high * max(v - bend, 0.0) for v in x]
    assert find_knee(x, y).index == bend
    assert find_knee([v * stretch for v in x], [v * stretch + lift for v in y]).index == bend


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "at least 3 points, got 2"),
        ([1, 2, 3], [1, 2], "3 loads but 2 values"),
        ([1, 3, 2], [1, 2, 3], "must rise"),
        ([1, 1, 2], [1, 2, 3], "must rise"),
        ([1, 2, 3], [1, math.inf, 3], "finite"),
        ([1, 2, 3], [1, math.nan, 3], "finite"),
    ],
)
def test_what_is_no_curve_is_refused(x, y, message):
    with pytest.raises(ConfigError, match=message):
        find_knee(x, y)


def test_attainment_falls_below_a_share_for_the_first_time():
    assert first_below([1.0, 0.995, 0.97, 0.999], 0.99) == 2
    assert first_below([1.0, 0.99], 0.99) is None


def test_a_front_by_hand():
    #        0       1        2 beaten by 1  3        4 beaten by 3
    gains = [10, 20, 15, 30, 30]
    costs = [1, 2, 3, 4, 5]
    assert pareto_front(gains, costs) == [0, 1, 3]


def test_points_equal_in_both_are_all_kept():
    assert pareto_front([1, 1], [2, 2]) == [0, 1]


def _beats(gains, costs, a, b):
    no_worse = gains[a] >= gains[b] and costs[a] <= costs[b]
    return no_worse and (gains[a] > gains[b] or costs[a] < costs[b])


def _front_by_force(gains, costs):
    every = range(len(gains))
    return {i for i in every if not any(_beats(gains, costs, j, i) for j in every)}


POINTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30)


@given(POINTS)
def test_the_front_is_what_no_point_beats(points):
    gains, costs = _split(points)
    front = pareto_front(gains, costs)
    assert set(front) == _front_by_force(gains, costs)
    assert [costs[i] for i in front] == sorted(costs[i] for i in front)


def test_control_a_front_that_only_looks_at_costs_is_found_out():
    gains, costs = [10, 20, 15, 30, 30], [1, 2, 3, 4, 5]
    rising = [i for i in range(5) if i == 0 or costs[i] > costs[i - 1]]
    assert set(rising) != _front_by_force(gains, costs)


def test_a_front_needs_numbers():
    with pytest.raises(ConfigError, match="must be a number"):
        pareto_front([1, math.nan], [1, 2])
    with pytest.raises(ConfigError, match="2 gains but 1 costs"):
        pareto_front([1, 2], [1])
