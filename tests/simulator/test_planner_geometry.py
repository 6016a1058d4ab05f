"""Shapes of models: parameters as published, cache by kind of layer, and agreement with what the engine counts."""

import json

import pytest

from mini_vllm.bench.cost import ModelShape, step_cost
from mini_vllm.exceptions import CheckpointError, ConfigError
from mini_vllm.hf_config import HFConfig
from mini_vllm.simulator.planner.config import geometry_from_config
from mini_vllm.simulator.planner.hardware import hardware_preset
from mini_vllm.simulator.planner.memory import activation_bytes, quantisation, weight_bytes
from mini_vllm.simulator.planner.parallel import tensor_parallel_split
from mini_vllm.simulator.planner.presets import BUNDLED, MODEL_PRESETS, preset_config, preset_geometry, preset_names
from mini_vllm.simulator.planner.roofline import StepModel
from mini_vllm.simulator.planner.source import resolve_model
from mini_vllm.worker.kv_cache import activation_bytes as engine_activation_bytes

PUBLISHED = {
    "gpt2": 124_439_808, "opt-125m": 125_239_296, "opt-1.3b": 1_315_758_080, "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704, "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360,
    "gemma-2-9b": 9_241_705_984, "deepseek-v2-lite": 15_706_484_224, "deepseek-v3": 671_026_419_200,
    "jamba-v0.1": 51_570_323_328,
}  # fmt: skip
DENSE = ["gpt2", "opt-125m", "llama-3-8b", "llama-3.2-1b", "mistral-7b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-2-9b"]


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameters_are_those_of_the_published_checkpoint(name, count):
    assert preset_geometry(name).num_parameters == count


@pytest.mark.parametrize(("name", "billions"), [("deepseek-v3", 37.6), ("mixtral-8x7b", 12.9), ("jamba-v0.1", 12.1)])
def test_a_mixture_meets_only_some_of_its_parameters_per_token(name, billions):
    assert preset_geometry(name).active_parameters / 1e9 == pytest.approx(billions, abs=0.05)


def test_all_presets_but_the_bundled_one_are_covered_or_a_twin_of_one_that_is():
    twins = {"llama-3.1-8b": "llama-3-8b", "llama-3.1-70b": "llama-3-70b"}
    for name in set(preset_names()) - {BUNDLED}:
        assert preset_geometry(name).num_parameters == PUBLISHED[twins.get(name, name)]


def test_a_latent_of_mla_is_68_kib_a_token_and_the_same_on_every_rank():
    model = preset_geometry("deepseek-v3")
    assert model.kv_kind == "MLA"
    assert model.kv_bytes_per_token("bfloat16") == 61 * 576 * 2 == 70_272
    assert model.kv_bytes_per_token("bfloat16", tensor_parallel_size=8) == 70_272


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "MHA"), ("llama-3-8b", "GQA"), ("deepseek-v2-lite", "MLA")])
def test_kind_of_attention(name, kind):
    assert preset_geometry(name).kv_kind == kind


def test_one_kv_head_is_mqa():
    assert resolve_model(preset="llama-3-8b", overrides={"num_key_value_heads": 1}).kv_kind == "MQA"


def test_a_window_holds_no_more_than_its_length():
    model = preset_geometry("gemma-2-9b")
    per_layer = 2 * 8 * 256 * 2
    assert model.kv_bytes_per_token("bfloat16") == 42 * per_layer
    assert model.kv_bytes_per_sequence(8192, "bfloat16") == 21 * per_layer * (8192 + 4096)
    assert model.kv_bytes_per_sequence(1000, "bfloat16") == 42 * per_layer * 1000


def test_a_state_space_layer_keeps_a_state_that_does_not_grow():
    model = preset_geometry("jamba-v0.1")
    state = 28 * 8192 * (16 + 4) * 2
    assert model.kv_bytes_per_token("bfloat16") == 4 * 2 * 8 * 128 * 2
    assert model.kv_bytes_per_sequence(1, "bfloat16") == state + 16_384
    assert model.kv_bytes_per_sequence(1001, "bfloat16") - model.kv_bytes_per_sequence(1, "bfloat16") == 1000 * 16_384


@pytest.mark.parametrize("pattern", [["sliding_attention", "full_attention"] * 2, ["full_attention"] * 4])
def test_layer_types_say_which_layers_have_windows(pattern):
    config = dict(preset_config("gemma-2-9b"), num_hidden_layers=4, layer_types=pattern)
    kinds = {layers.kind: layers.num_layers for layers in geometry_from_config(config, "x").kv_layers}
    assert kinds.get("sliding_window", 0) == pattern.count("sliding_attention")


def test_qwen_has_no_window_unless_it_is_switched_on():
    config = dict(preset_config("qwen2.5-0.5b"), sliding_window=32768, max_window_layers=20)
    assert geometry_from_config(config, "x").kv_layers[0].kind == "full"
    on = geometry_from_config(config | {"use_sliding_window": True}, "x")
    assert [(layers.kind, layers.num_layers) for layers in on.kv_layers] == [("full", 20), ("sliding_window", 4)]


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_count_as_the_benchmarks_count_them(name):
    config = dict(preset_config(name))
    config.setdefault("max_position_embeddings", 1024)
    model, shape = preset_geometry(name), ModelShape.from_config(HFConfig.from_dict(config), "bfloat16")
    assert model.kv_bytes_per_token("bfloat16") == shape.kv_bytes_per_token
    if name not in ("gpt2", "opt-125m"):  # learned positions are left out there
        assert model.num_parameters == shape.num_parameters


def test_a_step_costs_what_the_benchmarks_say_it_does():
    config = HFConfig.from_dict(preset_config("llama-3-8b"))
    shape = ModelShape.from_config(config, "bfloat16")
    steps = StepModel(preset_geometry("llama-3-8b"), hardware_preset("a100-80g"), "bfloat16", "bfloat16")
    chunks = [(1000, 1), (0, 512), (77, 3)]
    ours, theirs = steps.step(chunks), step_cost(shape, chunks, 3)
    assert ours.flops == theirs.flops
    assert ours.num_bytes == theirs.num_bytes


def test_activations_are_the_engines_own_estimate():
    model = preset_geometry(BUNDLED)
    config = HFConfig.from_dict(preset_config(BUNDLED))
    assert activation_bytes(model, 512, 16, 4) == engine_activation_bytes(config, 512, 16, 4)


def test_quantised_matrices_leave_embeddings_as_they_are_unless_the_format_is_for_all():
    model = preset_geometry("llama-3-8b")
    outside = (model.num_parameters - model.parameters.linear) * 2
    assert weight_bytes(model, "bfloat16", quantisation("fp8")) == model.parameters.linear + outside
    assert weight_bytes(model, "bfloat16", quantisation("q8_0")) == round(model.num_parameters * 8.5 / 8)


def test_experts_reached_grow_with_the_batch():
    model = preset_geometry("deepseek-v3")
    shares = [model.distinct_expert_share(n) for n in (1, 8, 64, 4096)]
    assert shares[0] == pytest.approx(8 / 256) and shares == sorted(shares) and shares[-1] == pytest.approx(1)


# --- tensor parallel -----------------------------------------------------------------------------------------


def test_ranks_share_matrices_and_copy_norms():
    model = preset_geometry("opt-1.3b")
    split = tensor_parallel_split(model, 2)
    assert (split.heads, split.kv_heads) == (16, 16)
    assert split.parameters == pytest.approx(model.num_parameters / 2, rel=0.01)
    assert model.kv_bytes_per_token("float16", 2) == 98_304


def test_with_more_ranks_than_kv_heads_these_are_copied():
    model = preset_geometry("llama-3-70b")
    assert tensor_parallel_split(model, 16).kv_heads_replicated
    assert model.kv_bytes_per_token("bfloat16", 16) == model.kv_bytes_per_token("bfloat16", 8) == 327_680 // 8


@pytest.mark.parametrize(("size", "message"), [(3, "3 does not divide the 32 attention heads"), (0, "at least 1")])
def test_what_does_not_divide_is_refused(size, message):
    with pytest.raises(ConfigError, match=f"tensor_parallel_size: .*{message}"):
        tensor_parallel_split(preset_geometry("llama-3-8b"), size)


# --- where models come from ----------------------------------------------------------------------------------


def test_a_folder_with_nothing_but_a_config_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL_PRESETS["qwen2.5-7b"]))
    assert resolve_model(str(tmp_path)).num_parameters == PUBLISHED["qwen2.5-7b"]


def test_the_language_model_of_several_parts_is_what_is_planned(tmp_path):
    config = {"model_type": "llava", "architectures": ["X"], "text_config": MODEL_PRESETS["llama-3-8b"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve_model(str(tmp_path)).num_parameters == PUBLISHED["llama-3-8b"]


def test_a_preset_goes_by_its_name_alone_and_a_misspelt_one_is_told_what_was_meant():
    assert resolve_model("llama-3-8b") == resolve_model(preset="LLAMA-3-8B")
    with pytest.raises(ConfigError, match="preset: no model is called 'lama-3-8b'; did you mean llama-3-8b"):
        resolve_model(preset="lama-3-8b")
    with pytest.raises(CheckpointError, match="'lama-3-8b' is neither a folder nor a preset; did you mean llama-3-8b"):
        resolve_model("lama-3-8b")


def test_raw_dimensions_name_what_they_lack():
    with pytest.raises(ConfigError, match="raw dimensions lack num_attention_heads, intermediate_size, vocab_size"):
        resolve_model(overrides={"num_hidden_layers": 32, "hidden_size": 4096})


def test_raw_dimensions_of_an_8b_model():
    dims = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    model = resolve_model(overrides=dims, num_parameters=8 * 10**9).with_parameters(8 * 10**9)
    assert model.num_parameters == 8 * 10**9
    assert model.kv_bytes_per_token("float16") == 131_072


def test_both_a_model_and_a_preset_are_one_too_many():
    with pytest.raises(ConfigError, match="preset: 'gpt2' and the model 'opt-125m' were both given"):
        resolve_model("opt-125m", preset="gpt2")
