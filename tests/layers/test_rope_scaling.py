"""Rotary scalings against transformers' frequencies, on both sides of those that switch, and how long is allowed."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.rope_scaling import rope_frequencies
from mini_vllm.layers.rotary import RotaryEmbedding, apply_rotary
from tests.families import SIZES, llama
from tests.layers.test_linear import randn

LIMIT, ORIGINAL = 4096, 1024
SHORT, LONG = [1 + 0.1 * i for i in range(8)], [2.0**i for i in range(8)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {
    "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": YARN,
    "yarn-no-factor": YARN | {"factor": None},
    "yarn-attention-factor": YARN | {"attention_factor": 1.7},
    "yarn-mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn-mscale-alone": YARN | {"mscale": 0.707},
    "yarn-betas": YARN | {"beta_fast": 8.0, "beta_slow": 2.0},
    "yarn-untruncated": YARN | {"truncate": False},
    "longrope": LONGROPE,
    "longrope-factor": LONGROPE | {"factor": 16.0},
    "longrope-attention-factor": LONGROPE | {"attention_factor": 1.3},
}  # fmt: skip


def config(scaling, **more):
    d = SIZES | llama(max_position_embeddings=LIMIT, rope_scaling=scaling, rope_theta=5e5, head_dim=16) | more
    return HFConfig.from_dict({key: value for key, value in d.items() if value is not None})


def ours(scaling, max_model_len, rotary_dim=16, **more):
    return rope_frequencies(config(scaling, **more).with_max_model_len(max_model_len).rope, rotary_dim)


def theirs(scaling, seq_len):
    parameters = {"rope_theta": 5e5, **scaling}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=LIMIT, rope_parameters=parameters
    )
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu", seq_len=seq_len)


@pytest.mark.parametrize("length", [1, ORIGINAL, ORIGINAL + 1, LIMIT, LIMIT + 1, 2 * LIMIT])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers_for_a_sequence_of_max_model_len(name, length):
    frequencies, attention_factor = ours(SCALINGS[name], length)
    expected, expected_factor = theirs(SCALINGS[name], length)
    torch.testing.assert_close(frequencies, expected, atol=0, rtol=2e-6)
    assert math.isclose(attention_factor, expected_factor, rel_tol=1e-9)


def test_every_variant_is_a_different_one():
    """Broken control of the test above: no two of its cases would pass for each other."""
    seen = [(*frequencies.tolist(), factor) for frequencies, factor in (ours(s, LIMIT * 2) for s in SCALINGS.values())]
    same = {"yarn-no-factor", "yarn-mscale-alone"}  # what they leave out is what 'yarn' says
    assert len(set(seen)) == len(SCALINGS) - len(same)


@pytest.mark.parametrize(
    ("name", "switch"), [("dynamic", LIMIT), ("longrope", ORIGINAL), ("linear", None), ("llama3", None), ("yarn", None)]
)
def test_what_depends_on_the_length_depends_on_it_beyond_the_switch_only(name, switch):
    at = {length: ours(SCALINGS[name], length)[0] for length in (1, ORIGINAL, ORIGINAL + 1, LIMIT, LIMIT + 1)}
    for length, frequencies in at.items():
        changed = switch is not None and length > switch
        assert frequencies.equal(at[1]) == (not changed), length


def test_the_attention_factor_scales_queries_and_keys_in_their_turned_part_only():
    x, positions = randn(3, 2, 32), torch.tensor([0, 7, 2000])
    more = {"head_dim": 32, "partial_rotary_factor": 0.5}
    turned = {}
    for factor in (1.0, 1.5):
        rope = config(YARN | {"attention_factor": factor}, **more).rope
        turned[factor] = apply_rotary(x, RotaryEmbedding(32, rope)(positions))
    torch.testing.assert_close(turned[1.5][..., :16], turned[1.0][..., :16] * 1.5)
    assert turned[1.5][..., 16:].equal(x[..., 16:])


# --- how long a request may be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "derived", "default"),
    [
        ("linear", 4 * LIMIT, 4 * LIMIT),
        ("dynamic", 2 * LIMIT, 2 * LIMIT),
        ("llama3", LIMIT, LIMIT),
        ("yarn", 4 * ORIGINAL, 4 * ORIGINAL),
        ("longrope", LIMIT, ORIGINAL),
    ],
)
def test_the_scaling_says_how_long_a_request_may_be_and_what_is_taken_unasked(name, derived, default):
    hf_config = config(SCALINGS[name])
    assert (hf_config.derived_max_model_len, hf_config.default_max_model_len) == (derived, default)
    assert hf_config.with_max_model_len(None).rope.max_model_len == default
    assert hf_config.with_max_model_len(77).rope.max_model_len == 77
    assert hf_config.rope.max_model_len is None, "a config is a value"


def test_gemma3_files_give_the_stretched_limit_already():
    assert config(SCALINGS["linear"], model_type="gemma3_text").derived_max_model_len == LIMIT


def test_without_scaling_the_limit_is_the_files():
    assert config(None).derived_max_model_len == config(None).default_max_model_len == LIMIT


# --- reading it -------------------------------------------------------------------------------------------------


def test_the_original_context_may_stand_beside_the_object_and_must_not_contradict():
    without = {key: value for key, value in LONGROPE.items() if key != "original_max_position_embeddings"}
    assert config(without, original_max_position_embeddings=ORIGINAL).rope == config(LONGROPE).rope
    with pytest.raises(CheckpointError, match=r"original_max_position_embeddings.*contradicts"):
        config(LONGROPE, original_max_position_embeddings=ORIGINAL + 1)
    with pytest.raises(CheckpointError, match="original_max_position_embeddings is missing"):
        config(without)


@pytest.mark.parametrize("name", ["yarn", "llama3"])
def test_without_an_original_context_it_is_the_models(name):
    scaling = {key: value for key, value in SCALINGS[name].items() if key != "original_max_position_embeddings"}
    assert config(scaling).rope.scaling["original_max_position_embeddings"] == LIMIT


@pytest.mark.parametrize(
    ("scaling", "error", "named"),
    [
        (LONGROPE | {"short_factor": "x"}, CheckpointError, "rope_scaling.short_factor must be a list of numbers"),
        (LONGROPE | {"long_factor": []}, CheckpointError, "rope_scaling.long_factor must be a list of numbers"),
        (LONGROPE | {"long_factor": [1, -1]}, CheckpointError, "rope_scaling.long_factor must be a positive number"),
        (LONGROPE | {"long_mscale": 1.2}, UnsupportedModelError, "rope_scaling.long_mscale is not supported"),
        (YARN | {"truncate": 1}, CheckpointError, "rope_scaling.truncate must be true or false"),
        (YARN | {"beta_fast": 0.5}, CheckpointError, "rope_scaling.beta_fast must be above beta_slow"),
        (YARN | {"attention_factor": "x"}, CheckpointError, "rope_scaling.attention_factor must be a positive"),
        ({"rope_type": "dynamic"}, CheckpointError, "rope_scaling.factor is missing"),
    ],
)
def test_ill_formed_scalings_are_refused_by_name(scaling, error, named):
    with pytest.raises(error, match=named):
        config(scaling)


@pytest.mark.parametrize(
    ("scaling", "rotary_dim", "more", "named"),
    [
        (LONGROPE, 32, {}, "short_factor must have a number for each of the 16 pairs"),
        (SCALINGS["dynamic"], 2, {}, "'dynamic' needs more than 2 rotated dimensions"),
        (YARN, 16, {"rope_theta": 1.0}, "rope_theta must be above 1"),
        (LONGROPE | {"original_max_position_embeddings": 1}, 16, {}, "original_max_position_embeddings must be above"),
    ],
)
def test_numbers_that_no_frequency_can_be_made_of_are_refused_by_name(scaling, rotary_dim, more, named):
    with pytest.raises(CheckpointError, match=named):
        ours(scaling, 1, rotary_dim, **more)


def test_what_has_no_meaning_is_told(caplog):
    config(SCALINGS["dynamic"] | {"alpha": 3.0})
    assert "rope_scaling.alpha has no meaning for rope_type 'dynamic'" in caplog.text
