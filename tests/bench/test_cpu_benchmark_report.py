"""benchmarks/cpu: floors, ratios, tables and plots, and a report made again from its JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cpu import compare, report
from benchmarks.cpu.costs import floor, peak_of, steps_of, task_cost, weight_bytes
from benchmarks.cpu.rounds import Outcome
from benchmarks.cpu.shapes import SHAPES, make_checkpoint, model_shape
from benchmarks.cpu.tasks import Task, decoding, prefill, sweeps
from benchmarks.cpu.worker_protocol import split_width

CEILINGS = {"memory_gb_s": 10.0, "read_gb_s": 10.0, "float32_gflop_s": 100.0, "bfloat16_gflop_s": 50.0,
            "int8_gflop_s": 200.0}  # fmt: skip
DECODE = "decode, 1 stream"


def a_slice(entrant: str, task: str, number: int, figure: float) -> dict[str, Any]:
    return {"entrant": entrant, "task": task, "round": number, "figure": figure, "seconds": [1.0], "cpus": 1.9}


def a_report() -> dict[str, Any]:
    """Two rounds in which the machine halves its speed: ratios must not see it."""
    entrants = ("mini_vllm bf16", "llama_cpp bf16", "transformers bf16", "llama_cpp q4_0")
    tasks = [decoding(DECODE, 1, 128, 16), *sweeps(16, (1, 8), (128,))]
    outcome = Outcome(entrants={e: {"version": "1"} for e in entrants}, failures={"vllm bf16": "ended with 1: no AVX"})
    for task in tasks:
        for number, speed in enumerate((1.0, 0.5)):
            for entrant, figure in zip(entrants, (12.0, 10.0, 5.0, 40.0), strict=True):
                outcome.slices.append(a_slice(entrant, task.name, number, figure * speed))
    outcome.probes, outcome.rounds = [CEILINGS, CEILINGS], 2
    record = compare.record_of(model_shape("qwen2.5-0.5b"), tasks, outcome)
    return {
        "date": "2026-12-01", "threads": 2, "absent": {"openvino_genai": "not asked for"},
        "environment": {"cpu": {"model": "a CPU"}}, "models": {"qwen2.5-0.5b": record},
    }  # fmt: skip


# -- floors ----------------------------------------------------------------------------------------------------


def test_one_stream_of_a_bf16_model_is_bound_by_reading_all_its_weights() -> None:
    shape = model_shape("qwen2.5-0.5b")
    assert weight_bytes(shape, "bf16") == shape.weight_bytes_per_decode_step
    found = floor(shape, decoding(DECODE, 1, 128, 16), "bf16", CEILINGS)
    assert found["bound_by"] == "bandwidth"
    assert found["tokens_per_second"] == pytest.approx(10e9 / 990e6, rel=0.01)


def test_a_prompt_is_bound_by_arithmetic_at_the_best_rate_of_its_width() -> None:
    shape = model_shape("qwen2.5-0.5b")
    rates = {w: floor(shape, prefill(512), w, CEILINGS)["tokens_per_second"] for w in ("f32", "bf16", "int8")}
    assert rates["f32"] == pytest.approx(100e9 / 0.74e9, rel=0.1)
    assert rates["bf16"] == rates["f32"] and rates["int8"] == pytest.approx(2 * rates["f32"])
    assert [peak_of(width, CEILINGS) for width in ("f32", "bf16", "q8_0")] == [100.0, 100.0, 200.0]


def test_a_4_bit_head_is_read_in_half_the_bytes_of_an_8_bit_one() -> None:
    shape = model_shape("tiny-15m")
    saved = weight_bytes(shape, "int4") - weight_bytes(shape, "int4-head")
    assert saved == pytest.approx(shape.embedding_parameters * (1 - 4.5 / 8))


@pytest.mark.parametrize(
    ("width", "plain"),
    [("bf16", ("bf16", "")), ("int8-weights-avx2", ("int8-weights", "avx2")), ("int4-head", ("int4-head", ""))],
)
def test_a_variant_has_the_weights_and_the_class_of_its_width(width: str, plain: tuple[str, str]) -> None:
    assert split_width(width) == plain
    shape = model_shape("tiny-15m")
    assert weight_bytes(shape, width) == weight_bytes(shape, plain[0])
    assert report.class_of(width) == report.class_of(plain[0])


def test_every_token_of_a_list_is_in_exactly_one_step() -> None:
    task = Task("list", 5, ((3, 2), (6, 3)))
    assert steps_of(task) == [[(0, 3), (0, 6)], [(3, 1), (6, 1)], [(7, 1)]]
    costs = task_cost(model_shape("tiny-15m"), task, "bf16")
    assert len(costs) == 3 and costs[0]["flops"] > costs[1]["flops"] > costs[2]["flops"]


@pytest.mark.parametrize(("name", "millions"), [("tiny-15m", 15.2), ("qwen2.5-0.5b", 494.0), ("llama-1.1b", 1100.0)])
def test_shapes_have_the_sizes_that_their_names_say(name: str, millions: float) -> None:
    assert model_shape(name).num_parameters / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_made_checkpoint_is_complete_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mini_vllm.hf_config import HFConfig
    from mini_vllm.text.tokenizer import Tokenizer

    small = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 300}
    monkeypatch.setitem(SHAPES, "small", SHAPES["qwen2.5-0.5b"] | small | {"num_attention_heads": 2})
    folder = make_checkpoint("small", tmp_path)
    assert HFConfig.from_folder(folder).hidden_size == 8 and (folder / "tokenizer.json").is_file()
    assert Tokenizer.from_folder(folder).vocab_size == 300
    size = 2 * model_shape("small").num_parameters
    assert size < (folder / "model.safetensors").stat().st_size < size + 4096
    assert make_checkpoint("small", tmp_path) == folder and [p.name for p in tmp_path.iterdir()] == ["small"]


# -- ratios and tables -----------------------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round() -> None:
    record = a_report()["models"]["qwen2.5-0.5b"]
    assert report.ratios(record, DECODE, "mini_vllm bf16", "llama_cpp bf16") == pytest.approx([1.2, 1.2])
    record["slices"] = [s for s in record["slices"] if (s["entrant"], s["round"]) != ("llama_cpp bf16", 0)]
    assert report.ratios(record, DECODE, "mini_vllm bf16", "llama_cpp bf16") == pytest.approx([1.2])


def test_the_best_peer_is_the_fastest_of_the_same_width() -> None:
    record = a_report()["models"]["qwen2.5-0.5b"]
    assert report.best_peer(record, DECODE, "mini_vllm bf16") == "llama_cpp bf16"
    assert report.best_peer(record, DECODE, "mini_vllm int4") == "llama_cpp q4_0"
    assert report.best_peer(record, DECODE, "mini_vllm int8") is None


def test_the_table_says_ours_the_best_peer_the_ratio_and_the_share_of_the_floor() -> None:
    row = next(line for line in report.text_of(a_report()).splitlines() if line.startswith(f"| {DECODE}"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:6] == ["bf16", "9 (6 to 12)", "7.5 (5 to 10)", "llama_cpp bf16", "1.2 (1.2 to 1.2)"]
    assert cells[6] == "89% of bandwidth, 8.91 GB/s"


def test_what_failed_and_what_was_absent_is_said() -> None:
    text = report.text_of(a_report())
    assert "failed: vllm bf16: ended with 1: no AVX" in text and "absent: openvino_genai: not asked for" in text


def test_with_several_models_a_table_shows_how_a_token_grows() -> None:
    found = a_report()
    found["models"]["tiny-15m"] = found["models"]["qwen2.5-0.5b"]
    assert "a token" not in report.text_of(a_report())
    assert "111 ms, 8.91 GB/s" in report.text_of(found)


def test_a_report_is_made_again_from_its_json_with_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(a_report()))
    assert compare.main(["--render", str(file)]) == 0
    assert capsys.readouterr().out.startswith("\n" + report.text_of(a_report()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cpu-qwen2.5-0.5b.png", "cpu-qwen2.5-0.5b.svg", "cpu.json"]


# -- arguments -------------------------------------------------------------------------------------------------


def test_widths_and_peers_that_nobody_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--widths", "int3", "--no-save"]) == 2
    assert "--widths: int3 is unknown; there are bf16" in capsys.readouterr().err
    assert compare.main(["--peer-widths", "vllm:q4_0", "--no-save"]) == 2
    assert "--peer-widths: vllm:q4_0 is unknown" in capsys.readouterr().err


def test_groups_hold_what_is_compared_with_each_other() -> None:
    args = compare.parse(["--peer-widths", "llama_cpp:q8_0", "llama_cpp:q4_0", "--classes", "8 bits", "4 bits"])
    groups = compare.choose_entrants(args, {"llama_cpp": "python", "vllm": "python"})
    assert [[entrant.name for entrant in group] for group in groups] == [
        ["mini_vllm int8", "mini_vllm int8-weights", "llama_cpp q8_0"],
        ["mini_vllm int4", "mini_vllm int4-head", "llama_cpp q4_0"],
    ]


def test_large_models_get_shorter_lists_and_fewer_tokens() -> None:
    args = compare.parse(["--sweeps", "--max-context", "2048"])
    small, large = (compare.choose_tasks(args, model_shape(name)) for name in ("tiny-15m", "qwen2.5-0.5b"))
    assert [t.name for t in small[:5]] == [DECODE, "prefill 512", "32 requests", "mixed steps", "prefill 8064"]
    assert [t.name for t in large[2:4]] == ["32 requests, lengths / 8", "mixed steps, lengths / 8"]
    assert (small[0].more, large[0].more) == (256, 15)
    assert [t.at for t in large if t.sweep == "context"] == [128, 512, 2048]
