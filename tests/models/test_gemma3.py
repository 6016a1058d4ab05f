"""Gemma 3, the text model: two rotary bases, five windowed layers to one that sees all, norms on heads."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig, RopeConfig
from mini_vllm.layers.attention import get_attention_layers
from mini_vllm.models.gemma3 import Gemma3Attention
from tests.families import gemma3, rope_scaling
from tests.models.oracle import BROKEN, TOLERANCE
from tests.models.small import build, config_of

S, F = "sliding_attention", "full_attention"
ROWS = ("gemma3-rope-linear", "gemma3-new-spelling")
every_row = pytest.mark.parametrize("row", ROWS)


@every_row
def test_control_exchanged_rotary_bases_fail(oracle_of, row):
    oracle = oracle_of(row)
    config = oracle.config
    assert oracle.error(oracle.model(rope=config.local_rope, local_rope=config.rope)) > BROKEN


@every_row
def test_control_one_rotary_base_for_all_layers_fails(oracle_of, row):
    oracle = oracle_of(row)
    config = oracle.config
    assert oracle.error(oracle.model(rope=config.local_rope)) > BROKEN
    assert oracle.error(oracle.model(local_rope=config.rope)) > BROKEN


@every_row
def test_control_scaling_in_no_layer_or_in_all_fails(oracle_of, row):
    oracle = oracle_of(row)
    config = oracle.config
    assert oracle.error(oracle.model(rope=RopeConfig(theta=config.rope.theta))) > BROKEN
    scaled = dataclasses.replace(config.rope, theta=config.local_rope.theta)
    assert oracle.error(oracle.model(local_rope=scaled)) > BROKEN


@every_row
@pytest.mark.parametrize("window", [15, 17])
def test_control_a_window_off_by_one_fails(oracle_of, row, window):
    oracle = oracle_of(row)
    assert oracle.error(oracle.model(sliding_window=window)) > BROKEN


@pytest.mark.parametrize("pattern", [1, 2, 6])
def test_control_another_pattern_of_windows_fails(oracle_of, pattern):
    oracle = oracle_of("gemma3-rope-linear")
    raw = {**oracle.config.raw, "sliding_window_pattern": pattern}
    assert oracle.error(oracle.model(raw=raw)) > BROKEN


def test_control_another_order_of_windows_fails(oracle_of):
    oracle = oracle_of("gemma3-new-spelling")
    assert oracle.error(oracle.model(raw={**oracle.config.raw, "layer_types": [F, S, F]})) > BROKEN


@every_row
def test_control_without_head_norms_parity_fails(oracle_of, row, monkeypatch):
    oracle = oracle_of(row)
    monkeypatch.setattr(Gemma3Attention, "prepare_heads", lambda self, heads: heads)
    assert oracle.error(oracle.model()) > BROKEN


def test_control_head_norms_by_the_weight_alone_fail(oracle_of):
    oracle = oracle_of("gemma3-rope-linear")
    model = oracle.model()
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data.sub_(1)
    assert oracle.error(model) > BROKEN


def test_control_without_the_final_cap_parity_fails(oracle_of):
    oracle = oracle_of("gemma3-new-spelling")
    assert oracle.error(oracle.model(raw={**oracle.config.raw, "final_logit_softcapping": None})) > BROKEN


@pytest.mark.parametrize("scalar", [24, 41])
def test_control_another_scale_of_scores_fails(oracle_of, scalar):
    oracle = oracle_of("gemma3-rope-linear")
    error = oracle.error(oracle.model(raw={**oracle.config.raw, "query_pre_attn_scalar": scalar}))
    assert error > (BROKEN if scalar == 24 else 5 * TOLERANCE)


def test_control_an_unscaled_embedding_and_the_exact_gelu_fail(oracle_of):
    oracle = oracle_of("gemma3-rope-linear")
    assert oracle.error(oracle.model(hidden_act="gelu")) > 5 * TOLERANCE
    model = oracle.model()
    model.model.embed_tokens.scale = 1.0
    assert oracle.error(model) > BROKEN


def test_a_bfloat16_model_is_near_the_float32_one(oracle_of):
    oracle = oracle_of("gemma3-new-spelling")
    assert oracle.mean_error(oracle.model(dtype="bfloat16")) < 0.1 * oracle.logits[0].std()


# --- how config.json is understood ----------------------------------------------------------------------------

OLD = {"rope_theta": 5e4, "rope_local_base_freq": 2e3, **rope_scaling("linear", factor=8.0)}
NEW = {
    "rope_parameters": {
        F: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
        S: {"rope_type": "default", "rope_theta": 2e3},
    }
}


@pytest.mark.parametrize("spelling", [OLD, NEW])
def test_both_spellings_of_the_two_bases_read_as_transformers_reads_them(spelling):
    config = config_of(gemma3(**spelling))
    ours, theirs = HFConfig.from_dict(config), Gemma3TextConfig(**config).rope_parameters
    assert ours.rope == RopeConfig("linear", theirs[F]["rope_theta"], {"factor": theirs[F]["factor"]})
    assert ours.local_rope == RopeConfig("default", theirs[S]["rope_theta"])
    assert (ours.rope.theta, ours.local_rope.theta) == (5e4, 2e3)


def test_what_a_file_omits_is_what_transformers_takes_for_it():
    config = config_of(gemma3(num_hidden_layers=13))
    for key in ("query_pre_attn_scalar", "head_dim", "sliding_window", "num_key_value_heads"):
        del config[key]
    ours, theirs = HFConfig.from_dict(config), Gemma3TextConfig(**config)
    for key in ("head_dim", "sliding_window", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert ours.hidden_act == theirs.hidden_activation
    assert (ours.rope.theta, ours.local_rope.theta) == (1e6, 1e4)
    assert ours.number("query_pre_attn_scalar") == theirs.query_pre_attn_scalar
    windows = [layer.sliding_window for layer in get_attention_layers(build(config)).values()]
    assert windows == [4096 if kind == S else None for kind in theirs.layer_types]
    assert windows[:7] == [4096] * 5 + [None, 4096]


def test_the_context_is_not_stretched_by_a_scaling_that_is_in_it_already():
    assert HFConfig.from_dict(config_of(gemma3(**OLD))).derived_max_model_len == 128


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"rope_parameters": {"rope_theta": 1e4}}, CheckpointError, "rope_parameters must have parameters per layer"),
        ({"rope_parameters": {F: 3}}, CheckpointError, "rope_parameters.full_attention must be an object"),
        ({**NEW, "rope_local_base_freq": 1e4}, CheckpointError, "rope_theta 2000.0 contradicts rope_local_base_freq"),
        ({"rope_local_base_freq": -1}, CheckpointError, "rope_theta must be a positive number, got -1"),
        ({"attn_logit_softcapping": 50.0}, UnsupportedModelError, "attn_logit_softcapping=50.0.*'gemma3_text'"),
        ({"use_bidirectional_attention": True}, UnsupportedModelError, "use_bidirectional_attention=True"),
        ({"sliding_window": None}, CheckpointError, "sliding_window must be given"),
        ({"sliding_window_pattern": 0}, CheckpointError, "sliding_window_pattern must be an integer of at least 1"),
    ],
)
def test_options_that_would_change_results_are_refused_by_name(changes, error, named):
    with pytest.raises(error, match=named):
        build({**config_of(gemma3()), **changes})


def test_the_model_that_sees_as_well_is_refused_by_name():
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {}}
    with pytest.raises(UnsupportedModelError, match="Gemma3ForConditionalGeneration.*only models of text alone"):
        HFConfig.from_dict({**config, "text_config": config_of(gemma3())})


ROPE_KEYS = ("rope_type", "rope_theta", "factor")
NUMBERS = st.none() | st.integers() | st.floats()
PARAMETERS = st.dictionaries(
    st.sampled_from([F, S, *ROPE_KEYS]),
    NUMBERS | st.text(max_size=3) | st.dictionaries(st.sampled_from(ROPE_KEYS), NUMBERS | st.just("linear")),
)


@given(
    changes=st.dictionaries(
        st.sampled_from(["rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"]),
        PARAMETERS | NUMBERS | st.text(max_size=3),
    )
)
@settings(max_examples=60)
def test_whatever_the_file_holds_it_is_read_or_refused(changes):
    try:
        config = HFConfig.from_dict({**config_of(gemma3()), **changes})
    except CheckpointError as error:
        assert "config.json: " in str(error)
    else:
        assert config.local_rope is not None
