"""What others used of the CPUs, from the texts of /proc."""

import time

import pytest

from mini_vllm.bench.noise import (
    CpuMeter,
    NoiseReport,
    _Sample,
    busy_ticks,
    noise_between,
    process_ticks,
    usable_cpus,
)

PROC_STAT = """\
cpu  100 20 30 1000 5 1 2 40 0 0
cpu0 60 10 20 500 3 1 1 30 0 0
cpu1 40 10 10 500 2 0 1 10 0 0
intr 12345 0 0
ctxt 99
"""


def test_busy_time_is_everything_but_idle_and_waiting_on_the_given_cpus() -> None:
    assert busy_ticks(PROC_STAT, {0, 1}) == (60 + 10 + 20 + 1 + 1 + 40 + 10 + 10 + 0 + 1, 40)
    assert busy_ticks(PROC_STAT, {1}) == (61, 10)
    assert busy_ticks(PROC_STAT, {7}) == (0, 0)


def test_a_process_name_with_spaces_and_brackets_does_not_shift_the_fields() -> None:
    stat = "42 (a ) b (c) 1 2) R 7 42 42 0 -1 4194304 10 0 0 0 11 22 3 4 20 0 1 0 100 0 0"
    assert process_ticks(stat) == (7, 11 + 22 + 3 + 4)


def test_what_this_process_used_is_not_counted_as_others() -> None:
    begin = _Sample(when=0.0, busy=100.0, steal=0.0, own=50.0)
    end = _Sample(when=10.0, busy=116.0, steal=1.0, own=65.0)
    report = noise_between(begin, end, 10.0, num_cpus=2)
    assert report.own_share == pytest.approx(15 / 20)
    assert report.others_share == pytest.approx(1 / 20)
    assert report.steal_share == pytest.approx(1 / 20)
    assert report.noisy  # 5 % used and 5 % stolen are too much together


def test_eight_percent_is_the_limit() -> None:
    assert not NoiseReport(1.0, 0.08, 0.0, 0.9).noisy
    assert NoiseReport(1.0, 0.09, 0.0, 0.9).noisy
    assert not NoiseReport(1.0, None, None, None).noisy


def test_nothing_is_claimed_for_a_span_of_a_few_ticks_or_without_proc() -> None:
    sample = _Sample(0.0, 0.0, 0.0, 0.0)
    assert noise_between(sample, sample, 0.01, 2).others_share is None
    assert noise_between(None, None, 10.0, 2).others_share is None


def test_a_busy_loop_of_this_process_is_seen_as_its_own() -> None:
    meter = CpuMeter().start()
    deadline = time.perf_counter() + 0.4
    while time.perf_counter() < deadline:
        pass
    report = meter.stop()
    if report.own_share is None:
        pytest.skip("no /proc on this system")
    assert 0.05 / len(usable_cpus()) < report.own_share <= 1.1
