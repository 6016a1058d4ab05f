"""The report: notes that a reader needs, files written whole or not at all, a checkpoint counted by its headers."""

import json
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.bench.ceilings import MIB, Ceilings, GemmRate, ReadRate
from mini_vllm.bench.driver import Run
from mini_vllm.bench.metrics import RequestTimeline
from mini_vllm.bench.noise import NoiseReport
from mini_vllm.bench.result import checkpoint_parameters, notes, require_writable, write_json
from mini_vllm.exceptions import ConfigError

QUIET = NoiseReport(1.0, 0.01, 0.0, 0.9)
MODEL = {"num_parameters": 1000, "checkpoint_parameters": 1000, "working_set_bytes": 10**9}


def make_run(noise: NoiseReport = QUIET, **changes: Any) -> Run:
    given: dict[str, Any] = {
        "timelines": [],
        "steps": [],
        "duration": 1.0,
        "num_preemptions": 0,
        "prefix_cache_queries": 0,
        "prefix_cache_hits": 0,
    }
    return Run(**given | changes, noise=noise)


def make_ceilings(resident: float | None = None, others: float = 0.0) -> Ceilings:
    working_set = None if resident is None else ReadRate(resident, 8 * MIB, "sum")
    return Ceilings("cpu", 2, 32 * MIB, ReadRate(40.0, 256 * MIB, "sum"), working_set, GemmRate(9.0, "f", 1), others)


def test_a_quiet_run_needs_no_note() -> None:
    """Broken control of the tests below: notes are not always there."""
    assert notes([make_run(), make_run()], make_ceilings(), MODEL) == []


def test_others_using_more_than_eight_percent_is_warned_of_once() -> None:
    noisy = NoiseReport(1.0, 0.25, 0.01, 0.5)
    (note,) = notes([make_run(), make_run(noisy), make_run(noisy)], make_ceilings(), MODEL)
    assert note.startswith("warning: in 2 of 3 repetitions") and "25%" in note
    (note,) = notes([make_run()], make_ceilings(others=0.3), MODEL)
    assert "while the ceilings were measured" in note


def test_a_model_that_fits_the_cache_is_told_with_the_rate_that_counts() -> None:
    (note,) = notes([make_run()], make_ceilings(resident=190.0), MODEL | {"working_set_bytes": 8 * MIB})
    assert "fit the last-level cache" in note and "190.0 GB/s" in note
    (note,) = notes([make_run()], make_ceilings(resident=60.0), MODEL | {"working_set_bytes": 40 * MIB})
    assert "nearly fit" in note


def test_a_miscounted_model_is_told() -> None:
    (note,) = notes([make_run()], make_ceilings(), MODEL | {"checkpoint_parameters": 1200})
    assert "1,200 parameters, but 1,000 were counted" in note
    assert notes([make_run()], make_ceilings(), MODEL | {"checkpoint_parameters": None}) == []


def test_failures_and_preemptions_are_told() -> None:
    line = RequestTimeline("r", 1, 0.0, finish_reason="error", error="no token is allowed")
    found = notes([make_run(timelines=[line], num_preemptions=4)], make_ceilings(), MODEL)
    assert found[-1] == "failed: r: no token is allowed" and "up to 4" in found[0]


def test_hit_rate_and_peak_are_unknown_or_zero_without_data() -> None:
    run = make_run()
    assert run.prefix_cache_hit_rate is None and run.peak_kv_cache_usage == 0.0
    assert make_run(prefix_cache_queries=8, prefix_cache_hits=2).prefix_cache_hit_rate == 0.25


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = require_writable(tmp_path / "out.json")
    write_json(target, {"x": 1.5})
    assert json.loads(target.read_text()) == {"x": 1.5}
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"x": float("nan")})
    assert json.loads(target.read_text()) == {"x": 1.5}
    with pytest.raises(ConfigError, match="does not exist"):
        require_writable(tmp_path / "none" / "out.json")


def test_a_checkpoint_without_readable_headers_has_no_count(tmp_path: Path) -> None:
    assert checkpoint_parameters(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"\x05")
    assert checkpoint_parameters(tmp_path) is None
