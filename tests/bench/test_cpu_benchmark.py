"""benchmarks/cpu: workers and their protocol, the order of slices, and what becomes of engines that fail."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.cpu import rounds
from benchmarks.cpu.rounds import Budget, Outcome, run_group
from benchmarks.cpu.tasks import Task, decoding, fixed_list, mixed_steps, prefill, request_list, sweeps
from benchmarks.cpu.workers import Entrant, Setting, Worker, WorkerError, environment_of, find_peers

FAKE = Path(__file__).resolve().parent / "cpu_fake_worker.py"
TASKS = [prefill(20), Task("list", 8, ((3, 4), (5, 4)))]
GENERATE = Task("list", 8, ((3, 4), (5, 4)))


def fake(width: str) -> Entrant:
    return Entrant("fake", width, sys.executable, FAKE)


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setenv("FAKE_WORKER_LOG", str(tmp_path / "calls"))
    monkeypatch.setattr(rounds, "PAUSE_SECONDS", 0.0)
    return Setting(tmp_path / "model", tmp_path, threads=2, max_len=64, max_seqs=4)


@pytest.fixture
def calls(tmp_path: Path) -> Callable[[], list[str]]:
    return lambda: (tmp_path / "calls").read_text().splitlines()


def run(entrants: list[Entrant], setting: Setting, tasks: list[Task], count: int = 2, seconds: float = 60) -> Outcome:
    outcome = Outcome()
    run_group(entrants, tasks, setting, lambda: {"memory_gb_s": 1.0}, outcome, rounds=count, seconds=seconds)
    return outcome


# -- protocol --------------------------------------------------------------------------------------------------


def test_a_worker_answers_with_seconds_and_what_its_engine_prints_is_no_answer(setting: Setting) -> None:
    worker = Worker.start(fake("bf16"), setting)
    try:
        assert (worker.version, worker.details) == ("1.2", {"threads": 2})
        completed = worker.complete([[1, 2]], [4])
        assert 0 <= completed.seconds < 10 and completed.made == [[1, 1, 1, 1]]
        assert "must not reach" in worker.log.read_text()
    finally:
        worker.stop()


def test_a_worker_that_refuses_a_call_serves_the_next(setting: Setting) -> None:
    worker = Worker.start(fake("refuses"), setting)
    try:
        with pytest.raises(WorkerError, match="ValueError: that many tokens are too many"):
            worker.complete([[1]], [4])
        assert worker.alive and worker.complete([[1]], [1]).made == [[1]]
    finally:
        worker.stop()


def test_an_engine_that_makes_fewer_tokens_than_asked_has_failed(setting: Setting) -> None:
    worker = Worker.start(fake("f32-eager"), setting)
    try:
        with pytest.raises(WorkerError, match=r"made \[3\] tokens, asked for \[4\]"):
            worker.complete([[1]], [4])
    finally:
        worker.stop()


def test_the_last_words_of_a_worker_that_dies_are_the_error(setting: Setting) -> None:
    worker = Worker.start(fake("dies"), setting)
    with pytest.raises(WorkerError, match=r"ended with 3: Segmentation fault, so to speak"):
        worker.complete([[1]], [4])
    with pytest.raises(WorkerError, match="Segmentation"):
        worker.complete([[1]], [4])
    worker.stop()


def test_a_worker_that_does_not_answer_is_stopped(setting: Setting) -> None:
    with pytest.raises(WorkerError, match="did not answer within 0 s"):
        Worker.start(fake("bf16"), setting, timeout=0.001)


def test_only_our_own_worker_sees_our_package(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert environment_of(Entrant("mini_vllm", "bf16"), setting)["PYTHONPATH"] == str(FAKE.parents[2])
    peer = environment_of(Entrant("vllm", "bf16"), setting)
    assert "PYTHONPATH" not in peer and peer["OMP_NUM_THREADS"] == "2"


# -- rounds ----------------------------------------------------------------------------------------------------


def test_engines_take_turns_and_every_other_round_goes_backwards(
    setting: Setting, calls: Callable[[], list[str]]
) -> None:
    outcome = run([fake("bf16"), fake("f32"), fake("int8")], setting, [GENERATE], count=3)
    order = [line.split()[0] for line in calls() if line.split()[2] == "4"]
    forwards = ["bf16", "f32", "int8"]
    assert order == [*forwards, *reversed(forwards), *forwards]
    assert [(s["entrant"], s["round"]) for s in outcome.slices[3:6]] == [
        ("fake int8", 1),
        ("fake f32", 1),
        ("fake bf16", 1),
    ]
    assert outcome.rounds == 3 and len(outcome.probes) == 3 and not outcome.failures


def test_one_that_dies_and_one_that_never_starts_do_not_stop_the_others(setting: Setting) -> None:
    outcome = run([fake("absent"), fake("dies"), fake("bf16")], setting, [GENERATE])
    assert outcome.failures["fake absent"] == "RuntimeError: no such engine here"
    assert "ended with 3: Segmentation fault" in outcome.failures["fake dies"]
    assert [s["round"] for s in outcome.slices if s["entrant"] == "fake bf16"] == [0, 1]
    assert [s["round"] for s in outcome.slices if s["entrant"] == "fake dies"] == [0]
    assert list(outcome.entrants) == ["fake dies", "fake bf16"]


def test_no_round_begins_that_would_not_end_in_time_but_one_always_runs(setting: Setting) -> None:
    assert run([fake("bf16")], setting, [GENERATE], count=5, seconds=0).rounds == 1


def test_an_interrupt_keeps_what_was_measured(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rounds.run_round

    def once(workers: list[Worker], tasks: list[Task], number: int, outcome: Outcome) -> None:
        if number == 1:
            raise KeyboardInterrupt
        plain(workers, tasks, number, outcome)

    monkeypatch.setattr(rounds, "run_round", once)
    outcome = run([fake("bf16")], setting, [GENERATE], count=3)
    assert outcome.interrupted and outcome.rounds == 1 and len(outcome.slices) == 1


def test_what_a_group_leaves_goes_to_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(rounds.time, "monotonic", lambda: now)
    budget = Budget(deadline=180.0, weights=4.0)
    assert budget.take(1.0) == 20.0
    now = 105.0
    assert budget.take(3.0) == 75.0


def test_the_warm_up_calls_every_task_but_generates_little(setting: Setting, calls: Callable[[], list[str]]) -> None:
    run([fake("bf16")], setting, TASKS, count=1)
    assert calls() == ["bf16 1 1", "bf16 2 3", "bf16 1 1", "bf16 2 4"]


def test_first_tokens_are_compared_with_those_of_the_first_engine(setting: Setting) -> None:
    outcome = run([fake("bf16"), fake("f32"), fake("int8")], setting, [GENERATE], count=1)
    assert {name: about["same_first_tokens"] for name, about in outcome.entrants.items()} == {
        "fake bf16": [2, 2], "fake f32": [2, 2], "fake int8": [0, 2],
    }  # fmt: skip


# -- tasks -----------------------------------------------------------------------------------------------------


def test_the_time_of_a_prompt_cancels_out_of_decoding() -> None:
    task = decoding("decode", batch=2, context=8, more=10)
    (prompts, first), (again, longer) = task.calls(0)
    assert prompts == again and (first, longer) == ([1, 1], [11, 11]) and task.longest == 19
    assert task.figure([1.0, 3.0]) == 10.0
    with pytest.raises(ValueError, match="took no longer"):
        task.figure([3.0, 3.0])


def test_prompts_are_the_same_for_every_engine_and_others_in_another_round() -> None:
    task = request_list(shrink=8)
    assert task.calls(1) == task.calls(1) != task.calls(2)
    (prompts, tokens) = task.calls(1)[0]
    assert [(len(p), n) for p, n in zip(prompts, tokens, strict=True)] == list(task.requests)


def test_the_fixed_list_is_fixed_and_a_shrunk_one_says_so() -> None:
    listed = fixed_list()
    assert (len(listed), sum(p for p, _ in listed), sum(n for _, n in listed)) == (32, 4765, 3012)
    assert request_list(1).name == "32 requests" and request_list(8).name == "32 requests, lengths / 8"
    assert request_list(1).counted == 3012 and request_list(8).longest <= 48


def test_mixed_steps_have_more_prompt_than_one_step_holds() -> None:
    for shrink in (1, 8):
        task = mixed_steps(shrink)
        assert sum(p for p, _ in task.requests) > 512 and len({n for _, n in task.requests}) == 6


def test_sweeps_count_the_tokens_of_all_streams() -> None:
    points = sweeps(16, (1, 4), (128,))
    assert [(t.sweep, t.at, t.counted) for t in points] == [("batch", 1, 16), ("batch", 4, 32), ("context", 128, 16)]


# -- peers -----------------------------------------------------------------------------------------------------


def test_peers_are_those_asked_for_and_the_others_are_said_to_be_absent() -> None:
    found, absent = find_peers([f"transformers={sys.executable}", "vllm=/no/such/python"])
    assert found == {"transformers": sys.executable}
    assert absent["llama_cpp"] == "not asked for"
    assert absent["vllm"] == "the named python has no module vllm"


def test_auto_asks_this_python_and_none_asks_nobody() -> None:
    found, absent = find_peers(["auto"])
    assert "transformers" in found and "this python has no module" in absent["vllm"]
    assert find_peers(["none"])[0] == {}
    with pytest.raises(ValueError, match=r"--peers: lama_cpp is unknown; there are auto, none, transformers"):
        find_peers(["lama_cpp=python"])
