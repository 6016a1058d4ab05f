"""Gemma 2: soft caps, alternating windows, norms around blocks, the scaled embedding."""

import pytest
import torch
from transformers import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.attention import get_attention_layers
from mini_vllm.layers.norm import GemmaRMSNorm
from mini_vllm.models.gemma2 import ScaledEmbedding
from tests.families import gemma2
from tests.models.oracle import BROKEN, TOLERANCE
from tests.models.small import build, config_of

S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_logit_softcapping": None},
        {"attn_logit_softcapping": 15.0},
        {"final_logit_softcapping": None},
        {"final_logit_softcapping": 3.0},
        {"query_pre_attn_scalar": 24},  # the size of a head
        {"layer_types": [F, S, F]},
        {"layer_types": [S, S, S]},
    ],
)
def test_control_another_option_fails(oracle_of, changes):
    oracle = oracle_of("gemma2")
    assert oracle.error(oracle.model(raw={**oracle.config.raw, **changes})) > BROKEN


@pytest.mark.parametrize("window", [15, 17])
@pytest.mark.parametrize("row", ["gemma2", "gemma2-all-windows-biased"])
def test_control_a_window_off_by_one_fails(oracle_of, row, window):
    oracle = oracle_of(row)
    assert oracle.error(oracle.model(sliding_window=window)) > BROKEN


def test_control_norms_by_the_weight_alone_fail(oracle_of):
    oracle = oracle_of("gemma2")
    model = oracle.model()
    for module in model.modules():
        if isinstance(module, GemmaRMSNorm):
            module.weight.data.sub_(1)
    assert oracle.error(model) > BROKEN


@pytest.mark.parametrize("norm", ["post_attention_layernorm", "post_feedforward_layernorm"])
def test_control_without_the_norm_behind_a_block_fails(oracle_of, norm):
    oracle = oracle_of("gemma2")
    model = oracle.model()
    for layer in model.model.layers:
        getattr(layer, norm).forward = lambda x: (x, x)
    assert oracle.error(model) > BROKEN


def test_control_an_unscaled_embedding_fails(oracle_of):
    oracle = oracle_of("gemma2")
    model = oracle.model()
    model.model.embed_tokens.scale = 1.0
    assert oracle.error(model) > BROKEN


def test_control_the_exact_gelu_fails(oracle_of):
    oracle = oracle_of("gemma2")
    assert oracle.error(oracle.model(hidden_act="gelu")) > 5 * TOLERANCE


@pytest.mark.parametrize("part", [0, 1, 2])
def test_control_a_dropped_bias_fails(oracle_of, part):
    oracle = oracle_of("gemma2-all-windows-biased")
    model = oracle.model()
    module = model.model.layers[1].self_attn.qkv_proj
    module.bias.data.split(module.output_partition_sizes)[part].zero_()
    assert oracle.error(model) > BROKEN


def test_embeddings_may_be_given_as_embed_input_ids_gives_them(oracle_of):
    oracle = oracle_of("gemma2")
    model = oracle.model()
    forward = model.forward
    model.forward = lambda ids, positions: forward(None, positions, None, model.embed_input_ids(ids))
    assert oracle.error(model) < TOLERANCE


def test_the_embedding_scale_is_rounded_to_the_models_type_as_transformers_does():
    ids, table = torch.arange(8), torch.randn(8, 3072, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = ScaledEmbedding(8, 3072, dtype=torch.bfloat16)
    ours.weight.weight_loader(ours.weight, table)
    theirs = Gemma2TextScaledWordEmbedding(8, 3072, 0, embed_scale=3072**0.5).bfloat16()
    theirs.weight.data.copy_(table)
    assert ours.scale == 55.5
    assert ours(ids).equal(theirs(ids))
    unrounded = (table.float() * 3072**0.5).bfloat16()
    assert not ours(ids).equal(unrounded)


def test_a_bfloat16_model_is_near_the_float32_one(oracle_of):
    oracle = oracle_of("gemma2")
    assert oracle.mean_error(oracle.model(dtype="bfloat16")) < 0.1 * oracle.logits[0].std()


def test_what_a_file_omits_is_what_transformers_takes_for_it():
    config = config_of(gemma2())
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "head_dim",
                "sliding_window", "num_key_value_heads"):  # fmt: skip
        del config[key]
    ours, theirs = HFConfig.from_dict(config), Gemma2Config()
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"):
        assert ours.number(key) == getattr(theirs, key)
    for key in ("head_dim", "sliding_window", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert ours.hidden_act == theirs.hidden_activation
    assert [layer.sliding_window for layer in get_attention_layers(build(config)).values()] == [4096, None, 4096]


def test_a_cap_that_is_null_is_none_and_one_of_nothing_is_refused():
    config = config_of(gemma2())
    model = build({**config, "attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert model.logits_processor.soft_cap is None
    assert all(layer.impl.logit_softcap is None for layer in get_attention_layers(model).values())
    with pytest.raises(CheckpointError, match="attn_logit_softcapping must be a positive number, got 0"):
        build({**config, "attn_logit_softcapping": 0})


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"use_bidirectional_attention": True}, UnsupportedModelError, "use_bidirectional_attention=True.*'gemma2'"),
        ({"hidden_activation": "quick_gelu"}, UnsupportedModelError, "hidden_act 'quick_gelu' is not supported"),
        ({"sliding_window": None}, CheckpointError, "sliding_window must be given"),
        ({"layer_types": [S, F]}, CheckpointError, "layer_types must name one of"),
        ({"layer_types": [S, F, "linear_attention"]}, CheckpointError, "layer_types must name one of"),
        ({"query_pre_attn_scalar": -1}, CheckpointError, "query_pre_attn_scalar must be a positive number"),
    ],
)
def test_options_that_would_change_results_are_refused_by_name(changes, error, named):
    with pytest.raises(error, match=named):
        build({**config_of(gemma2()), **changes})
