"""Whole plans: their lines agree with the calculators and the engine; what cannot be is refused with arithmetic."""

import csv
import io
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.entrypoints.cli.main import main
from mini_vllm.exceptions import ConfigError, KVCacheTooSmallError
from mini_vllm.simulator.planner.hardware import HARDWARE_PRESETS, custom_hardware, hardware_preset
from mini_vllm.simulator.planner.options import PlanOptions
from mini_vllm.simulator.planner.plan import make_plan
from mini_vllm.simulator.planner.presets import preset_geometry, preset_names
from mini_vllm.simulator.planner.render import shown

GIB = 2**30
RAW_8B = "--num-layers 32 --hidden-size 4096 --num-heads 32 --num-kv-heads 8 --num-parameters 8e9"


def plan(preset="llama-3-8b", gpu="a100-80g", **options):
    return make_plan(preset_geometry(preset), hardware_preset(gpu), PlanOptions(**options))


def cli(capsys, text):
    status = main(["plan", *text.split()])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_the_courses_numbers_come_out_of_one_plan():
    made = plan(context=2048, num_parameters=8 * 10**9, batch=64)
    assert made["kv_bytes_per_token"] == 131_072
    assert made["ridge_point"] == made["critical_tokens"] == 156
    assert made["decode_ceiling"] == 125
    assert made["decode_ceiling_batch"] == 8000
    assert int(made["kv_equals_weights"]) == 1907
    assert made["decode_regime"] == "memory" and made["prefill_regime"] == "compute"


def test_32_users_fit_24_gib_beside_16_and_one_fewer_once_the_null_block_is_counted():
    machine = custom_hardware(hardware_preset("a100-80g"), memory_bytes=24 * GIB)
    options = PlanOptions(context=2048, weight_bytes=16 * GIB, activation_bytes=0, gpu_memory_utilization=1.0)
    made = make_plan(preset_geometry("llama-3-8b"), machine, options)
    assert made["sequences_by_bytes"] == 32
    assert made["max_concurrency"] == pytest.approx(31.99, abs=0.005)
    assert made["max_seqs"] == 31


def test_an_fp8_cache_doubles_and_32_kv_heads_quarter_the_tokens():
    base, fp8 = plan(kv_cache_memory_bytes=8 * GIB), plan(kv_cache_memory_bytes=8 * GIB, kv_cache_dtype="fp8")
    assert fp8["num_gpu_blocks"] == 2 * base["num_gpu_blocks"]


@settings(max_examples=40, deadline=None)
@given(
    preset=st.sampled_from(["llama-3-8b", "qwen2.5-0.5b", "opt-125m", "llama-3.2-1b"]),
    context=st.integers(1, 1024), block_size=st.sampled_from([1, 8, 16, 32]), pool=st.integers(1, 64),
)  # fmt: skip
def test_the_engines_block_manager_admits_exactly_as_many_as_the_plan_says(preset, context, block_size, pool):
    try:
        made = plan(preset, context=context, block_size=block_size, kv_cache_memory_bytes=pool * 2**26)
    except KVCacheTooSmallError:
        return
    manager = KVCacheManager(made["num_gpu_blocks"], block_size)
    per_request = manager.num_blocks_for(context)
    assert manager.block_pool.num_usable_blocks // per_request == int(made["max_concurrency"] + 1e-9)


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("gpu", ["a100-80g", "b200", "cpu-epyc-9654"])
def test_every_preset_has_a_plan_on_every_kind_of_machine_or_is_refused_with_numbers(preset, gpu):
    try:
        made = plan(preset, gpu, tensor_parallel_size=1, context=512)
    except ConfigError as error:
        assert "GiB" in str(error)
    else:
        assert made["max_concurrency"] >= 1
        assert all(line.formula for line in made.lines())


@pytest.mark.parametrize("gpu", HARDWARE_PRESETS)
def test_machines_say_where_their_numbers_come_from(gpu):
    machine = hardware_preset(gpu)
    assert machine.source and machine.ridge("bfloat16") > 1


def test_blocks_of_the_engine_are_its_own_function_of_what_is_left():
    made = plan("qwen2.5-0.5b", "l4")
    memory, weights, step = (made[key] for key in ("memory", "weight_bytes", "activation_bytes"))
    assert made["engine_num_gpu_blocks"] == int((memory - weights - step) * 0.9) // made["block_bytes"]


def test_a_model_with_windows_fits_more_by_its_windows_than_in_this_engine():
    made = plan("gemma-2-9b")
    assert made["max_concurrency"] > 2 * made["engine_max_concurrency"]


def test_a_shared_prefix_is_counted_once():
    alone, shared = plan(context=4096), plan(context=4096, shared_prefix_tokens=4000)
    usable = alone["num_gpu_blocks"] - 1
    assert shared["max_concurrency_shared"] == pytest.approx((usable - 250) / 6)


def test_tensor_parallel_shares_weights_and_cache_and_pays_for_it():
    one, four = plan(context=8192, batch=32), plan(context=8192, batch=32, tensor_parallel_size=4)
    assert four["kv_bytes_per_token"] * 4 == one["kv_bytes_per_token"]
    assert four["weight_bytes"] == pytest.approx(one["weight_bytes"] / 4, rel=0.001)
    assert four["tp_all_reduces"] == 64
    assert one["decode_step"] / 4 < four["decode_step"] < one["decode_step"]


def test_a_mixture_reads_only_the_experts_its_tokens_reach():
    options = {"tensor_parallel_size": 8, "quantization": "fp8", "context": 1024}
    one, many = (plan("deepseek-v3", "h200", batch=n, **options) for n in (1, 512))
    assert one["decode_ceiling"] * 20 > many["decode_ceiling_batch"] / 512 * 20 > many["decode_ceiling_batch"] / 100
    assert many["critical_tokens_moe"] > 10 * many["critical_tokens"]


def test_optional_sections_appear_when_asked_for():
    keys = {section.key for section in plan().sections}
    more = plan(max_loras=4, num_speculative_tokens=5, kv_transfer_gbps=200.0, pipeline_parallel_size=2)
    assert {s.key for s in more.sections} - keys == {"lora", "speculation", "disaggregation", "pipeline"}
    assert more["lora_adapter_bytes"] == 80 * 2**20
    assert more["spec_speedup"] == pytest.approx(2.353, abs=1e-3)
    assert more["pp_min_microbatches"] == 9


def test_lora_slots_take_blocks_from_the_cache():
    plain, slots = plan(context=2048), plan(context=2048, max_loras=32, max_lora_rank=64)
    assert plain["num_gpu_blocks"] - slots["num_gpu_blocks"] == pytest.approx(slots["lora_blocks_lost"], abs=1)


def test_goals_are_the_largest_that_meet_them():
    made = plan(context=2048, itl_slo_ms=20.0, ttft_slo_ms=100.0)
    batch, prompt = made["itl_slo_batch"], made["ttft_slo_prompt"]
    step = made.setup.steps
    assert step.decode(batch, 2048).seconds <= 0.020 < step.decode(batch + 1, 2048).seconds
    assert sum(s.seconds for s in step.prefill(prompt, 2048)) <= 0.1


# --- what cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "llama-3-70b"}, r"no room for a KV cache on a100-80g: 80.00 GiB x 0.9 = 72.00 GiB, and weights "
         r"131.42 GiB .* are 60.50 GiB too many; the weights fit with tensor_parallel_size 2"),
        ({"context": 9000}, "context: 9,000 is more than the 8,192 tokens llama-3-8b was made for"),
        ({"max_model_len": 4096, "context": 8192}, "context: 8,192 is more than max_model_len 4,096"),
        ({"itl_slo_ms": 1.0}, r"itl_slo_ms: 1 ms cannot be met: .* takes 8.0\d* ms at best"),
        ({"ttft_slo_ms": 0.1}, "ttft_slo_ms: 0.1 ms cannot be met: even a prompt of one token"),
        ({"num_gpu_blocks_override": 10}, r"context: one sequence of 8,192 tokens needs 1.00 GiB .* pool has 9 blocks"),
        ({"kv_cache_memory_bytes": 70 * GIB}, r"kv_cache_memory_bytes: a pool of 70.00 GiB beside weights 14.96 GiB"),
        ({"tensor_parallel_size": 5}, "tensor_parallel_size: 5 does not divide"),
        ({"pipeline_parallel_size": 33}, "pipeline_parallel_size: 33 is more than the 32 layers"),
        ({"num_parameters": 10}, "num_parameters: 10 is less than the"),
        ({"gpu": "t4", "dtype": "bfloat16", "efficiency": 1.5}, r"efficiency: must be in \(0, 1\], got 1.5"),
        ({"batch": 0}, "batch: must be at least 1, got 0"),
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype: must be one of auto"),
        ({"quantization": "magic"}, "quantization: must be one of none, fp8"),
        ({"gpu": "a1000"}, "gpu: no machine is called 'a1000'; did you mean a10"),
        ({"gpu": "h100-80g"}, "gpu: no machine is called 'h100-80g'; did you mean h100"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_arithmetic(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(**options)


def test_a_machine_of_ones_own_needs_all_three_constants():
    with pytest.raises(ConfigError, match=r"gpu: name a preset .* or give bandwidth, peak_flops, too"):
        custom_hardware(None, memory_bytes=1)


# --- the command ---------------------------------------------------------------------------------------------


def test_explain_shows_the_formula_with_its_numbers(capsys):
    status, out, _ = cli(capsys, "--preset llama-3-8b --gpu a100-80g --context 8192 --explain")
    assert status == 0
    assert "128.00 KiB   = 2 x 32 layers x 8 KV heads x 128 x 2 B" in out
    assert "56.28x   = (28,816 - 1) blocks / 512 blocks a sequence" in out


def test_json_holds_raw_numbers_and_with_explain_the_formulas(capsys):
    _, out, _ = cli(capsys, f"{RAW_8B} --gpu a100 --context 2048 --batch 64 --format json")
    assert json.loads(out)["decode"]["decode_ceiling_batch"] == 8000
    _, out, _ = cli(capsys, f"{RAW_8B} --gpu a100 --context 2048 --format json --explain")
    assert json.loads(out)["roofline"]["ridge_point"] == {
        "value": 156.0, "unit": "FLOP/B", "formula": "arithmetic / memory",
    }  # fmt: skip


def test_csv_has_a_row_for_each_value(capsys):
    _, out, _ = cli(capsys, "--preset gpt2 --format csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert {"plan", "section", "key", "value", "unit"} == set(rows[0])
    assert next(row["value"] for row in rows if row["key"] == "num_parameters") == "124439808"


def test_set_ups_are_compared_beside_each_other(capsys):
    base = "plan --preset llama-3-8b --gpu l4 --context 4096 --format json".split()
    status = main([*base, "--compare", "kv-cache-dtype=fp8", "--compare", "--preset gpt2 --context 512"])
    plain, fp8, other = json.loads(capsys.readouterr().out)
    assert status == 0
    assert fp8["memory"]["num_gpu_blocks"] // 2 == plain["memory"]["num_gpu_blocks"]
    assert other["model"]["num_parameters"] == 124_439_808
    assert (fp8["title"], other["title"]) == ("kv-cache-dtype=fp8", "--preset gpt2 --context 512")


def test_the_table_of_a_comparison_has_a_column_for_each(capsys):
    main(["plan", "--preset", "llama-3-8b", "--gpu", "a100", "--compare", "-tp 2"])
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("  KV heads per rank"))
    assert line.split()[-2:] == ["-", "4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--preset llama-3-70b --gpu a100", "60.50 GiB too many"),
        ("no/such-folder/anywhere", "neither a folder nor a preset"),
        ("--measure --gpu a100", "measure: times this machine"),
        ("--preset gpt2 --compare nonsense=1", "compare: unrecognized arguments: --nonsense=1"),
    ],
)
def test_errors_are_one_line_and_status_2(capsys, text, message):
    status, out, err = cli(capsys, text)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_presets_are_listed(capsys):
    _, out, _ = cli(capsys, "--list-presets")
    assert "llama-3-8b" in out and "a100-80g" in out and "nvlink4" in out


def test_a_plan_needs_no_torch_and_no_hub():
    code = (
        "import sys\n"
        "for name in 'torch huggingface_hub safetensors matplotlib'.split(): sys.modules[name] = None\n"
        "from mini_vllm.entrypoints.cli.main import main\n"
        "raise SystemExit(main(['plan', '--preset', 'llama-3-8b', '--gpu', 'a100', '--context', '8192', '--explain']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_only_the_description_of_a_model_on_the_hub_is_fetched(tmp_path, monkeypatch, capsys):
    from mini_vllm import hub
    from mini_vllm.simulator.planner.presets import MODEL_PRESETS

    asked = []

    def fetch(repo_id, revision=None, download_dir=None, **_):
        asked.append((repo_id, revision))
        (tmp_path / "config.json").write_text(json.dumps(MODEL_PRESETS["qwen2.5-7b"]))
        return hub.HubSnapshot(repo_id, "commit", tmp_path, None, "model")

    monkeypatch.setattr(hub, "fetch_snapshot", fetch)
    status, out, _ = cli(capsys, "Qwen/Qwen2.5-7B --revision main --gpu a100 --format json")
    assert status == 0 and asked == [("Qwen/Qwen2.5-7B", "main")]
    assert json.loads(out)["model"]["num_parameters"] == 7_615_616_512


@pytest.mark.parametrize(("value", "unit", "text"), [(131072, "B", "128.00 KiB"), (0.00804, "s", "8.04 ms"),
                                                     (312e12, "FLOP/s", "312 TFLOP/s"), (0.641, "%", "0.641 %"),
                                                     (31.992, "x", "31.99x"), (None, "", "-")])  # fmt: skip
def test_numbers_for_people(value, unit, text):
    assert shown(value, unit) == text
