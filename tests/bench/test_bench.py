"""The two benchmarks from end to end on tiny random checkpoints: counts are exact, times are merely positive."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from mini_vllm.bench import ceilings
from mini_vllm.bench.datasets import BenchRequest
from mini_vllm.bench.driver import Driver, core_of
from mini_vllm.bench.latency import run_latency
from mini_vllm.bench.metrics import LATENCY_METRICS
from mini_vllm.bench.options import LatencyOptions, ThroughputOptions
from mini_vllm.bench.result import checkpoint_parameters, require_writable
from mini_vllm.bench.throughput import make_requests, run_throughput, usable_token_ids
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.entrypoints.cli.main import main
from mini_vllm.exceptions import ConfigError, InvalidParameterError
from tests.checkpoints import make_checkpoint

ENGINE: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "num_gpu_blocks_override": 64, "block_size": 4}


@pytest.fixture(scope="module", autouse=True)
def quick_ceilings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "_SECONDS_PER_KERNEL", 0.002)
        patch.setattr(ceilings, "_MIN_DRAM_BUFFER", 16 * ceilings.MIB)
        patch.setattr(ceilings, "_MAX_DRAM_BUFFER", 16 * ceilings.MIB)
        patch.setattr(ceilings, "_GEMM_SIZES", (64, 128))
        ceilings.read_rate.cache_clear()
        ceilings.gemm_rate.cache_clear()
        yield


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tied = request.param == "qwen2"
    return make_checkpoint(
        tmp_path_factory.mktemp(request.param), request.param, tie_word_embeddings=tied, max_position_embeddings=64
    )


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[LLMEngine]:
    engine = LLMEngine.from_engine_args(EngineArgs(model=str(folder), **ENGINE))
    yield engine
    engine.shutdown()


def small(**changes: Any) -> ThroughputOptions:
    return ThroughputOptions(**{"num_prompts": 4, "input_len": 12, "output_len": 5, "num_repeats": 2, **changes})


@pytest.fixture(scope="module")
def result(engine: LLMEngine) -> dict[str, Any]:
    return run_throughput(engine, small(save_detailed=True), {"model": "here"})


# --- throughput ---------------------------------------------------------------------------------------------


def test_throughput_counts_every_request_and_token(result: dict[str, Any]) -> None:
    assert (result["completed"], result["failed"], result["num_repeats"]) == (4, 0, 2)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (48, 20)
    assert result["total_token_throughput"] == pytest.approx(result["tokens_per_second"])
    for repetition in result["repetitions"]:
        assert repetition["input_lens"] == [12] * 4 and repetition["output_lens"] == [5] * 4
        assert repetition["finish_reasons"] == {"length": 4}
        assert repetition["achieved_tokens"] == 4 * (12 + 5 - 1)  # the last token is never computed
        assert [len(gaps) for gaps in repetition["itls"]] == [4] * 4


def test_throughput_reports_latencies_in_order_and_spread_around_the_median(result: dict[str, Any]) -> None:
    for metric in LATENCY_METRICS:
        assert 0 < result[f"p50_{metric}_ms"] <= result[f"p90_{metric}_ms"] <= result[f"p99_{metric}_ms"]
    assert result["mean_ttft_ms"] < result["mean_e2el_ms"] <= result["duration"] * 1e3 * 1.5
    low, high = result["spread"]["output_throughput"]
    assert low <= result["output_throughput"] <= high
    durations = [repetition["duration"] for repetition in result["repetitions"]]
    assert result["spread"]["duration"] == [min(durations), max(durations)]


def test_the_counted_shape_is_that_of_the_checkpoint_and_of_the_cache(result: dict[str, Any], folder: Path) -> None:
    model = result["model"]
    assert model["num_parameters"] == checkpoint_parameters(folder)
    assert model["kv_cache_bytes_per_block"] == 4 * model["kv_bytes_per_token"]
    assert result["achieved_gb_s"] > 0 and result["achieved_gflop_s"] > 0
    assert result["decode_steps"] + result["prefill_steps"] == result["num_steps"] == result["achieved_steps"]
    assert result["decode_bound_by"] and result["ceilings"]["threads"] >= 1


def test_the_report_is_json_without_surprises(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["environment"]["versions"]["torch"] and result["arguments"]["engine"] == {"model": "here"}
    assert result["dataset"]["name"] == "random" and result["arguments"]["benchmark"]["num_prompts"] == 4


def test_repetitions_are_cold_unless_asked_to_be_warm(engine: LLMEngine) -> None:
    cold = run_throughput(engine, small(), {})
    assert [repetition["prefix_cache_hit_rate"] for repetition in cold["repetitions"]] == [0.0, 0.0]
    warm = run_throughput(engine, small(keep_prefix_cache=True, num_warmups=4), {})
    assert all(repetition["prefix_cache_hit_rate"] > 0.5 for repetition in warm["repetitions"])


def test_prefix_repetition_hits_the_cache_within_one_run(engine: LLMEngine) -> None:
    options = ThroughputOptions(
        num_prompts=6,
        dataset_name="prefix_repetition",
        prefix_repetition_prefix_len=16,
        prefix_repetition_suffix_len=4,
        prefix_repetition_num_prefixes=2,
        output_len=2,
        num_repeats=1,
        num_warmups=0,
    )
    found = run_throughput(engine, options, {})
    assert found["prefix_cache_hit_rate"] == pytest.approx(4 * 16 / (6 * 20))
    assert found["mean_tpot_ms"] > 0 and found["num_prompts"] == 6


def test_sharegpt_prompts_go_through_the_models_tokenizer(engine: LLMEngine, tmp_path: Path) -> None:
    data = [
        {"conversations": [{"from": "human", "value": f"hello world {i}"}, {"from": "gpt", "value": "goodbye " * 3}]}
        for i in range(3)
    ]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([*data, {"conversations": [{"from": "human", "value": "x " * 999}] * 2}]))
    options = ThroughputOptions(num_prompts=8, dataset_path=str(path), num_repeats=1, num_warmups=0)
    requests, left_out = make_requests(options, engine)
    encode = engine.get_tokenizer().encode
    assert {tuple(request.prompt_token_ids) for request in requests} == {
        tuple(encode(f"hello world {i}")) for i in range(3)
    }
    assert {request.output_len for request in requests} == {len(encode("goodbye " * 3))}
    assert sum(left_out.values()) == 1
    found = run_throughput(engine, options, {})
    assert found["completed"] == 3 and any("3 usable requests of the 8" in note for note in found["notes"])


def test_preemptions_are_counted_and_told(folder: Path) -> None:
    engine = LLMEngine.from_engine_args(EngineArgs(model=str(folder), **ENGINE | {"num_gpu_blocks_override": 17}))
    found = run_throughput(engine, small(input_len=20, output_len=30, num_repeats=1, num_warmups=0), {})
    engine.shutdown()
    assert found["num_preemptions"] > 0 and found["completed"] == 4
    assert any("preemptions" in note for note in found["notes"])
    assert found["peak_kv_cache_usage"] > 0.9
    assert found["achieved_tokens"] > 4 * (20 + 30 - 1)  # what was computed again is counted again


def test_what_does_not_fit_the_context_is_refused_before_anything_runs(engine: LLMEngine) -> None:
    with pytest.raises(InvalidParameterError, match=r"random_input_len.*60 tokens plus 5 .*max_model_len\) is 64"):
        run_throughput(engine, small(input_len=60), {})
    assert not engine.has_unfinished_requests()


def test_special_tokens_are_never_in_random_prompts(engine: LLMEngine) -> None:
    special = set(engine.get_tokenizer().all_special_ids)
    assert special and not special & set(usable_token_ids(engine))


@pytest.mark.parametrize("stops", [False, True])
def test_with_async_scheduling_every_step_has_its_own_time(folder: Path, stops: bool) -> None:
    """One step is in flight, and noted, when the results of the one before it arrive."""
    engine = LLMEngine.from_engine_args(EngineArgs(model=str(folder), async_scheduling=True, **ENGINE))
    plain = LLMEngine.from_engine_args(EngineArgs(model=str(folder), **ENGINE))
    requests = [BenchRequest([5 + i, 6, 7], 3 + 2 * i) for i in range(3)]
    runs = []
    for used in (engine, plain):
        driver = Driver(used, temperature=0.0)
        if stops:  # ends that nobody can foresee, so that a step is in flight at the end
            params = driver._params
            driver._params = lambda request, p=params: replace(
                p(request), ignore_eos=False, stop_token_ids=tuple(range(384))
            )
        runs += [driver.run(requests), driver.run(requests)]
        assert not core_of(used)._in_flight
        used.shutdown()
    for run in runs:
        assert len(run.steps) == (1 if stops else 7)
        assert all(step.seconds > 0 for step in run.steps)
        assert sum(step.seconds for step in run.steps) <= run.duration
        assert [step.sampled_rows for step in run.steps] == ([3] if stops else [3, 3, 3, 2, 2, 1, 1])
    assert runs[0].timelines[2].output_counts == runs[2].timelines[2].output_counts


def test_an_interrupted_run_leaves_no_request_behind(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, _ = make_requests(small(), engine)
    real, calls = LLMEngine.step, iter(range(3))

    def interrupted(self: LLMEngine) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LLMEngine, "step", interrupted)
        Driver(engine).run(requests)
    assert not engine.has_unfinished_requests()
    assert core_of(engine).scheduler.kv.usage == 0.0
    assert len(Driver(engine).run(requests).timelines) == 4  # and the engine still serves


# --- latency ------------------------------------------------------------------------------------------------


def test_latency_measures_one_batch_several_times(engine: LLMEngine) -> None:
    options = LatencyOptions(input_len=8, output_len=6, batch_size=3, num_iters=3, num_iters_warmup=1)
    names: list[str] = []
    found = run_latency(engine, options, {}, lambda name, run: names.append(name))
    assert names == ["warm-up 1 of 1", "iteration 1 of 3", "iteration 2 of 3", "iteration 3 of 3"]
    assert len(found["latencies"]) == 3 and min(found["latencies"]) > 0
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 3)
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert (found["num_steps"], found["decode_steps"], found["prefill_steps"]) == (6, 5, 1)
    assert found["total_output_tokens"] == 18 and found["prefix_cache_hit_rate"] == 0.0


def test_a_batch_that_would_not_run_at_once_is_refused(engine: LLMEngine) -> None:
    with pytest.raises(ConfigError, match="batch_size: 257 is more than may run at once, max_num_seqs=256"):
        run_latency(engine, LatencyOptions(batch_size=257), {})


# --- the command line ---------------------------------------------------------------------------------------


def flags(folder: Path, *more: str) -> list[str]:
    return [
        *("--model", str(folder), "--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "64"),
        *more,
    ]


def test_bench_throughput_prints_tables_and_writes_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.json"
    more = ("--num-prompts", "4", "--random-input-len", "8", "--output-len", "3", "--num-repeats", "1")
    argv = ["bench", "throughput", *flags(folder, *more, "--output-json", str(target))]
    assert main(argv) == 0
    captured = capsys.readouterr()
    for text in ("output tokens/s", "TTFT", "p99", "decode steps", "ceilings measured here", "4 requests (0 failed)"):
        assert text in captured.out
    assert "repetition 1 of 1" in captured.err
    written = json.loads(target.read_text())
    assert written["benchmark"] == "throughput" and written["total_output_tokens"] == 12
    assert written["arguments"]["engine"]["dtype"] == "float32"
    assert not list(tmp_path.glob("*.part"))


def test_bench_latency_prints_the_batch_latency(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--input-len", "4", "--output-len", "2", "--batch-size", "2", "--num-iters", "2", "--num-iters-warmup", "0")
    assert main(["bench", "latency", *flags(folder, *more)]) == 0
    assert "batch latency: mean" in capsys.readouterr().out


def test_bad_flags_end_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLMEngine, "from_engine_args", lambda args: pytest.fail("a model was loaded"))
    assert main(["bench", "throughput", "--dataset-name", "sharegpt"]) == 2
    assert "dataset_path" in capsys.readouterr().err
    assert main(["bench", "latency", "--output-json", str(tmp_path / "none" / "x.json")]) == 2
    assert "output_json: the folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is a folder"):
        require_writable(tmp_path)
