"""config.json in both spellings, and what is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig, RopeConfig, generation_config
from tests.checkpoints import make_checkpoint

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def config(**changes):
    return HFConfig.from_dict({key: value for key, value in (BASE | changes).items() if value is not ...})


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("new_spelling", [False, True])
def test_both_spellings_read_as_transformers_reads_them(tmp_path, family, new_spelling):
    scaling = {"rope_type": "llama3", **LLAMA3}
    folder = make_checkpoint(
        tmp_path, family, tokenizer=False, new_spelling=new_spelling, rope_scaling=scaling, rope_theta=5e5, head_dim=24
    )
    ours, theirs = HFConfig.from_folder(folder), AutoConfig.from_pretrained(folder)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings",
                 "tie_word_embeddings", "model_type", "bos_token_id"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope == RopeConfig("llama3", 5e5, LLAMA3)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.dtype == "float32"
    assert ours.eos_token_ids == (2,)
    assert ours.architectures == tuple(theirs.architectures)


def test_defaults_are_those_of_transformers():
    ours = config()
    assert (ours.num_key_value_heads, ours.head_dim, ours.rms_norm_eps) == (4, 16, 1e-6)
    assert ours.rope == RopeConfig("default", 10000.0)
    assert not ours.tie_word_embeddings
    assert not ours.attention_bias
    assert (ours.dtype, ours.bos_token_id, ours.eos_token_ids) == (None, None, ())


def test_the_older_type_key_of_rope_scaling_is_read():
    assert config(rope_scaling={"type": "linear", "factor": 4}).rope == RopeConfig("linear", 10000.0, {"factor": 4.0})


def test_partial_rotary_factor_is_read_at_either_place():
    assert config(partial_rotary_factor=0.5).rope.partial_rotary_factor == 0.5
    assert config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}).rope.partial_rotary_factor == 0.5


def test_several_end_tokens_are_kept_in_order():
    assert config(eos_token_id=[128009, 128001]).eos_token_ids == (128009, 128001)


def test_torch_prefix_of_a_dtype_is_dropped():
    assert config(torch_dtype="torch.bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"hidden_size": 63}, "hidden_size 63 must be a multiple of num_attention_heads 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide num_attention_heads 4"),
        ({"head_dim": -8}, "head_dim"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"architectures": ...}, "architectures is missing"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": 3}, "hidden_act must be a string"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [1, -2]}, "eos_token_id"),
        ({"bos_token_id": 1.5}, "bos_token_id"),
        ({"torch_dtype": "float32", "dtype": "bfloat16"}, "contradicts torch_dtype"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}, "contradicts"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ],
)
def test_missing_and_ill_typed_keys_are_named(changes, named):
    with pytest.raises(CheckpointError, match=named) as error:
        config(**changes)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize("rope_type", ["proportional", "mrope", 7])
def test_an_unsupported_rope_type_is_refused_with_the_supported_ones(rope_type):
    supported = "supported are default, linear, dynamic, llama3, yarn, longrope"
    with pytest.raises(UnsupportedModelError, match=supported) as error:
        config(rope_scaling={"rope_type": rope_type, "factor": 2.0})
    assert repr(rope_type) in str(error.value)


def test_rope_parameters_per_layer_type_are_refused():
    with pytest.raises(UnsupportedModelError, match="per layer type"):
        config(rope_parameters={"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}})


def test_an_unsupported_dtype_is_refused_with_the_supported_ones():
    with pytest.raises(UnsupportedModelError, match=r"float8_e4m3fn.*float32, bfloat16, float16"):
        config(torch_dtype="float8_e4m3fn")


KEYS = [*BASE, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
        "dtype", "torch_dtype", "sliding_window", "tie_word_embeddings", "eos_token_id", "bos_token_id"]  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]) | st.text(max_size=3), inner)
    ),
    max_leaves=5,
)


@given(changes=st.dictionaries(st.sampled_from(KEYS), ANYTHING, min_size=1, max_size=3))
def test_whatever_the_file_holds_it_is_read_or_refused(changes):
    try:
        HFConfig.from_dict(BASE | changes)
    except CheckpointError as error:
        assert "config.json: " in str(error)


@pytest.mark.parametrize(
    ("text", "named"), [("{", "cannot be read as JSON"), ("[]", "must hold a JSON object"), ("\x00", "JSON")]
)
def test_a_damaged_config_file_is_named(tmp_path, text, named):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=named):
        HFConfig.from_folder(tmp_path)


def test_a_folder_that_is_none_or_has_no_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        HFConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        HFConfig.from_folder(tmp_path)


def test_generation_config_is_optional_but_must_be_sound(tmp_path):
    assert generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert generation_config(tmp_path) == {"temperature": 0.6}
    (tmp_path / "generation_config.json").write_text("nonsense")
    with pytest.raises(CheckpointError, match="generation_config"):
        generation_config(tmp_path)
